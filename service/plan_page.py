"""One page about a plan: what was chosen, the front as table and plot, what was tried. It needs no network."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from service.cli.output import size

Plan = Mapping[str, Any]
Point = Mapping[str, Any]
# Width and height of a plot, and of the frame inside it: left, top, right, bottom.
WIDTH, HEIGHT = 420, 250
FRAME = (52, 18, 408, 206)
TICKS = 4


def render(plan: Plan) -> str:
    """The page for a finished plan, as `models.pruning.planner.plan` returns it."""
    title = f"Plan for {plan['request']['parent']} on {plan['request']['dev']['name']}"
    sections = (
        _chosen(plan),
        _front(plan),
        _claim(plan),
        _ladder(plan),
        _watched(plan),
        _tried(plan),
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def verdict(plan: Plan) -> str:
    """What came out, in one or two sentences."""
    tolerance = plan["request"]["tolerance"]
    if plan["chosen"] is None:
        return f"Nothing passes: {_why_not(plan)}"
    point = next(point for point in plan["front"] if point["name"] == plan["chosen"])
    saved = 1 - point["bytes"] / plan["parent"]["bytes"]
    found = point["difference"]
    return (
        f"{in_words(point)}: {size(point['bytes'])} instead of {size(plan['parent']['bytes'])}, "
        f"{100 * saved:.0f} % less. On {found['rows']:,} rows that nothing was chosen by, its accuracy differs from "
        f"the parent's by {100 * found['value']:+.1f} points, and is at 95 % confidence no more than "
        f"{_lost(found['lower'])} points lower; {tolerance:g} were allowed. One row takes {_milliseconds(point)} "
        f"instead of {_milliseconds(plan['parent'])}."
    )


def _milliseconds(point: Point) -> str:
    return f"{1000 * point['latency']['single_seconds']:.1f} ms"


def _lost(lower: float) -> str:
    """A loss in points, rounded up, as it is a bound."""
    return f"{max(math.ceil(-1000 * lower - 1e-9) / 10, 0):.1f}"


def in_words(point: Point) -> str:
    """A candidate as a person says it."""
    experts = point["experts"]
    kept = (
        f"{experts[0]} experts in each layer" if len(set(experts)) == 1 else f"{', '.join(map(str, experts))} experts"
    )
    options = "".join(f", {name} {value}" for name, value in point["options"].items())
    shared = ", shared out by score" if point["allocation"] == "global" else ""
    return f"{point['method']} by {point['semantics']}{options}, {kept}{shared}"


def _why_not(plan: Plan) -> str:
    tolerance, rows = plan["request"]["tolerance"], plan["rows"]
    if rows["needed_at_least"] is None or rows["confirming"] < rows["needed_at_least"]:
        needed = (
            f"{rows['needed_at_least']:,} are needed at least" if rows["needed_at_least"] else "no number is enough"
        )
        return (
            f"{rows['confirming']:,} rows confirm, and to rule out a loss of {tolerance:g} points {needed}. "
            "Give more dev rows or a larger --tolerance."
        )
    if not plan["ladder"]:
        return (
            f"on the rows that choose, every candidate lost clearly more than {tolerance:g} points. Raise --tolerance."
        )
    first = next(point for point in plan["front"] if point["name"] == plan["ladder"][0]["name"])
    return (
        f"the safest candidate, {first['name']}, may be {_lost(first['difference']['lower'])} points worse than the "
        f"parent, {tolerance:g} were allowed. Give more dev rows, or a larger --tolerance."
    )


def _chosen(plan: Plan) -> str:
    state = "none" if plan["chosen"] is None else "found"
    child = f"<p>The checkpoint is in <code>{escape(plan['child']['path'])}</code>.</p>" if plan["child"] else ""
    return (
        f'<section class="{state}"><h2>The smallest that passes</h2>\n<p>{escape(verdict(plan))}</p>{child}</section>'
    )


def front_rows(plan: Plan) -> Iterable[tuple[str, ...]]:
    """The front as a table, the parent first; columns as in FRONT_COLUMNS."""
    for point in (plan["parent"], *plan["front"]):
        low, high = point["accuracy_interval"]
        found, latency = point["difference"], point["latency"]
        yield (
            "parent" if point is plan["parent"] else point["name"],
            ", ".join(map(str, point["experts"])),
            size(point["bytes"]),
            f"{100 * point['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            f"{100 * found['value']:+.1f}, above {100 * found['lower']:+.1f}" if found else "",
            f"{point['flops_per_token'] / 1e6:.2f} M",
            _milliseconds(point),
            f"{1000 * latency['batch_seconds']:.1f} ms",
            "chosen" if point["name"] == plan["chosen"] else "",
        )


FRONT_COLUMNS = (
    "variant",
    "experts",
    "bytes",
    "accuracy, %",
    "change, points",
    "FLOPs per token",
    "one row, p50",
    "batch, p50",
    "",
)


def _front(plan: Plan) -> str:
    rows, machine = plan["rows"], plan["machine"]
    axes: tuple[tuple[str, Callable[[Point], float], Callable[[float], str]], ...] = (
        ("bytes", lambda p: float(p["bytes"]), lambda v: size(round(v))),
        ("FLOPs per token", lambda p: float(p["flops_per_token"]), lambda v: f"{v / 1e6:.2f} M"),
        ("one row, ms", lambda p: 1000 * float(p["latency"]["single_seconds"]), lambda v: f"{v:.1f}"),
        ("batch, ms", lambda p: 1000 * float(p["latency"]["batch_seconds"]), lambda v: f"{v:.1f}"),
    )
    plots = "\n".join(_plot(plan, name, value, shown) for name, value, shown in axes)
    batch = plan["parent"]["latency"]["batch_rows"]
    return (
        f"<section><h2>The front</h2>\n<p>On the {rows['choosing']:,} rows that choose, none of these had a rival that "
        "promises more and needs no more bytes, or no more arithmetic. Accuracy is on all "
        f"{rows['dev']:,} dev rows, a third of which chose, with 95 % Wilson intervals; the change, and above what it "
        f"is at 95 %, on the {rows['confirming']:,} others. Latency is the median of single rows and of a batch of "
        f"{batch} on this machine: {escape(machine['cpu'])}, threads {machine['threads']}, "
        f"{escape(machine['device'])}, backend {escape(machine['backend'])}. FLOPs leave out what cut experts "
        "save.</p>\n"
        + _table("Accuracy against cost", FRONT_COLUMNS, front_rows(plan), mark="chosen")
        + f'\n<div class="plots">{plots}</div></section>'
    )


def _claim(plan: Plan) -> str:
    rows = plan["rows"]
    return (
        f"<section><h2>What is claimed, and how</h2>\n<p>{rows['calibration']:,} train rows calibrated. The "
        f"{rows['dev']:,} dev rows were split by groups. On {rows['choosing']:,} of them candidates raced: all on few "
        "rows, the better half of each size on twice as many, and so on; what was clearly worse went at once. The best "
        f"were put in an order, from the safest to the smallest. On the other {rows['confirming']:,} rows, of "
        f"{rows['confirming_groups']:,} groups, that order was tested until the first failure, each at 5 %: for a "
        "wrong choice, the first wrong candidate of the order has to pass, and the chance of that is 5 %. To pass, two "
        "one-sided 95 % bounds of the paired difference must be above minus the tolerance: an exact one, which takes "
        "rows as independent, and one over groups by Student's t, which is an approximation where groups are few. "
        "Test rows were not looked at.</p></section>"
    )


def _ladder(plan: Plan) -> str:
    points = {point["name"]: point for point in plan["front"]}
    cells = [
        (
            step["name"],
            size(points[step["name"]]["bytes"]),
            f"{100 * points[step['name']]['difference']['value']:+.2f}",
            f"{100 * points[step['name']]['difference']['lower']:+.2f}",
            f"{points[step['name']]['difference']['gained']:,}",
            f"{points[step['name']]['difference']['lost']:,}",
            step["result"],
        )
        for step in plan["ladder"]
    ]
    columns = ("variant", "bytes", "change, points", "95 % bound", "rows gained", "rows lost", "result")
    return (
        f"<section><h2>The test, in order</h2>\n{_table('From the safest to the smallest', columns, cells)}</section>"
    )


def _watched(plan: Plan) -> str:
    lines = watched_lines(plan)
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<section><h2>Where router-norm change stands</h2>\n{paragraphs}</section>"


def watched_lines(plan: Plan) -> list[str]:
    """Router-norm change beside a random choice of the same size; why not, if it could not be tried."""
    if not plan["router_norm_change"]:
        own = [x for x in plan["tried"] if x["method"] == "router-norm-change" and x["state"] == "impossible"]
        why = plan["left_out"].get("router-norm-change") or next((x["reason"] for x in own), "no such ratio fits")
        return [f"Router-norm change was not compared with random: {why}"]
    lines = []
    for found in plan["router_norm_change"]:
        if found["ahead"]:
            told = "ahead of random"
        elif found["behind"]:
            told = "behind random: its ranking misleads here"
        else:
            told = "not told apart from random, so these rows do not show that its ranking means anything"
        lines.append(
            f"Keeping {found['keep']:g} of the experts (zero), on {found['rows']:,} rows: router-norm change "
            f"{100 * found['accuracy']:.1f} %, random {100 * found['random']:.1f} %, "
            f"parent {100 * found['parent']:.1f} %; {told}."
        )
    return lines


STATES = {
    "front": "on the front",
    "beaten": "finished the race",
    "dropped": "dropped",
    "same": "same child",
    "impossible": "not possible",
}


def _tried(plan: Plan) -> str:
    cells = [
        (
            x["name"],
            size(x["bytes"]) if x["bytes"] else "",
            f"{x['rows']:,}" if x["rows"] else "",
            f"{100 * x['accuracy']:.1f}" if x["rows"] else "",
            STATES[x["state"]],
            x["reason"],
        )
        for x in plan["tried"]
    ]
    left_out = [(name, "", "", "", "left out", why) for name, why in plan["left_out"].items()]
    columns = ("candidate", "bytes", "rows", "right, %", "outcome", "why")
    return (
        f"<section><h2>What was tried</h2>\n<details><summary>{len(cells)} candidates of "
        f"{len({x['method'] for x in plan['tried']})} methods, and {len(left_out)} methods left out</summary>\n"
        + _table("Everything that was tried, by method", columns, [*cells, *left_out], words=(4, 5))
        + "</details></section>"
    )


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    mark: str | None = None,
    words: Sequence[int] = (),
) -> str:
    """The first column heads its row; columns in `words` are text, the others numbers."""
    head = "".join(f'<th scope="col">{escape(column) or "<span class=hidden>note</span>"}</th>' for column in columns)
    body = []
    for first, *cells in rows:
        chosen = ' class="mark"' if mark is not None and mark in cells else ""
        inner = "".join(
            f"<td{' class=text' if number in words else ''}>{escape(cell)}</td>" for number, cell in enumerate(cells, 1)
        )
        body.append(f'<tr{chosen}><th scope="row">{escape(first)}</th>{inner}</tr>')
    name = escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table><caption>{name}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _plot(plan: Plan, name: str, value: Callable[[Point], float], shown: Callable[[float], str]) -> str:
    """Accuracy with its interval against one cost; the table beside it has the numbers."""
    points = [plan["parent"], *plan["front"]]
    x = _Scale([value(p) for p in points], FRAME[0], FRAME[2], from_zero=True)
    y = _Scale([bound for p in points for bound in p["accuracy_interval"]], FRAME[3], FRAME[1])
    parts = [f'<line class="axis" x1="{FRAME[0]}" y1="{FRAME[3]}" x2="{FRAME[2]}" y2="{FRAME[3]}"/>']
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{FRAME[0]}" y1="{y(tick):.1f}" x2="{FRAME[2]}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{FRAME[0] - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:.1f}</text>')
    for tick in x.ticks():
        parts.append(f'<text x="{x(tick):.1f}" y="{FRAME[3] + 16}" text-anchor="middle">{escape(shown(tick))}</text>')
    middle = (FRAME[0] + FRAME[2]) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle" class="name">{escape(name)}</text>')
    parts.append(f'<text x="{FRAME[0] + 4}" y="{FRAME[1] - 6}" class="name">accuracy, %</text>')
    for p in points:
        kind = "parent" if p is plan["parent"] else "chosen" if p["name"] == plan["chosen"] else "other"
        at, (low, high) = x(value(p)), p["accuracy_interval"]
        label = "parent" if kind == "parent" else p["name"]
        parts.append(
            f'<g class="{kind}"><title>{escape(label)}: {100 * p["accuracy"]:.1f} %, {escape(shown(value(p)))}</title>'
            f'<line x1="{at:.1f}" y1="{y(low):.1f}" x2="{at:.1f}" y2="{y(high):.1f}"/>'
            f'<circle cx="{at:.1f}" cy="{y(p["accuracy"]):.1f}" r="{5 if kind != "other" else 4}"/></g>'
        )
        if kind != "other":
            # Past the ends of the intervals, one above and one below, where no other point is.
            height = y(high) - 4 if kind == "chosen" else y(low) + 12
            parts.append(f'<text x="{at:.1f}" y="{height:.1f}" text-anchor="middle" class="label">{kind}</text>')
    described = "; ".join(
        f"{'parent' if p is plan['parent'] else p['name']} {100 * p['accuracy']:.1f} % at {shown(value(p))}"
        for p in points
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Accuracy against {escape(name)}: '
        f'{escape(described)}"><title>Accuracy against {escape(name)}</title>{"".join(parts)}</svg>'
        f"<figcaption>Accuracy against {escape(name)}, 95 % intervals</figcaption></figure>"
    )


class _Scale:
    """Values onto pixels, with a little room at the ends and round numbers to name."""

    def __init__(self, values: Sequence[float], first: float, last: float, from_zero: bool = False) -> None:
        low, high = (0.0 if from_zero else min(values)), max(values)
        room = 0.1 * (high - low) or 0.01 * max(abs(high), 1e-9)
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
--hue-soft:#e4f1ec;--warn:#8a3b12;--warn-soft:#faece4;--other:#6b7a90}
@media (prefers-color-scheme:dark){:root{--page:#171817;--ink:#ecebe6;--soft:#a9a79f;--line:#3b3c3a;--grid:#282a28;
--hue:#6fcfa8;--hue-soft:#1c3129;--warn:#f0a57c;--warn-soft:#37241a;--other:#93a4bd}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.6rem;margin:0 0 1.25rem}
h2{font-size:1.15rem;margin:0 0 .5rem}
section{margin:0 0 2rem}
p{max-width:46rem;margin:.4rem 0}
.found,.none{padding:1rem 1.25rem;border-left:4px solid var(--hue);background:var(--hue-soft)}
.none{border-color:var(--warn);background:var(--warn-soft)}
.found p{font-size:1.1rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;color:var(--soft);padding:.4rem 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td.text{text-align:left}
td.text{white-space:normal;min-width:9rem}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:normal}
tbody th{font-weight:400}
.mark th,.mark td{background:var(--hue-soft);font-weight:600}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1.25rem;margin-top:1.25rem}
figure{margin:0}
figcaption{color:var(--soft);font-size:.8125rem}
svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
svg .label{fill:var(--ink);font-weight:600}
.axis{stroke:var(--line)}.grid{stroke:var(--grid)}
g line{stroke:var(--other);stroke-width:1.5}g circle{fill:var(--other)}
.chosen line{stroke:var(--hue);stroke-width:2}.chosen circle{fill:var(--hue)}
.parent line{stroke:var(--soft)}.parent circle{fill:var(--page);stroke:var(--soft);stroke-width:2}
summary{cursor:pointer;padding:.3rem 0}
code{font:.9em ui-monospace,monospace}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--hue);outline-offset:2px}
"""
