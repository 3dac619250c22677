"""Choose the threshold of a cascade on held-out rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from service.cli.arguments import JsonFlag, must_be_new
from service.cli.output import note, print_json, print_table
from service.cli.plan import NOTHING_PASSES
from service.cli.progress import progress_shown

if TYPE_CHECKING:
    from service.cascade_calibration import Calibration
    from service.statistics.calibration import Point

AGREEMENT = 0.99
# Of all rows: lines of the table that differ by less say the same to a person. `--json` has every one.
STEP = 0.02


def _new(path: Path | None) -> Path | None:
    return None if path is None else must_be_new(path)


def calibrate_cascade(
    control: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The full model's checkpoint.")],
    candidate: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The pruned model's checkpoint.")],
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Labelled rows; only dev rows are used. A file without splits is used whole: nothing may have been "
            "trained on it.",
        ),
    ],
    agreement: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=0.99999,
            metavar="SHARE",
            help=f"Of the items that the candidate answers, this share shall get the control's answer, at 95 % "
            f"confidence. Default: {AGREEMENT}.",
        ),
    ] = None,
    cost: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="SHARE", help="Instead: the control shall answer at most this share."),
    ] = None,
    confidence: Annotated[
        Literal["probability", "dispersion"],
        typer.Option(
            help="The largest probability, or variance and entropy weighed by a fit on a quarter of the rows."
        ),
    ] = "probability",
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON document here too.", metavar="FILE", callback=_new)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curve; needs matplotlib.", metavar="FILE.png", callback=_new)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the threshold from which a pruned model's answers may stand, and print what each threshold costs.

    If none keeps the wanted agreement, the table shows why and the exit code is 3.

    \b
    Example:
      secateur calibrate-cascade demo/checkpoints/icd10/full \\
        demo/checkpoints/icd10/pruned --data demo/data/icd10.jsonl.gz
    """
    if agreement is not None and cost is not None:
        raise typer.BadParameter("give --agreement or --cost, not both")
    from models.checkpoint import load_checkpoint
    from models.dataset import read_rows
    from service.calibration_plot import save
    from service.cascade_calibration import Wanted, answers, calibrate, check_pair, in_words

    rows = read_rows(data, "dev")
    full, pruned = load_checkpoint(control), load_checkpoint(candidate)
    check_pair(full, pruned)
    wanted = Wanted(confidence, AGREEMENT if agreement is None and cost is None else agreement, cost)
    with progress_shown() as progress:
        found = calibrate(answers(full, rows, progress), answers(pruned, rows, progress), rows, wanted)
    document = _document(found, data.name, full.path.name, pruned.path.name)
    if plot is not None:
        save(found, plot)
    if out is not None:
        out.write_text(json.dumps(document, allow_nan=False, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        _print(found, data.name)
    for line in in_words(found):
        note(line)
    if found.chosen is None:
        raise typer.Exit(NOTHING_PASSES)


def _document(found: "Calibration", data: str, control: str, candidate: str) -> dict[str, Any]:
    from service.cascade_calibration import section

    names = {"data": data, "control": control, "candidate": candidate}
    return {**names, **asdict(found), "confidence": found.confidence.model_dump(), "experiment": section(found)}


def _print(found: "Calibration", data: str) -> None:
    from service.cascade_calibration import section

    print_table(
        f"a cascade on {found.rows:,} dev rows of {data}: control alone {100 * found.control_accuracy:.2f} % right, "
        f"candidate alone {100 * found.candidate_accuracy:.2f} %",
        ("threshold", "accepted", "share", "same label", "at least", "accuracy", "arithmetic", ""),
        [
            (
                str(point.threshold),
                f"{point.accepted:,}",
                f"{100 * point.share:.1f} %",
                f"{100 * (point.agreement or 0):.2f} %",
                f"{100 * point.bound:.2f} %",
                f"{100 * point.accuracy:.2f} %",
                f"{100 * point.work:.1f} %",
                "chosen" if point == found.chosen else "",
            )
            for point in _thinned(found)
        ],
    )
    if found.chosen is not None:
        print(yaml.safe_dump({"mode": "cascade", **section(found)}, sort_keys=False), end="")


def _thinned(found: "Calibration") -> "list[Point]":
    shown: list[Point] = []
    for point in found.curve:
        if not shown or point.share >= shown[-1].share + STEP or point in (found.chosen, found.curve[-1]):
            shown.append(point)
    return shown
