"""The page of an experiment and the list of all: one file without script or network, made from the report alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from urllib.parse import quote

from service import html
from service.cli.output import size
from service.experiments import charts
from service.experiments.charts import Bar
from service.experiments.document import Report, ReportLine
from service.experiments.phrases import (
    UNKNOWN,
    agreement_words,
    arms,
    difference_words,
    headline,
    latency_words,
    left_out_words,
    memory_words,
    percent,
    points,
    question,
    share,
    srm_words,
    stand,
    when,
)
from service.experiments.tables import (
    Table,
    arm_table,
    cascade_table,
    class_table,
    classes,
    disagreement_table,
    flip_table,
    latency_table,
    list_table,
    pairs_table,
    step_table,
)
from service.experiments.words import roughly
from service.html import Html

REFRESH_SECONDS = 10
KINDS = {
    "invalid": "broken",
    "insufficient_data": "open",
    "inferior": "bad",
    "superior": "good",
    "non_inferior": "good",
    "undecided": "open",
}
LATENCY_TILES = {
    "faster": "faster",
    "slower": "slower",
    "undecided": "not told apart yet",
    "contended": "not judged: shared device",
    "insufficient_data": "too few requests",
}
# Rows beyond these are folded away.
SHOWN = 20
SHOWN_DISAGREEMENTS = 8


def render(report: Report, refreshes: bool = True) -> str:
    """The page of one experiment. It asks for itself again every ten seconds while the experiment runs, if it may."""
    parts = (
        _masthead(report),
        _verdict(report),
        _warnings(report),
        _section("Accuracy", _accuracy(report)),
        _section("Traffic", _traffic(report)),
        _section("Latency", _latency(report)),
        _section("Memory", _memory(report)),
        _section("By class", _classes(report)),
        _section("Disagreements", _disagreements(report)),
        _section("History", _history(report)),
    )
    body = f"<main>{''.join(filter(None, parts))}</main>\n<footer>{_footer(report, refreshes)}</footer>"
    title = f"{headline(report)} \u00b7 {report.name}"
    return html.document(title, STYLE, body, _refresh(refreshes and report.state == "running"))


def list_page(lines: Sequence[ReportLine], refreshes: bool = True) -> str:
    """The page of all experiments, each linked to its own."""
    table = list_table(list(lines))
    rows = [
        (Html(f'<a href="experiments/{quote(line.name)}">{escape(line.name)}</a>'), _signed(line, verdict), *cells)
        for line, (_, verdict, *cells) in zip(lines, table.rows, strict=True)
    ]
    found = (
        f'<div class="list">{html.table(table.caption, table.columns, rows, words=table.words)}</div>'
        if rows
        else "<p>No experiment is configured. An entry under <code>experiments</code> in the configuration starts one: "
        "it names a task, two of its deployments and how they share the traffic.</p>"
    )
    is_running = any(line.state == "running" for line in lines)
    body = (
        f"<main><h1>Experiments</h1>{found}</main>\n<footer><p>{_refreshing(is_running, refreshes)} {_JSON_LINK}</p>"
        "</footer>"
    )
    return html.document("Experiments", STYLE, body, _refresh(refreshes and is_running))


def _signed(line: ReportLine, words: str) -> Html:
    """The verdict of a line with its sign."""
    kind = "open" if line.mode == "cascade" else KINDS[line.verdict]
    return Html(f'<span class="sign {kind}">{charts.icon(kind)}{escape(words)}</span>')


def _refresh(is_running: bool) -> str:
    return f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if is_running else ""


def _section(title: str, parts: Iterator[str]) -> str:
    """Nothing at all if it has nothing to show."""
    inner = "".join(parts)
    key = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{inner}</section>\n' if inner else ""


def _p(words: str | None, kind: str = "") -> str:
    """A paragraph, in which a number and its per cent stay on one line."""
    inner = escape(words or "").replace(" %", "&nbsp;%")
    named = f' class="{kind}"' if kind else ""
    return f"<p{named}>{inner}</p>" if words else ""


def _drawn(table: Table | None, shown: int = SHOWN) -> str:
    """A table whose later rows are folded away; nothing if it is empty."""
    if table is None or not table.rows:
        return ""
    first, rest = table.rows[:shown], table.rows[shown:]
    drawn = html.table(table.caption, table.columns, first, table.mark, table.words)
    if not rest:
        return drawn
    folded = html.table(f"{table.caption}, continued", table.columns, rest, table.mark, table.words)
    return f"{drawn}<details><summary>{len(rest):,} more</summary>{folded}</details>"


def _masthead(report: Report) -> str:
    facts = (
        report.name,
        f"task {report.task}",
        report.mode,
        f"revision {report.revision}",
        f"{percent(report.traffic)} of traffic",
        f"{report.units:,} units",
        stand(report),
    )
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><nav aria-label="Breadcrumb"><a href="../experiments">Experiments</a></nav><ul class="facts">{items}'
        f'</ul><h1 class="question">{escape(question(report))}</h1></header>\n'
    )


def _verdict(report: Report) -> str:
    kind = KINDS[report.verdict]
    needed = _progress(report)
    if report.needed is not None and report.needed.words != report.words:
        needed = _p(report.needed.words) + needed
    decided = report.first_decided
    first = (
        _p(
            f"First decided at {decided.units:,} units, {when(decided.at)}: {decided.verdict.replace('_', '-')}.",
            "soft",
        )
        if decided
        else ""
    )
    return (
        f'<section class="verdict {kind}" aria-labelledby="verdict">{charts.icon(kind)}<div><h2 id="verdict">'
        f"{escape(headline(report))}</h2>{_p(report.words)}{needed}{first}</div></section>\n{_tiles(report)}\n"
    )


def _progress(report: Report) -> str:
    if report.needed is None or not report.needed.units:
        return ""
    wanted = report.needed.units
    words = f"{report.units:,} of about {roughly(wanted):,} units"
    return (
        f'<div class="progress"><progress aria-label="Units" max="{wanted}" value="{min(report.units, wanted)}">'
        f"</progress><span>{words}</span></div>"
    )


def _tiles(report: Report) -> str:
    found, memory, ratio = report.difference, report.memory, report.latency_ms.p95_ratio
    tiles = []
    if report.mode != "cascade":
        interval = f"between {points(found.lower)} and {points(found.upper)}" if found else "no labels yet"
        tiles.append(("Accuracy, points", points(found.estimate) if found else UNKNOWN, interval))
    if report.agreement is not None:
        between = report.agreement_interval
        beside = f"between {100 * between[0]:.1f} and {100 * between[1]:.1f} %" if between else ""
        tiles.append(("Same label", f"{100 * report.agreement:.1f} %", beside))
    if report.cascade is not None:
        accepted = report.cascade.accepted_share
        shown = UNKNOWN if accepted is None else f"{100 * accepted:.1f} %"
        tiles.append(("Candidate was enough", shown, f"threshold {report.cascade.threshold:g}"))
    if report.mode == "split":
        rights = " \u2192 ".join(share(arm.accuracy) for arm in arms(report))
        tiles.append(("Right answers, %", rights, "control \u2192 candidate"))
    if report.mode == "cascade":
        tiles.append(("Units", f"{report.units:,}", "each counts once"))
    saved = memory.saved_ratio
    if report.mode == "cascade":
        tiles.append(("Memory held", size(memory.resident_bytes), "for both: a cascade saves none"))
    else:
        named = "Memory saved" if saved is None or saved >= 0 else "More memory"
        tiles.append((named, UNKNOWN if saved is None else f"{100 * abs(saved):.1f} %", "each served alone"))
    times = UNKNOWN if ratio is None else f"{ratio.estimate:.2f} \u00d7"
    tiles.append(("Latency, p95", times, LATENCY_TILES[report.latency_ms.verdict]))
    inner = "".join(
        f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong><span>{escape(beside)}</span></dd></div>"
        for name, value, beside in tiles
    )
    return f'<dl class="tiles">{inner}</dl>'


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return (
        f'<aside class="warnings" aria-labelledby="warnings"><h2 id="warnings">Warnings</h2><ul>{items}</ul></aside>\n'
    )


def _legend(report: Report) -> str:
    items = "".join(
        f"<li>{charts.swatch(role)}{escape(name)} <small>{role}</small></li>"
        for role, name in (("control", report.control), ("candidate", report.candidate))
    )
    return f'<ul class="legend">{items}</ul>'


def _accuracy(report: Report) -> Iterator[str]:
    yield _p(difference_words(report))
    if report.timeline:
        drawn = charts.difference(report.timeline, report.margin, report.first_decided)
        caption = "Accuracy of the candidate minus that of the control, in points, after each unit compared"
        yield f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"
    yield _drawn(pairs_table(report))
    yield _p(agreement_words(report))


def _traffic(report: Report) -> Iterator[str]:
    yield _ramp(report)
    yield _drawn(cascade_table(report))
    if report.srm is not None:
        total = sum(arm.weight or 0 for arm in report.arms) or 1
        rows = [
            Bar(
                f"{arm.deployment} ({arm.role})",
                arm.role,
                arm.units,
                f"{arm.units:,} units",
                report.units * (arm.weight or 0) / total,
            )
            for arm in arms(report)
        ]
        yield f"<figure>{charts.bars('counts', 'Distinct units by arm; the ticks are what the weights expect', rows)}"
        yield "<figcaption>Distinct units by arm; the ticks are what the weights expect</figcaption></figure>"
        yield _p(srm_words(report.srm), "alarm" if report.srm.alarm else "")
    if report.labels_srm is not None:
        yield _p(srm_words(report.labels_srm, "labelled units"), "alarm" if report.labels_srm.alarm else "")
    yield _drawn(arm_table(report))


def _ramp(report: Report) -> str:
    if not report.ramp:
        return ""
    steps = "".join(
        f"<li{' aria-current=step' if step == report.traffic else ''}>{percent(step)}</li>" for step in report.ramp
    )
    return f'<ol class="ramp" aria-label="Ramp">{steps}</ol>'


def _latency(report: Report) -> Iterator[str]:
    yield _p(latency_words(report))
    roles = {arm.deployment: arm.role for arm in arms(report)}
    found = [
        (name, role, report.latency_ms.arms[name]) for name, role in roles.items() if name in report.latency_ms.arms
    ]
    if any(quantiles.curve for _, _, quantiles in found):
        yield f"<figure>{_legend(report)}{charts.latency(found)}"
        yield "<figcaption>Share of requests answered by then; the points are p50, p95 and p99</figcaption></figure>"
    yield _drawn(latency_table(report))


def _memory(report: Report) -> Iterator[str]:
    yield _p(memory_words(report))
    memory = report.memory
    rows = [
        Bar(name, kind, value, size(value))
        for name, kind, value in (
            (f"{report.control} alone", "control", memory.control_bytes),
            (f"{report.candidate} alone", "candidate", memory.candidate_bytes),
            ("this process, for both", "both", memory.resident_bytes),
        )
        if value is not None
    ]
    yield f"<figure>{charts.bars('bytes', 'Bytes of weights', rows)}</figure>"


def _classes(report: Report) -> Iterator[str]:
    if not report.classes:
        return
    table = class_table(report)
    spans, drawings = charts.strips(classes(report), report.control, report.candidate)
    columns = (table.columns[0], spans, *table.columns[1:])
    rows = [(first, drawing, *cells) for (first, *cells), drawing in zip(table.rows, drawings, strict=True)]
    yield _legend(report)
    yield _drawn(replace(table, columns=columns, rows=rows))


def _disagreements(report: Report) -> Iterator[str]:
    yield _drawn(flip_table(report))
    yield _drawn(disagreement_table(report), SHOWN_DISAGREEMENTS)


def _history(report: Report) -> Iterator[str]:
    yield _drawn(step_table(report))


_JSON_LINK = '<a href="?format=json">The same as JSON</a>'


def _refreshing(is_running: bool, refreshes: bool) -> str:
    """What the page does by itself, and how to change that: who reads slowly must be able to hold it."""
    if not is_running:
        return ""
    if refreshes:
        return f'This page asks again every {REFRESH_SECONDS} seconds. <a href="?refresh=off">Hold it still</a>'
    return f'This page is held still. <a href="?">Ask again every {REFRESH_SECONDS} seconds</a>'


def _footer(report: Report, refreshes: bool) -> str:
    how = (
        f"Margin {points(report.margin)} points, alpha {report.alpha:g}. A unit counts once. "
        "The verdict holds however often it is looked at."
    )
    again = _refreshing(report.state == "running", refreshes)
    return f"<p>As of {escape(when(report.updated))}. {again} {_JSON_LINK}</p>{_p(left_out_words(report))}{_p(how)}"


STYLE = (
    html.STYLE
    + """
header{margin:0 0 1.25rem}
nav{font-size:.875rem}
a{color:var(--hue)}
.facts{display:flex;flex-wrap:wrap;gap:.25rem 0;list-style:none;margin:.35rem 0 .1rem;padding:0;color:var(--soft);
font-size:.875rem}
.facts li:not(:last-child)::after{content:"\\00b7";margin:0 .5rem}
.facts li:first-child{color:var(--ink);font-weight:600}
.question{font-size:1.15rem;font-weight:500;margin:0;overflow-wrap:anywhere}
.verdict{display:flex;gap:1rem;padding:1.35rem 1.5rem;margin:0 0 1rem;border-radius:6px;background:var(--calm-soft)}
.verdict h2{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;letter-spacing:-.015em;margin:0 0 .4rem}
.verdict p{font-size:1.0625rem}
.verdict p.soft{font-size:.875rem;color:var(--soft)}
.good{background:var(--hue-soft)}.bad,.broken{background:var(--warn-soft)}
.icon{flex:none;margin-top:.3rem;fill:none;stroke:var(--page);stroke-width:2.5;stroke-linecap:round;
stroke-linejoin:round}
.icon circle{fill:var(--other);stroke:none}
.good .icon circle{fill:var(--hue)}.bad .icon circle,.broken .icon circle{fill:var(--warn)}
.progress{display:flex;flex-wrap:wrap;align-items:center;gap:.25rem .75rem;font-size:.875rem;color:var(--soft);
font-variant-numeric:tabular-nums}
progress{flex:0 1 20rem;height:.5rem;accent-color:var(--hue)}
table{width:auto;min-width:min(100%,40rem)}
.mark th,.mark td{background:var(--warn-soft)}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:0 0 2.5rem;background:var(--line);
border:1px solid var(--line);border-radius:6px;overflow:hidden}
.tiles div{background:var(--page);padding:.8rem 1rem}
.tiles dt{font-size:.8125rem;color:var(--soft)}
.tiles dd{margin:0}
.tiles strong{display:block;font-size:1.6rem;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums}
.tiles span{font-size:.8125rem;color:var(--soft)}
.warnings{margin:0 0 2.5rem;padding:.8rem 1.25rem;border-left:4px solid var(--warn);background:var(--warn-soft)}
.warnings h2{font-size:1rem;margin:0}.warnings ul{margin:.25rem 0 0;padding-left:1.1rem}
.alarm{border-left:4px solid var(--warn);padding-left:.75rem}
section{margin:0 0 2.75rem}
tbody td,tbody th{vertical-align:top}
.list td.text{min-width:0}.list td:nth-child(3){min-width:20rem}
.scroll+p{margin-top:1rem}
.sign{display:flex;gap:.5rem;background:none;font-weight:600}.sign .icon{width:1.1rem;height:1.1rem;margin-top:.1rem}
.scroll{margin-top:.75rem}
section>h2{border-top:1px solid var(--line);padding-top:1rem}
.verdict h2{border:0;padding:0}
figure{margin:1rem 0}
svg{display:block}
.plot{width:calc(100% - 6rem);margin:.5rem 3rem 0;overflow:visible}
.plot text,.bars text{font-size:12px;font-variant-numeric:tabular-nums}
.plot polyline,.plot polygon{vector-effect:non-scaling-stroke}
.band{fill:var(--hue);fill-opacity:.2}
.estimate{fill:none;stroke:var(--hue);stroke-width:2}
.whisker{stroke-width:2}.plot>.whisker{stroke:var(--hue)}
.now{fill:var(--hue)}
.zero{stroke:var(--ink);stroke-width:1}
.margin{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:6 4}
.refused{fill:var(--warn-soft)}
.decided{stroke:var(--soft);stroke-dasharray:2 3}
svg .beyond{fill:var(--warn)}
line.control,polyline.control{stroke:var(--other);stroke-width:2;stroke-dasharray:6 4;fill:none}
line.candidate,polyline.candidate{stroke:var(--hue);stroke-width:2.25;fill:none}
line.control.whisker,.plot>line.control{stroke:var(--other);stroke-dasharray:none}
circle.control{fill:var(--page);stroke:var(--other);stroke-width:2}
circle.candidate{fill:var(--hue)}
.bars{max-width:46rem;width:100%}
.bars .ground{fill:var(--calm-soft)}.bars .control{fill:var(--other)}.bars .candidate{fill:var(--hue)}
.bars .both{fill:var(--soft)}
.mark-line{stroke:var(--ink);stroke-width:2}
.strip{display:inline-block;vertical-align:middle}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;list-style:none;margin:.5rem 0;padding:0;font-size:.875rem}
.legend li{display:flex;align-items:center;gap:.5rem}
small{color:var(--soft);font-size:1em}
details{margin-top:.5rem;font-size:.875rem}
.ramp{display:flex;flex-wrap:wrap;gap:.4rem;list-style:none;margin:.5rem 0 1rem;padding:0;font-size:.875rem;
font-variant-numeric:tabular-nums}
.ramp li{padding:.15rem .7rem;border:1px solid var(--line);border-radius:99px;color:var(--soft)}
.ramp li[aria-current]{background:var(--hue);border-color:var(--hue);color:var(--page);font-weight:600}
footer{max-width:72rem;margin:0 auto;padding:0 1.25rem 3rem;font-size:.8125rem;color:var(--soft)}
@media (max-width:44rem){.tiles{grid-template-columns:repeat(2,1fr)}.verdict{padding:1.1rem;flex-direction:column;
gap:.5rem}main{padding-top:1.25rem}.plot .odd{display:none}}
@media (prefers-contrast:more){:root{--soft:var(--ink);--line:var(--ink)}}
"""
)
CSP = html.policy(STYLE)
