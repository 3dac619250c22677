"""Measure checkpoints on labelled rows and compare each with the first."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import DataError
from service.cli.arguments import CheckpointDirs, JsonFlag
from service.cli.output import interval, print_json, print_table, size
from service.cli.progress import progress_shown

if TYPE_CHECKING:
    from models.evaluate import Agreement, Evaluation


class Split(StrEnum):
    """Which rows are meant where a file says train, dev or test; a file that does not is always used whole."""

    TRAIN = "train"
    DEV = "dev"
    TEST = "test"
    ALL = "all"


def evaluate(
    checkpoints: CheckpointDirs,
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Labelled rows: .jsonl[.gz] or .csv; .npz.")],
    split: Annotated[Split, typer.Option(help="Rows to use, if the file has splits.")] = Split.TEST,
    as_json: JsonFlag = False,
) -> None:
    """Accuracy, macro-F1 and recalls with 95 % intervals; every further checkpoint is compared with the first.

    \b
    Example:
      secateur evaluate demo/checkpoints/spam/full demo/checkpoints/spam/pruned \\
        --data demo/data/spam.jsonl.gz
    """
    from models.checkpoint import load_checkpoint
    from models.dataset import read_rows
    from models.evaluate import agreement
    from models.evaluate import evaluate as measure

    rows = read_rows(data, None if split is Split.ALL else split.value)
    results: list[Evaluation] = []
    labels: tuple[str, ...] | None = None
    with progress_shown() as progress:
        for path in checkpoints:
            loaded = load_checkpoint(path)
            if labels is not None and loaded.labels != labels:
                raise DataError(f"{path.name} has other labels than {checkpoints[0].name}: they cannot be compared")
            labels = loaded.labels
            results.append(measure(loaded, rows, progress=progress))
    compared = [agreement(results[0], other) for other in results[1:]]
    if as_json:
        print_json(
            {
                "data": data.name,
                "split": split.value,
                "checkpoints": [_measured(result) for result in results],
                "against_first": [
                    {"checkpoint": other.checkpoint, **asdict(found)}
                    for other, found in zip(results[1:], compared, strict=True)
                ],
            }
        )
        return
    _print_results(results, compared, data.name)


def _measured(result: "Evaluation") -> dict[str, Any]:
    """Everything but the rows themselves: their predictions and truths belong in a program, not in a report."""
    return {key: value for key, value in asdict(result).items() if key not in ("predictions", "truth", "groups")}


def _print_results(results: "list[Evaluation]", compared: "list[Agreement]", name: str) -> None:
    print_table(
        f"{results[0].rows:,} rows of {name}, 95 % intervals in brackets",
        ("checkpoint", "accuracy", "macro-F1", "parameters", "bytes", "tokens/s", "slots cut"),
        [
            (
                result.checkpoint,
                interval(result.accuracy, result.accuracy_interval),
                f"{result.macro_f1:.3f}",
                f"{result.parameters:,}",
                size(result.bytes),
                f"{result.tokens / result.seconds:,.0f}",
                f"{100 * result.dropped_share:.1f} %",
            )
            for result in results
        ],
    )
    if compared:
        print_table(
            f"compared with {results[0].checkpoint} on the same rows",
            ("checkpoint", "same label", "accuracy difference", "only first right", "only this right"),
            [
                (
                    other.checkpoint,
                    interval(found.rate, found.interval),
                    interval(found.difference, found.difference_interval),
                    f"{found.only_a:,}",
                    f"{found.only_b:,}",
                )
                for other, found in zip(results[1:], compared, strict=True)
            ],
        )
    print_table(
        "recall by class",
        ("class", "rows", *(result.checkpoint for result in results)),
        [
            (first.label, f"{first.rows:,}", *(interval(r.recall, (r.lower, r.upper)) for r in (first, *others)))
            for first, *others in zip(*(result.recalls for result in results), strict=True)
        ],
    )
