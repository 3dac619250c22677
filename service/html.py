"""What pages share: the frame of a document, tables, scales, and colours for light and dark. No script, no network."""

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from html import escape

TICKS = 4


class Html(str):
    """Markup of our own making: the only text that is not escaped."""

    __slots__ = ()


def text(value: str) -> str:
    """Anything but Html is other people's and is shown as it is written."""
    return value if isinstance(value, Html) else escape(value)


def document(title: str, style: str, body: str, head: str = "") -> str:
    """A whole page. body, head: markup; title: text."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{head}<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def policy(style: str) -> str:
    """The Content-Security-Policy of a page that has this one inline style and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    mark: str | None = None,
    words: Sequence[int] = (),
) -> Html:
    """The first column heads its row; columns in `words` are text, the others numbers. A row that holds `mark` stands
    out."""
    head = "".join(
        f'<th scope="col"{" class=text" if number in words else ""}>'
        f"{escape(column) or '<span class=hidden>note</span>'}</th>"
        for number, column in enumerate(columns)
    )
    body = []
    for first, *cells in rows:
        marked = ' class="mark"' if mark is not None and mark in cells else ""
        inner = "".join(
            f"<td{' class=text' if number in words else ''}>{text(cell)}</td>" for number, cell in enumerate(cells, 1)
        )
        body.append(f'<tr{marked}><th scope="row">{text(first)}</th>{inner}</tr>')
    name = escape(caption)
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table>'
        f"<caption><span>{name}</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


class Scale:
    """Values onto pixels, with a little room at the ends and round numbers to name."""

    def __init__(
        self, values: Sequence[float], first: float, last: float, from_zero: bool = False, room: float = 0.1
    ) -> None:
        low, high = (0.0 if from_zero else min(values)), max(values)
        room = room * (high - low) if high > low else 0.01 * max(abs(high), 1e-9)
        self.low, self.high = (low if from_zero else low - room), high + room
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.7 * rough)
        begin = math.ceil(self.low / step)
        return [number * step for number in range(begin, math.floor(self.high / step) + 1)]


STYLE = """
:root{color-scheme:light dark;--page:#fcfcfb;--ink:#1a1a19;--soft:#5c5b57;--line:#d9d7d0;--grid:#ebe9e3;--hue:#1f6f54;
--hue-soft:#e4f1ec;--warn:#8a3b12;--warn-soft:#faece4;--other:#6b7a90;--calm-soft:#eef0f3}
@media (prefers-color-scheme:dark){:root{--page:#171817;--ink:#ecebe6;--soft:#a9a79f;--line:#3b3c3a;--grid:#282a28;
--hue:#6fcfa8;--hue-soft:#1c3129;--warn:#f0a57c;--warn-soft:#37241a;--other:#93a4bd;--calm-soft:#22262b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.6rem;margin:0 0 1.25rem}
h2{font-size:1.15rem;margin:0 0 .5rem}
section{margin:0 0 2rem}
p{max-width:46rem;margin:.4rem 0}
.scroll{overflow-x:auto;position:relative}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;color:var(--soft);padding:.4rem 0}
caption span{display:block;position:sticky;left:0;max-width:calc(100vw - 2.5rem)}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,th.text,td.text{text-align:left}
td.text{white-space:normal;min-width:9rem}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
tbody th{font-weight:400}
.mark th,.mark td{background:var(--hue-soft);font-weight:600}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
figure{margin:0}
figcaption{color:var(--soft);font-size:.8125rem}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
svg .label{fill:var(--ink);font-weight:600}
.axis{stroke:var(--line)}.grid{stroke:var(--grid)}
code{font:.9em ui-monospace,monospace}
summary{cursor:pointer;padding:.3rem 0}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--hue);outline-offset:2px}
"""
