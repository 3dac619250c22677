"""The demo's measured results as the README shows them, from the files that the measurements wrote."""

import json
from pathlib import Path
from typing import Any

from service.demo import BEYOND, DEMO, FEWEST, RANDOM_SEEDS, TASKS

RESULTS = DEMO / "results.json"
BASELINES = DEMO / "baselines.json"
ROWS = (
    ("full", "parent"),
    ("pruned", "router-norm change, `zero`"),
    ("slice", "router-norm change, `slice`"),
    ("recovered", "router-norm change, `zero`, recovered"),
    ("frequency", "frequency, `zero`"),
)


def results_table(results: Path = RESULTS, baselines: Path = BASELINES) -> str:
    """A Markdown table of all tasks on their test rows. Accuracies in percent with 95 % intervals."""
    measured, linear = json.loads(results.read_text()), json.loads(baselines.read_text())
    lines = [
        "| task | variant | accuracy | change against the parent | macro-F1 | parameters | slots dropped |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, variants in measured.items():
        if task in linear:
            lines.append(_line(task, "TF-IDF + linear", linear[task]))
        lines += [_line(task, label, variants[key]) for key, label in (*ROWS, *_beyond(task).items())]
        trials = [variants[f"random-{seed}"] for seed in RANDOM_SEEDS]
        low, high = (100 * f(t["accuracy"] for t in trials) for f in (min, max))
        worst, best = (100 * f(t["against_full"]["difference"] for t in trials) for f in (min, max))
        lines.append(
            f"| {task} | random, `zero`, {len(trials)} seeds | {low:.1f} to {high:.1f} | {worst:+.1f} to {best:+.1f} "
            f"| | {trials[0]['parameters']:,} | |"
        )
    return "\n".join(lines) + "\n"


def _beyond(name: str) -> dict[str, str]:
    """The deeper cuts of a task, each number of experts once."""
    (task,) = [task for task in TASKS if task.name == name]
    counts = {max(task.keep // share, FEWEST): f"beyond-{share}" for share in reversed(BEYOND)}
    return {counts[n]: f"router-norm change, `zero`, {n} of {task.experts}" for n in sorted(counts, reverse=True)}


def _line(task: str, label: str, figures: dict[str, Any]) -> str:
    accuracy = _percent(figures["accuracy"], figures["accuracy_interval"], "")
    against = figures.get("against_full")
    change = _percent(against["difference"], against["difference_interval"], "+") if against else ""
    parameters = f"{figures['parameters']:,}" if "parameters" in figures else ""
    dropped = f"{100 * figures['dropped_share']:.1f} %" if figures.get("dropped_share") else ""
    cells = (task, label, accuracy, change, f"{figures['macro_f1']:.3f}", parameters, dropped)
    return f"| {' | '.join(cells)} |"


def _percent(value: float, interval: tuple[float, float], sign: str) -> str:
    lower, upper = interval
    return f"{100 * value:{sign}.1f} [{100 * lower:{sign}.1f}, {100 * upper:{sign}.1f}]"
