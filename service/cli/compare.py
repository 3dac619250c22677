"""Hold a candidate against its control on labelled rows, one at a time and in turns."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.arguments import CheckpointDir, JsonFlag
from service.cli.evaluate import Split
from service.cli.output import print_json, print_table
from service.cli.progress import progress_shown

if TYPE_CHECKING:
    from service.comparing import Compared, Timing


def compare(
    control: CheckpointDir,
    candidate: CheckpointDir,
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Labelled rows: .jsonl[.gz] or .csv; .npz.")],
    split: Annotated[Split, typer.Option(help="Rows to use, if the file has splits.")] = Split.TEST,
    margin: Annotated[
        float, typer.Option(min=0.0001, max=0.4999, help="Accuracy that may be lost, a fraction.")
    ] = 0.01,
    as_json: JsonFlag = False,
) -> None:
    """Accuracy and time of two checkpoints on the same rows: is the candidate worse, and is it faster?

    Rows run one by one, the order of the two turning with each row, so that neither always meets warm caches. For a
    sample that is complete; experiments on live traffic use bounds that hold at every look instead.

    \b
    Example:
      secateur compare demo/checkpoints/digits/full demo/checkpoints/digits/pruned --data demo/data/mnist_5k.npz
    """
    from dataclasses import asdict

    from models.checkpoint import load_checkpoint
    from models.dataset import read_rows
    from service.comparing import compare as compared

    rows = read_rows(data, None if split is Split.ALL else split.value)
    with progress_shown() as progress:
        found = compared(load_checkpoint(control), load_checkpoint(candidate), rows, margin, progress)
    if as_json:
        print_json(asdict(found))
    else:
        _print(found)


def _print(found: "Compared") -> None:
    word = "not worse" if found.is_non_inferior else "not shown to be not worse"
    rows = [
        ("accuracy of the control, %", f"{100 * found.control_accuracy:.2f}"),
        ("accuracy of the candidate, %", f"{100 * found.candidate_accuracy:.2f}"),
        ("only the control is right", f"{found.only_control:,}"),
        ("only the candidate is right", f"{found.only_candidate:,}"),
        ("difference, points", _between(100 * found.difference, [100 * bound for bound in found.interval], "+.2f")),
        ("p, exact McNemar", f"{found.p_value:.3g}"),
        (f"by {100 * found.margin:g} points or more", word),
        ("same label, %", _between(100 * found.agreement, [100 * bound for bound in found.agreement_interval], ".2f")),
    ]
    print_table(f"{found.rows:,} rows, 95 % intervals", ("", "value"), rows)
    columns = ("one row at a time", "control, ms", "candidate, ms", "candidate / control")
    print_table("forward pass", columns, [_timed(timing) for timing in found.timings])


def _timed(timing: "Timing") -> tuple[str, ...]:
    return (
        f"p{100 * timing.quantile:g}",
        _between(timing.control_ms, timing.control_interval, ".2f"),
        _between(timing.candidate_ms, timing.candidate_interval, ".2f"),
        _between(timing.ratio, timing.ratio_interval, ".3f"),
    )


def _between(value: float, bounds: "tuple[float | None, ...] | list[float]", form: str) -> str:
    ends = ", ".join("-" if bound is None else f"{bound:{form}}" for bound in bounds)
    return f"{value:{form}} [{ends}]"
