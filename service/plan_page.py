"""One page about a plan: what was chosen, the front as table and plot, what was tried. It needs no network."""

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

from service import html
from service.cli.output import size
from service.html import Scale, table

Plan = Mapping[str, Any]
Point = Mapping[str, Any]
# Width and height of a plot, and of the frame inside it: left, top, right, bottom.
WIDTH, HEIGHT = 420, 250
FRAME = (52, 18, 408, 206)
MOST_FAITHFUL = "the most faithful child of half the experts"


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
    return html.document(title, STYLE, f"<main>\n<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</main>")


def verdict(plan: Plan) -> str:
    """What came out, in a few sentences."""
    tolerance = plan["request"]["tolerance"]
    if plan["chosen"] is None:
        return f"Nothing passes: {_why_not(plan)}"
    point = _named(plan, plan["chosen"])
    saved = 1 - point["bytes"] / plan["parent"]["bytes"]
    found = point["difference"]
    return (
        f"{in_words(point)}: {size(point['bytes'])} instead of {size(plan['parent']['bytes'])}, "
        f"{100 * saved:.0f} % less. On {found['rows']:,} rows that nothing was chosen by, its accuracy differs from "
        f"the parent's by {100 * found['value']:+.1f} points, and is at 95 % confidence no more than "
        f"{_lost(found['lower'])} points lower; {tolerance:g} were allowed. One row takes {_milliseconds(point)} "
        f"instead of {_milliseconds(plan['parent'])}.{_beside_half(plan)}{_still_smaller(plan)}"
    )


def _named(plan: Plan, name: str) -> Point:
    found: Point = next(point for point in plan["front"] if point["name"] == name)
    return found


def _beside_half(plan: Plan) -> str:
    """How the chosen child stands to what keeping half of the experts would have given."""
    if plan["reference"] is None:
        return ""
    half = _named(plan, plan["reference"])
    rows = f"On all {plan['rows']['dev']:,} dev rows"
    if half["name"] == plan["chosen"]:
        return f" It is {MOST_FAITHFUL}, and {rows.lower()} no smaller one that passed was as good."
    state = "behind" if plan["behind_reference"] else "not behind"
    return f" {rows} it is {state} {MOST_FAITHFUL}, {half['name']}, {size(half['bytes'])}."


def _still_smaller(plan: Plan) -> str:
    if plan["smallest"] == plan["chosen"]:
        return ""
    bytes_ = size(_named(plan, plan["smallest"])["bytes"])
    return f" Smaller, and within the tolerance too, but behind that child: {plan['smallest']}, {bytes_}."


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
    places = [plan["child"]["path"]] if plan["child"] else []
    places += ["smallest"] if plan["smallest"] != plan["chosen"] else []
    told = f"<p>Written to {' and '.join(f'<code>{escape(place)}</code>' for place in places)}.</p>" if places else ""
    return f'<section class="{state}"><h2>What was chosen</h2>\n<p>{escape(verdict(plan))}</p>{told}</section>'


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
            next((word for word in ("chosen", "smallest", "reference") if point["name"] == plan[word]), ""),
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
        "is nearer to the parent and needs no more bytes, or no more arithmetic; the reference is the nearest of those "
        f"that keep half of the experts. Accuracy is on all {rows['dev']:,} dev rows, a fifth of which chose, with "
        f"95 % Wilson intervals; the change, and above what it is at 95 %, on the {rows['confirming']:,} others. "
        f"Latency is the median of single rows and of a batch of {batch} on this machine: {escape(machine['cpu'])}, "
        f"threads {machine['threads']}, {escape(machine['device'])}, backend {escape(machine['backend'])}. FLOPs leave "
        "out what cut experts save.</p>\n"
        + table("Accuracy against cost", FRONT_COLUMNS, front_rows(plan), mark="chosen")
        + f'\n<div class="plots">{plots}</div></section>'
    )


def _claim(plan: Plan) -> str:
    rows = plan["rows"]
    return (
        f"<section><h2>What is claimed, and how</h2>\n<p>{rows['calibration']:,} train rows calibrated. The "
        f"{rows['dev']:,} dev rows were split by groups. On {rows['choosing']:,} of them candidates raced: all on few "
        "rows, the half of each size that is nearer to the parent on twice as many, and so on; what was clearly worse "
        "went at once. Near is how little the probability of the true label moves: on few rows this tells children "
        "apart that have the same labels right, and no lucky gain counts. The nearest of every size were put in an "
        f"order, from the largest and safest to the smallest. On the other {rows['confirming']:,} rows, of "
        f"{rows['confirming_groups']:,} groups, that order was tested until the first failure, each at 5 %: for a "
        "wrong choice, the first wrong candidate of the order has to pass, and the chance of that is 5 %. To pass, two "
        "one-sided 95 % bounds of the paired difference must be above minus the tolerance: an exact one, which takes "
        "rows as independent, and one over groups by Student's t, which is an approximation where groups are few. "
        "Of those that passed, the smallest was chosen that is not behind the reference on all dev rows, neither in "
        "rows that it has right nor, by over a standard error, in the mean probability of the true label; if all were, "
        "the smallest. Test rows were not looked at.</p>"
        "</section>"
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
    return f"<section><h2>The test, in order</h2>\n{table('From the safest to the smallest', columns, cells)}</section>"


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
        + table("Everything that was tried, by method", columns, [*cells, *left_out], words=(4, 5))
        + "</details></section>"
    )


def _plot(plan: Plan, name: str, value: Callable[[Point], float], shown: Callable[[float], str]) -> str:
    """Accuracy with its interval against one cost; the table beside it has the numbers."""
    points = [plan["parent"], *plan["front"]]
    x = Scale([value(p) for p in points], FRAME[0], FRAME[2], from_zero=True)
    y = Scale([bound for p in points for bound in p["accuracy_interval"]], FRAME[3], FRAME[1])
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


STYLE = (
    html.STYLE
    + """
.found,.none{padding:1rem 1.25rem;border-left:4px solid var(--hue);background:var(--hue-soft)}
.none{border-color:var(--warn);background:var(--warn-soft)}
.found p{font-size:1.1rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1.25rem;margin-top:1.25rem}
svg{width:100%;height:auto;display:block}
g line{stroke:var(--other);stroke-width:1.5}g circle{fill:var(--other)}
.chosen line{stroke:var(--hue);stroke-width:2}.chosen circle{fill:var(--hue)}
.parent line{stroke:var(--soft)}.parent circle{fill:var(--page);stroke:var(--soft);stroke-width:2}
"""
)
