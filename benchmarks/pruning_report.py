"""The page and the plots of the pruning benchmark, from its results alone; every judgement follows from an interval."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.pruning_cells import CHANCE, CHEAPER, FLAGSHIP, RECOVERED_RATIOS, USAGE, Cell
from benchmarks.pruning_results import (
    Contrast,
    Outcome,
    Parent,
    against,
    against_parent,
    is_settled,
    seeds_of,
)

Outcomes = Mapping[Cell, Outcome]
# Whose papers' own formulas were not to be had: the docstring of each says which one stands in.
STAND_INS = ("dern", "diversify", "premoe-union", "seer-moe", "sub-moe", "tsep", "uncurl")
# arXiv 2405.16646, read off the authors' figure for V-MoE B/16, about half a point: experts cut of 8 in every layer but
# one -> accuracy by router-norm change and by their importance score, on CIFAR-10, CIFAR-100 and ImageNet.
PUBLISHED = {
    0: ("98.9", "92.7", "85.7"),
    2: ("98.7 / 98.6", "91.7 / 91.5", "84.7 / 66.4"),
    4: ("98.1 / 98.1", "90.9 / 89.4", "54.2 / 61.3"),
    6: ("96.8 / 76.0", "84.7 / 6.3", "38.6 / 47.0"),
}


def write_report(
    docs: Path,
    command: str,
    parents: Sequence[Parent],
    cells: Sequence[Cell],
    outcomes: Outcomes,
    absent: Sequence[str] = (),
) -> None:
    """results.md, and a plot per task. absent: tasks that have no parent to cut."""
    docs.mkdir(parents=True, exist_ok=True)
    for parent in parents:
        plot(parent, outcomes, docs / f"results-{parent.task}.png")
    (docs / "results.md").write_text(page(command, parents, cells, outcomes, absent), encoding="utf-8")


def page(
    command: str,
    parents: Sequence[Parent],
    cells: Sequence[Cell],
    outcomes: Outcomes,
    absent: Sequence[str] = (),
) -> str:
    """The whole page as Markdown."""
    of_task = {parent.task: parent for parent in parents}
    cells = [cell for cell in cells if not is_settled(cell, outcomes, of_task[cell.task])]
    ratios = sorted({cell.ratio for cell in cells}, reverse=True)
    parts = [
        f"# What pruning costs, measured by `{command}`",
        _about(parents, cells, outcomes),
        "## Router-norm change against chance and usage",
        duels(parents, outcomes, ratios),
        "## Every method",
        *(_task_section(parent, outcomes, ratios) for parent in parents),
        "## After training again",
        recovery_table(parents, outcomes),
        "## Bytes, and pairs that still run an expert",
        size_table(parents, outcomes, ratios),
        *_published_section(parents, outcomes),
        "## What is not here",
        left_out(cells, outcomes, absent),
    ]
    return "\n\n".join(parts) + "\n"


def _about(parents: Sequence[Parent], cells: Sequence[Cell], outcomes: Outcomes) -> str:
    found = [outcomes[cell] for cell in cells if cell in outcomes]
    minutes = sum(outcome.seconds for outcome in found) / 60
    shared = sum(bool(outcome.same_as) for outcome in found)
    lines = [
        "Accuracies are of the test rows, in percent; changes are points against the unpruned parent on the same rows, "
        "with 95 % intervals of a paired bootstrap over groups of rows that are not independent (mail threads, source "
        "sentences). A method that draws numbers runs with three seeds, of which the tables say how many there was "
        "time for: its figure is their mean, and its interval draws seeds too, so that it holds what those few show. "
        "All others run once. Every layer keeps the same number of experts; options are the methods' defaults but "
        "where the last section says otherwise. No child was trained after the cut, except in the table that says so.",
        "",
        "| task | parent | test rows | groups | experts per layer | stored bytes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for p in parents:
        experts = ", ".join(map(str, p.experts))
        groups = len(set(p.groups)) if any(p.groups) else p.rows
        lines.append(f"| {p.task} | {100 * p.accuracy:.1f} | {p.rows:,} | {groups:,} | {experts} | {p.bytes:,} |")
    lines += [
        "",
        f"{len(found)} of {len(cells)} cells were measured, which took {minutes:.0f} minutes of work in one run or in "
        "several that went on from each other, on a machine that others used too; "
        f"{shared} of them are children that another cell had made already, to the bit. "
        f"{'; '.join(sorted({p.setting for p in parents}))}.",
    ]
    return "\n".join(lines)


def duels(parents: Sequence[Parent], outcomes: Outcomes, ratios: Sequence[float]) -> str:
    """Router-norm change less its baselines, where both mean the same by a cut expert; then what follows, in words."""
    lines = ["| task | cut experts | against | " + _heads(ratios), "| --- | --- | --- |" + " --- |" * len(ratios)]
    said: dict[tuple[str, str], list[tuple[str, float, Contrast]]] = {}
    for parent in parents:
        for semantics in ("zero", "slice"):
            for rival in (CHANCE, USAGE):
                row = []
                for ratio in ratios:
                    ours = seeds_of(outcomes, parent.task, FLAGSHIP, semantics, ratio)
                    theirs = seeds_of(outcomes, parent.task, rival, semantics, ratio)
                    if not ours or not theirs:
                        row.append("")
                        continue
                    result = against(ours, theirs, parent)
                    row.append(f"{points(result, 2)} **{result.verdict}**")
                    said.setdefault((rival, semantics), []).append((parent.task, ratio, result))
                lines.append(f"| {parent.task} | `{semantics}` | {rival} | {' | '.join(row)} |")
    lines.append("")
    lines += [f"- {verdict_line(rival, semantics, found)}" for (rival, semantics), found in said.items()]
    lines += [f"- {line}" for parent in parents for line in indifferent(parent, outcomes, ratios)]
    tests = sum(len(found) for found in said.values())
    lines.append(
        f"- These are {tests} intervals of 95 %: were there no difference at all, about {0.025 * tests:.1f} would be "
        "behind and as many ahead."
    )
    return "\n".join(lines)


def verdict_line(rival: str, semantics: str, found: Sequence[tuple[str, float, Contrast]]) -> str:
    """Where router-norm change is ahead, tied, behind, in one sentence."""
    parts = []
    for verdict in ("behind", "tied", "ahead"):
        where: dict[str, list[str]] = {}
        for task, ratio, result in found:
            if result.verdict == verdict:
                where.setdefault(task, []).append(f"{ratio:g}")
        count = sum(map(len, where.values()))
        listed = "; ".join(f"{task} at {_joined(ratios)}" for task, ratios in where.items())
        parts.append(f"{verdict} in {count} ({listed})" if where else f"{verdict} nowhere")
    return f"Against {rival} under `{semantics}`, of {len(found)} comparisons: {', '.join(parts)}."


def indifferent(parent: Parent, outcomes: Outcomes, ratios: Sequence[float]) -> list[str]:
    """A sentence for a task on which chance itself loses nothing, so that no method can be told from another."""
    lines = []
    for semantics in ("zero", "slice"):
        found = {ratio: seeds_of(outcomes, parent.task, CHANCE, semantics, ratio) for ratio in ratios}
        lost = [ratio for ratio, drawn in found.items() if drawn and against_parent(drawn, parent).verdict == "behind"]
        if all(found.values()) and not lost:
            lines.append(
                f"On {parent.task} under `{semantics}`, random cuts themselves lose nothing that their interval can "
                "tell from nothing, at any ratio: there is no lead to be had over them, only a loss to be avoided."
            )
    return lines


def _task_section(parent: Parent, outcomes: Outcomes, ratios: Sequence[float]) -> str:
    kinds = dict.fromkeys((c.method, c.semantics) for c in outcomes if c.task == parent.task and not c.recovered)
    rows = []
    better: dict[float, list[str]] = {}
    for method, semantics in kinds:
        row, total = [], 0.0
        for ratio in ratios:
            found = seeds_of(outcomes, parent.task, method, semantics, ratio)
            row.append(points(against_parent(found, parent)) if found else "")
            total += sum(o.accuracy for o in found) / len(found) if found else 0.0
            ours = seeds_of(outcomes, parent.task, FLAGSHIP, "zero", ratio)
            if found and ours and method != FLAGSHIP and against(ours, found, parent).verdict == "behind":
                better.setdefault(ratio, []).append(f"{method} ({semantics})")
        complete = all(row)
        seeds = max(len(seeds_of(outcomes, parent.task, method, semantics, ratio)) for ratio in ratios)
        star = "*" if method in STAND_INS else ""
        rows.append((-total if complete else 1.0, f"| {method}{star} | `{semantics}` | {seeds} | {' | '.join(row)} |"))
    lines = [
        f"### {parent.task}, parent {100 * parent.accuracy:.1f}",
        "",
        f"![Accuracy against keep ratio, {parent.task}](results-{parent.task}.png)",
        "",
        "| method | cut experts | seeds, at most | " + _heads(ratios),
        "| --- | --- | --- |" + " --- |" * len(ratios),
        *(line for _, line in sorted(rows)),
        "",
    ]
    for ratio in ratios:
        names = _joined(better.get(ratio, [])) or "nothing"
        lines.append(f"- Ahead of router-norm change (`zero`) at {ratio:g}, by interval: {names}.")
    return "\n".join(lines)


def recovery_table(parents: Sequence[Parent], outcomes: Outcomes) -> str:
    """Gap to the parent before and after training again, and whether half of a gap worth closing is closed."""
    lines = [
        "One pass over the task's train rows, but at least 200 steps, with the parent as teacher: `secateur recover` "
        "at its defaults, for one or two methods of each meaning of cut experts, at keep ratios of "
        f"{_joined(f'{ratio:g}' for ratio in RECOVERED_RATIOS)}, where the cut lost over a point. The rows are those "
        "that the parent was trained on: more of its own fine-tuning might gain some of this too.",
        "",
        "| task | method | cut experts | keep | before | after | of the gap closed | at least half? |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    verdicts: Counter[str] = Counter()
    for parent in parents:
        for cell, outcome in outcomes.items():
            if cell.task != parent.task or not cell.recovered or outcome.refused:
                continue
            cut = outcomes.get(replace(cell, recovered=False))
            if cut is None or is_settled(cell, outcomes, parent):
                continue
            before, after = (against_parent([o], parent) for o in (cut, outcome))
            share = 1 - after.difference / before.difference
            verdict = "yes" if share >= 0.5 else "NO"
            verdicts[verdict] += 1
            lines.append(
                f"| {cell.task} | {cell.method} | `{cell.semantics}` | {cell.ratio:g} | {points(before)} | "
                f"{points(after)} | {100 * share:.0f} % | {verdict} |"
            )
    if not verdicts:
        return "Nothing was trained again in the time that there was."
    lines += ["", f"Gaps over one point: {verdicts['yes']} closed by half or more, {verdicts['NO']} not."]
    return "\n".join(lines)


def size_table(parents: Sequence[Parent], outcomes: Outcomes, ratios: Sequence[float]) -> str:
    """Stored bytes over the parent's, and kept slots where cut experts leave their rows behind."""
    lines = [
        "Stored bytes over the parent's, and in brackets, where rows of cut experts stay in the router, the share of "
        "(token, choice) pairs of the test rows that still run an expert. Methods with equal figures share a line.",
        "",
        "| task | method | cut experts | " + _heads(ratios),
        "| --- | --- | --- |" + " --- |" * len(ratios),
    ]
    for parent in parents:
        same: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        kinds = dict.fromkeys((c.method, c.semantics) for c in outcomes if c.task == parent.task and not c.recovered)
        for method, semantics in kinds:
            row = []
            for ratio in ratios:
                found = seeds_of(outcomes, parent.task, method, semantics, ratio)
                if not found:
                    row.append("")
                    continue
                slots = sum(o.kept_slots for o in found) / len(found)
                shown = f" ({100 * slots:.0f} %)" if semantics in ("zero", "constant") else ""
                row.append(f"{100 * found[0].bytes / parent.bytes:.0f} %{shown}")
            same.setdefault((semantics, tuple(row)), []).append(method)
        lines += [
            f"| {parent.task} | {', '.join(methods)} | `{semantics}` | {' | '.join(row)} |"
            for (semantics, row), methods in same.items()
        ]
    return "\n".join(lines)


def _published_section(parents: Sequence[Parent], outcomes: Outcomes) -> list[str]:
    """The published figure's shape, for parents with its eight experts per layer."""
    eights = [parent for parent in parents if set(parent.experts) == {8}]
    if not eights:
        return []
    lines = [
        "arXiv 2405.16646 cuts 2, 4 and 6 of 8 experts of V-MoE B/16. Its figures, read off the authors' plot (to "
        "about half a point), are router-norm change / their importance score; ours are router-norm change / "
        "frequency, both `zero`. Models and tasks differ: only the shape can be compared.",
        "",
        "| cut of 8 | CIFAR-10 | CIFAR-100 | ImageNet | " + " | ".join(f"{p.task} (ours)" for p in eights) + " |",
        "| --- |" + " --- |" * (3 + len(eights)),
    ]
    for cut, published in PUBLISHED.items():
        ours = [_pair(parent, outcomes, 1 - cut / 8) if cut else f"{100 * parent.accuracy:.1f}" for parent in eights]
        lines.append(f"| {cut} | {' | '.join(published)} | {' | '.join(ours)} |")
    return ["## The published figure", "\n".join(lines)]


def _pair(parent: Parent, outcomes: Outcomes, ratio: float) -> str:
    shown = []
    for method in (FLAGSHIP, USAGE):
        found = seeds_of(outcomes, parent.task, method, "zero", ratio)
        shown.append(f"{100 * found[0].accuracy:.1f}" if found else "?")
    return " / ".join(shown)


def left_out(cells: Sequence[Cell], outcomes: Outcomes, absent: Sequence[str] = ()) -> str:
    """What was refused, what did not fit into the time, what ran with less than its defaults."""
    lines = [
        f"- Formulas of papers that could not be read are stood in for in the methods marked *: {_joined(STAND_INS)}.",
        "- premoe-union of one task is task-mass, by construction.",
        "- moe-pruner keeps every expert and the given share of each one's weights.",
    ]
    for method, options in CHEAPER.items():
        set_to = " ".join(f"{name}={value}" for name, value in options.items())
        lines.append(f"- {method} ran with {set_to}, which is less than its defaults.")
    lines += [f"- {task}: there was no trained parent (`secateur demo build` makes it)." for task in absent]
    refused = [outcome for cell in cells if (outcome := outcomes.get(cell)) and outcome.refused]
    lines += [f"- Refused: {outcome.cell.name}: {outcome.refused}" for outcome in refused]
    missing: dict[tuple[str, str], Counter[str]] = {}
    for cell in cells:
        if cell not in outcomes:
            what = "training again" if cell.recovered else "further seeds" if cell.seed else "a first seed"
            missing.setdefault((cell.task, what), Counter())[f"{cell.method} `{cell.semantics}`"] += 1
    lines += [
        f"- No time on {task} for {what}, {found.total()} cells: "
        f"{_joined(f'{name} ({count})' for name, count in found.items())}."
        for (task, what), found in missing.items()
    ]
    return "\n".join(lines if missing else [*lines, "- Nothing was left out for lack of time."])


def points(result: Contrast, digits: int = 1) -> str:
    """-1.2 [-1.9, -0.5]"""
    middle, lower, upper = (
        f"{round(100 * value, digits) + 0.0:+.{digits}f}" for value in (result.difference, result.lower, result.upper)
    )
    return f"{middle} [{lower}, {upper}]"


def _heads(ratios: Sequence[float]) -> str:
    return " | ".join(f"keep {ratio:g}" for ratio in ratios) + " |"


def _joined(names: Iterable[str]) -> str:
    return ", ".join(names)


def plot(parent: Parent, outcomes: Outcomes, path: Path) -> None:
    """Accuracy against the keep ratio: the flagship, its baselines with the spread of chance, the rest in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    axis.axhline(100 * parent.accuracy, color="black", linewidth=0.8, linestyle=":", label="parent")
    kinds = dict.fromkeys((c.method, c.semantics) for c in outcomes if c.task == parent.task and not c.recovered)
    labels: dict[str, str | None] = {"tie": "merged (tie)", "other": "other methods"}
    for method, semantics in kinds:
        ratios = sorted(
            {c.ratio for c in outcomes if (c.task, c.method, c.semantics) == (parent.task, method, semantics)}
        )
        found = {r: f for r in ratios if (f := seeds_of(outcomes, parent.task, method, semantics, r))}
        mean = [100 * sum(o.accuracy for o in f) / len(f) for f in found.values()]
        if (method, semantics) == (CHANCE, "zero"):
            spread = [[100 * limit(o.accuracy for o in f) for f in found.values()] for limit in (min, max)]
            axis.fill_between(list(found), *spread, color="tab:orange", alpha=0.2, linewidth=0)
        style = STYLES.get((method, semantics))
        if style is not None:
            axis.plot(list(found), mean, label=f"{method}, {semantics}", zorder=3, **style)
            continue
        kind = "tie" if semantics == "tie" else "other"
        colour = "tab:purple" if kind == "tie" else "grey"
        axis.plot(list(found), mean, color=colour, linewidth=0.7, alpha=0.6, label=labels[kind])
        labels[kind] = None
    axis.set(xlabel="experts kept", ylabel="test accuracy, %", title=f"{parent.task}: accuracy against the keep ratio")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


STYLES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    (FLAGSHIP, "zero"): {"color": "tab:green", "marker": "o", "linewidth": 2},
    (FLAGSHIP, "slice"): {"color": "tab:green", "marker": "s", "linestyle": "--"},
    (CHANCE, "zero"): {"color": "tab:orange", "marker": "x"},
    (USAGE, "zero"): {"color": "tab:blue", "marker": "^"},
}
