"""The kernel benchmark's result file and what is printed and drawn from it; needs neither a GPU nor the kernels."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernel_cases import GOAL_MODELS, MODELS
from benchmarks.kernel_roofline import (
    Peaks,
    Work,
    bound,
    compute_seconds,
    floor_seconds,
    memory_seconds,
    two_launch_seconds,
)
from benchmarks.kernel_timing import Timing, is_noise

OURS = "ours"
COLUMNS = (OURS, "transformers eager", "transformers batched_mm", "transformers grouped_mm", "torch grouped_mm")
SHORT_NAMES = {
    "transformers eager": "eager",
    "transformers batched_mm": "batched",
    "transformers grouped_mm": "grouped",
}


@dataclass(frozen=True)
class Row:
    """One case. Times are microseconds per layer call; shares are of the peaks measured in the same run.

    share_memory, share_compute: least time for the bytes, for the operations, over our time. share_floor: the larger.
    share_reachable: the same against two GEMM launches, which also write and read what lies between them.
    share_datasheet: against the data sheet's bandwidth. kept_share: pairs that ran an expert over all pairs.
    active: distinct experts reached per layer. padded: rows of all tiles over rows with a pair, 1 on the pair path.
    best_other, ratio: the fastest other column and its time over ours; noise: the two cannot be told apart.
    other: why a column has no time. errors: relative L2 against float64, of every column that ran.
    """

    case: str
    model: str
    tokens: int
    semantics: str
    skewed: bool
    kept: tuple[int, ...]
    dtype: str
    path: str
    steps: int
    kept_share: float
    active: float
    padded: float
    bound: str
    share_memory: float
    share_compute: float
    share_floor: float
    share_reachable: float
    share_datasheet: float
    tflops: float
    tbps: float
    best_other: str
    ratio: float
    noise: bool
    times: dict[str, Timing]
    errors: dict[str, float]
    other: dict[str, str] = field(default_factory=dict)

    @property
    def us(self) -> float:
        return self.times[OURS].median


def figures(work: Work, times: Mapping[str, Timing], measured: Peaks, datasheet: Peaks) -> dict[str, Any]:
    """What follows from the times: shares, rates and the comparison with the best other column."""
    seconds = times[OURS].median * 1e-6
    others = {name: timing for name, timing in times.items() if name != OURS}
    best = min(others, key=lambda name: others[name].median, default="")
    return {
        "bound": bound(work, measured),
        "share_memory": memory_seconds(work, measured) / seconds,
        "share_compute": compute_seconds(work, measured) / seconds,
        "share_floor": floor_seconds(work, measured) / seconds,
        "share_reachable": two_launch_seconds(work, measured) / seconds,
        "share_datasheet": floor_seconds(work, datasheet) / seconds,
        "tflops": work.flops / seconds / 1e12,
        "tbps": work.bytes / seconds / 1e12,
        "best_other": best,
        "ratio": others[best].median / times[OURS].median if best else float("nan"),
        "noise": bool(best) and is_noise(times[OURS], others[best]),
    }


def write_line(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Append one JSON line, so that a run that is cut off leaves what it had."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **content}) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[Row], dict[str, Any]]:
    """(setting, rows, end) of a result file; a run that was cut off has an empty end."""
    setting: dict[str, Any] = {}
    end: dict[str, Any] = {}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        kind = content.pop("kind")
        if kind == "row":
            times = {name: Timing(**{**t, "medians": tuple(t["medians"])}) for name, t in content.pop("times").items()}
            rows.append(Row(**{**content, "kept": tuple(content["kept"])}, times=times))
        elif kind == "setting":
            setting = content
        else:
            end = content
    return setting, rows, end


def row_content(row: Row) -> dict[str, Any]:
    return asdict(row)


HEAD = (
    f"{'':37}{'ours':>9}  {'best other':>18}  {'eager*':>9}{'batched':>9}{'grouped':>9}{'torch':>9}"
    f"  {'memory':>6} {'compute':>7} {'reach.':>6}  {'kept':>4} {'active':>6} {'padded':>6} {'TFLOP/s':>7} {'TB/s':>5}"
)


def format_row(row: Row) -> str:
    name = f"{row.model} {row.tokens} {row.semantics}{' skewed' if row.skewed else ''}"
    ratio = f"{row.ratio:.2f}x{'~' if row.noise else ' '}{short(row.best_other)}" if row.best_other else "none"
    times = "".join(f"{row.times[c].median:9.1f}" if c in row.times else f"{'-':>9}" for c in COLUMNS[1:])
    return (
        f"{name:37}{row.us:9.1f}  {ratio:>18}  {times}"
        f"  {row.share_memory:6.0%} {row.share_compute:7.0%} {row.share_reachable:6.0%}"
        f"  {row.kept_share:4.2f} {row.active:6.1f} {row.padded:6.2f} {row.tflops:7.1f} {row.tbps:5.2f}"
    )


def short(column: str) -> str:
    return SHORT_NAMES.get(column, "torch" if column.startswith("torch") else column)


def table(setting: Mapping[str, Any], rows: Sequence[Row], end: Mapping[str, Any]) -> str:
    """Everything a reader needs: where it ran, the rows, the goals, what was left out."""
    lines = [", ".join(f"{key} {value}" for key, value in setting.items())]
    lines += ["us per layer call, median; shares of the peaks measured in this run; ~ within the spread of repeats"]
    lines += ["* eager waits for the device, so it is timed with events without a graph"]
    lines += [HEAD, *(format_row(row) for row in rows)]
    for row in rows:
        lines += [f"{row.case}: {column} {reason}" for column, reason in row.other.items() if "copies" not in reason]
    copied = sorted(row.case for row in rows if any("copies" in reason for reason in row.other.values()))
    if copied:
        lines.append(f"batched_mm was skipped in {len(copied)} rows, where it would copy more than 40 GB of weights")
    lines += goals(rows)
    refused = end.get("refused", {})
    lines += [f"REFUSED, not timed: {case}: {reason}" for case, reason in refused.items()]
    left_out = end.get("left_out", [])
    lines.append(f"left out for lack of time: {', '.join(left_out) if left_out else 'nothing'}")
    if not end:
        lines.append("this run was cut off before its end")
    return "\n".join(lines)


def goals(rows: Sequence[Row]) -> list[str]:
    """Each goal against the worst row that it speaks of; a goal without rows is said to have none."""
    full = [row for row in rows if row.semantics == "full" and not row.skewed and row.model in GOAL_MODELS]
    found = {(row.model, row.tokens, row.semantics, row.skewed): row for row in rows}
    halves = [
        (row, row.us / found[key].us)
        for row in rows
        if row.semantics in ("slice", "zero") and (key := (row.model, row.tokens, "full", row.skewed)) in found
    ]

    def worst(name: str, goal: float, values: Iterable[tuple[str, float]]) -> str:
        measured = sorted(values, key=lambda pair: pair[1])
        if not measured:
            return f"goal: {name}: not measured"
        case, value = measured[0]
        return f"goal: {name}: {value:.2f} at worst ({case}), goal {goal:.2f}: {'met' if value >= goal else 'MISSED'}"

    return [
        worst("share of memory roofline, 16-256 tokens", 0.80, _shares(full, "share_memory", 16, 256)),
        worst("share of memory roofline, 1 token", 0.65, _shares(full, "share_memory", 1, 1)),
        worst("share of the bf16 peak, 32768 tokens", 0.60, _shares(full, "share_compute", 32_768, 32_768)),
        worst("ratio to the best other column", 1.30, [(row.case, row.ratio) for row in rows if row.best_other]),
        worst(
            "half of the full time over a 50 % slice's, 64-256 tokens",  # fewer do not reach every expert
            1 / 1.1,
            [(row.case, 0.5 / r) for row, r in halves if row.semantics == "slice" and 64 <= row.tokens <= 256],
        ),
        worst(
            "kept share of the pairs (shared experts' among them) over a 50 % zero's part of the full time",
            1 / 1.1,
            [(row.case, _kept_work(row) / r) for row, r in halves if row.semantics == "zero"],
        ),
    ]


def _kept_work(row: Row) -> float:
    """The share of all expert rows that are left: shared experts are never pruned."""
    model = MODELS[row.model]
    return (row.kept_share * model.top_k + model.shared) / (model.top_k + model.shared)


def _shares(rows: Iterable[Row], name: str, least: int, most: int) -> list[tuple[str, float]]:
    return [(row.case, getattr(row, name)) for row in rows if least <= row.tokens <= most]


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Share of the roofline against tokens, one panel per model: ours pruned and not, and the best other column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [row for row in rows if not row.skewed]
    models = list(dict.fromkeys(row.model for row in plain))
    figure, axes = pyplot.subplots(1, len(models), figsize=(3.4 * len(models), 3.6), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for semantics, style in (("full", "o-"), ("slice", "s-"), ("zero", "^-")):
            line = sorted((r for r in plain if (r.model, r.semantics) == (model, semantics)), key=lambda r: r.tokens)
            tokens = [row.tokens for row in line]
            label = "ours" if semantics == "full" else f"ours, half the experts, {semantics}"
            axis.plot(tokens, [row.share_floor for row in line], style, label=label, markersize=4)
            if semantics == "full":
                others = [(row.tokens, row.share_floor / row.ratio) for row in line if row.best_other]
                axis.plot(*zip(*others, strict=True), "x--", color="grey", label="best other") if others else None
        axis.set(title=model, xscale="log", xlabel="tokens", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of the roofline measured in the same run")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
