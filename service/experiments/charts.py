"""The drawings of a report's page: SVG that takes the width it is given and keeps its letters' size.

Across, everything is in percent of the width; curves lie in an inner image of 1,000 units that is stretched. A drawing
says in `title` and `desc` what it shows; the tables beside it have the numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from service.experiments.document import ClassReport, Decided, LookReport, Quantiles
from service.experiments.phrases import milliseconds, number, points
from service.html import Html, Scale

WIDE = 1000
# Pixels from the top to the axis, and to the names under it.
PLOT, TICK_LINE, NAME_LINE, HEIGHT = 240, 258, 278, 288
TOP = 10
LETTER = 13
# Looks that set the range of the difference: the last three quarters. Earlier intervals are wide and run off the frame.
SETTLED = 0.25
STRIP_WIDTH, STRIP_HEIGHT = 150, 22
BAR, BAR_ROW = 16, 46


def _svg(key: str, title: str, described: str, height: int, inner: str, kind: str = "plot") -> Html:
    """key: unique on the page."""
    return Html(
        f'<svg class="{kind}" width="100%" height="{height}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(described)}</desc>{inner}</svg>'
    )


def _stretched(inner: str) -> str:
    """Curves with x from 0 to WIDE; what leaves the frame is cut."""
    return f'<svg width="100%" height="{PLOT}" viewBox="0 0 {WIDE} {PLOT}" preserveAspectRatio="none">{inner}</svg>'


def _across(x: float) -> str:
    return f"{x / WIDE * 100:.2f}%"


def _line(kind: str, x1: str, y1: float, x2: str, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1:.1f}" x2="{x2}" y2="{y2:.1f}"/>'


def _text(x: str, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


class Logarithmic:
    """Positive values onto 0 to `width`, as many pixels for each doubling: a tail does not push the rest together."""

    def __init__(self, values: Sequence[float], width: float) -> None:
        self.high = max(*values, 1e-3)
        # At least a decade, so that there are round numbers to name.
        self.low = min(max(min(values), 1e-3), self.high / 10)
        self.width = width

    def __call__(self, value: float) -> float:
        return self.width * math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = (factor * 10.0**decade for decade in decades for factor in (1, 2, 5))
        return [tick for tick in found if self.low <= tick <= self.high]


def _frame(
    x: Scale | Logarithmic, y: Scale, y_ticks: Iterable[tuple[float, str]], name: str, x_words: str = ",g"
) -> str:
    parts = []
    for value, words in y_ticks:
        parts.append(_line("grid", "0", y(value), "100%", y(value)))
        parts.append(_text("-8", y(value) + 4, words, "end"))
    parts.append(_line("axis", "0", PLOT, "100%", PLOT))
    for place, tick in enumerate(x.ticks()):
        # A number under the frame's end would stick out of it.
        anchor = "start" if x(tick) < 0.03 * WIDE else "end" if x(tick) > 0.97 * WIDE else "middle"
        parts.append(_line("axis", _across(x(tick)), PLOT, _across(x(tick)), PLOT + 4))
        parts.append(_text(_across(x(tick)), TICK_LINE, f"{tick:{x_words}}", anchor, "odd" if place % 2 else ""))
    parts.append(_text("50%", NAME_LINE, name, "middle", "name"))
    return "".join(parts)


def difference(timeline: Sequence[LookReport], margin: float, decided: Decided | None) -> Html:
    """The difference of accuracies with its interval, look by look, against no difference and the most that may be
    lost. timeline: at least one look, oldest first."""
    last = timeline[-1]
    settled = [look for look in timeline if look.units >= SETTLED * last.units]
    x = Scale([max(last.units, 1)], 0, WIDE, from_zero=True, room=0)
    y = Scale(
        [0, -1.5 * margin, 0.5 * margin, *(b for look in settled for b in (look.lower, look.upper))],
        PLOT,
        TOP,
        room=0.05,
    )
    border = y(-margin)
    ticks = [(tick, number(100 * tick)) for tick in y.ticks()]
    parts = [
        f'<rect class="refused" x="0" y="{border:.1f}" width="100%" height="{PLOT - border:.1f}"/>',
        _frame(x, y, ticks, "units compared"),
        _line("zero", "0", y(0), "100%", y(0)),
    ]
    upper = [f"{x(look.units):.1f},{y(look.upper):.1f}" for look in timeline]
    lower = [f"{x(look.units):.1f},{y(look.lower):.1f}" for look in reversed(timeline)]
    middle = [f"{x(look.units):.1f},{y(look.estimate):.1f}" for look in timeline]
    parts.append(
        _stretched(
            f'<polygon class="band" points="{" ".join(upper + lower)}"/>'
            f'<polyline class="estimate" points="{" ".join(middle)}"/>'
        )
    )
    parts.append(_line("margin", "0", border, "100%", border))
    # A decision of an earlier way to compare counted other units.
    if decided is not None and decided.units <= last.units and timeline[0].at <= decided.at:
        at = x(decided.units)
        parts.append(_line("decided", _across(at), TOP, _across(at), PLOT))
        side, shift = ("end", -6) if at > WIDE / 2 else ("start", 6)
        words = f"{decided.verdict.replace('_', '-')} at {decided.units:,}"
        parts.append(f'<g transform="translate({shift})">{_text(_across(at), TOP + 10, words, side, "label")}</g>')
    parts.append(
        f'<g transform="translate(-8)">{_text("100%", border + 16, "more is lost than allowed", "end", "beyond")}</g>'
    )
    parts.append(_line("whisker", "100%", y(last.lower), "100%", y(last.upper)))
    parts.append(f'<circle class="now" cx="100%" cy="{y(last.estimate):.1f}" r="4.5"/>')
    parts.append(
        f'<g transform="translate(9 4)">{_text("100%", y(last.estimate), points(last.estimate), kind="label")}'
    )
    for bound in (last.lower, last.upper):
        if abs(y(bound) - y(last.estimate)) >= LETTER:
            parts.append(_text("100%", y(bound), points(bound)))
    parts.append("</g>")
    described = (
        f"{len(timeline):,} looks up to {last.units:,} units. Now {points(last.estimate)} points, between "
        f"{points(last.lower)} and {points(last.upper)}; allowed are {points(-margin)}."
    )
    return _svg("difference", "Accuracy of the candidate minus that of the control", described, HEIGHT, "".join(parts))


def latency(found: Sequence[tuple[str, str, Quantiles]]) -> Html:
    """The share of requests answered by then. found: (deployment, role, its quantiles), at least one with a curve."""
    curves = [row for row in found if row[2].curve]
    x = Logarithmic([value for _, _, quantiles in curves for value in (quantiles.curve[0], quantiles.curve[-1])], WIDE)
    y = Scale([0, 1], PLOT, TOP, room=0)
    y.low, y.high = 0.0, 1.0
    shares = [(0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (0.95, "95 %")]
    parts = [_frame(x, y, shares, "milliseconds from arrival to answer")]
    described = []
    for name, role, quantiles in curves:
        line = [f"{x(value):.1f},{y(rank / 100):.1f}" for rank, value in enumerate(quantiles.curve, start=1)]
        parts.append(_stretched(f'<polyline class="{role}" points="{" ".join(line)}"/>'))
        for rank, value, interval in (
            (0.5, quantiles.p50, quantiles.p50_interval),
            (0.95, quantiles.p95, quantiles.p95_interval),
            (0.99, quantiles.p99, quantiles.p99_interval),
        ):
            if value is None:
                continue
            low, high = (value if bound is None else bound for bound in interval)
            parts.append(_line(f"{role} whisker", _across(x(low)), y(rank), _across(min(x(high), WIDE)), y(rank)))
            parts.append(f'<circle class="{role}" cx="{_across(x(value))}" cy="{y(rank):.1f}" r="4"/>')
        described.append(
            f"{name}, {role}: half within {milliseconds(quantiles.p50)} ms, 95 % within {milliseconds(quantiles.p95)} "
            f"ms, 99 % within {milliseconds(quantiles.p99)} ms."
        )
    return _svg("latency", "Share of requests answered by then", " ".join(described), HEIGHT, "".join(parts))


@dataclass(frozen=True)
class Bar:
    """A value with its name. mark: what it should be, drawn as a tick."""

    name: str
    kind: str
    value: float
    words: str
    mark: float | None = None


def bars(key: str, title: str, rows: Sequence[Bar]) -> Html:
    """Lengths from zero, one under the other."""
    longest = max(max(row.value, row.mark or 0) for row in rows) or 1
    parts = []
    for place, row in enumerate(rows):
        top = place * BAR_ROW
        parts.append(_text("0", top + 14, row.name, kind="label") + _text("100%", top + 14, row.words, "end", "value"))
        parts.append(f'<rect class="ground" x="0" y="{top + 20}" width="100%" height="{BAR}" rx="2"/>')
        width = f"{100 * row.value / longest:.2f}%"
        parts.append(f'<rect class="{row.kind}" x="0" y="{top + 20}" width="{width}" height="{BAR}" rx="2"/>')
        if row.mark is not None:
            at = f"{100 * row.mark / longest:.2f}%"
            parts.append(_line("mark-line", at, top + 17, at, top + 23 + BAR))
    described = "; ".join(f"{row.name}: {row.words}" for row in rows)
    return _svg(key, title, described, BAR_ROW * len(rows), "".join(parts), "bars")


def strips(classes: Sequence[ClassReport], control: str, candidate: str) -> tuple[str, list[Html]]:
    """A small drawing of both recalls for each class, on one scale; (what the scale spans, drawings). The cells beside
    them have the numbers, so the drawings are for the eye only."""
    lows = [low for row in classes for low in row.lower.values() if low is not None]
    floor = min(lows, default=0.0)
    x = Scale([floor, 1.0], 6, STRIP_WIDTH - 6, room=0)
    x.low, x.high = min(floor, 0.99), 1.0
    drawings = []
    for row in classes:
        parts = []
        for role, name, y in (("control", control, 7), ("candidate", candidate, 15)):
            recall, low, high = row.recall.get(name), row.lower.get(name), row.upper.get(name)
            if recall is not None and low is not None and high is not None:
                parts.append(_line(f"{role} whisker", f"{x(low):.1f}", y, f"{x(high):.1f}", y))
                parts.append(f'<circle class="{role}" cx="{x(recall):.1f}" cy="{y}" r="3.5"/>')
        size = f'width="{STRIP_WIDTH}" height="{STRIP_HEIGHT}"'
        drawings.append(Html(f'<svg class="strip" aria-hidden="true" {size}>{"".join(parts)}</svg>'))
    return f"{100 * x.low:.0f} to 100 %", drawings


# What a verdict looks like besides its words: a tick, a cross, three dots, an exclamation mark.
ICONS = {
    "good": '<path d="M8 17l5 5 11-12"/>',
    "bad": '<path d="M10 10l12 12M22 10L10 22"/>',
    "open": '<path d="M9 16h.01M16 16h.01M23 16h.01"/>',
    "broken": '<path d="M16 8v10M16 23v.5"/>',
}


def icon(kind: str) -> Html:
    """A sign beside the verdict; it repeats the words, so it is for the eye only."""
    return Html(
        f'<svg class="icon" aria-hidden="true" width="32" height="32" viewBox="0 0 32 32">'
        f'<circle cx="16" cy="16" r="15"/>{ICONS[kind]}</svg>'
    )


def swatch(role: str) -> Html:
    """The line and point of a role, for a legend."""
    return Html(
        f'<svg class="swatch" aria-hidden="true" width="34" height="12"><line class="{role}" x1="1" y1="6" x2="33" '
        f'y2="6"/><circle class="{role}" cx="17" cy="6" r="4"/></svg>'
    )
