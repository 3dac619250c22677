"""Find the smallest child that is not worse than its parent by more than a tolerance, nor than a plain cut by half."""

from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.arguments import JsonFlag, parse_bytes
from service.cli.output import note, print_json, print_table
from service.cli.progress import progress_shown

PAGE = "plan.html"
NOTHING_PASSES = 3


def plan(
    finetuned: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The checkpoint to cut.")],
    data: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Labelled rows: train rows calibrate, dev rows judge, test rows are not looked at.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Where child/, perhaps smallest/, plan.json and plan.html go. A plan begun there goes on.",
            metavar="DIR",
        ),
    ],
    pretrained: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="What fine-tuning started from.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Points of accuracy that the child may lose, with 95 % confidence.", metavar="POINTS")
    ] = 1.0,
    budget: Annotated[
        str | None, typer.Option(help="Stored bytes that the child may have at most: 5MB.", metavar="BYTES")
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Try slow methods and more ratios too; may take hours.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="For the split of the dev rows, and for methods that draw.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Search methods, semantics, allocations and ratios for the smallest child that passes, and write it.

    Passing means: on dev rows that nothing was chosen by, the one-sided 95 % bound of child minus parent is above minus
    the tolerance. Of those that pass, child/ is the smallest that is as good on all dev rows as the most faithful child
    of half the experts; if a worse one passes and is smaller, it goes to smallest/. If nothing passes, the page says
    why and the exit code is 3.

    \b
    Example:
      secateur plan --finetuned demo/checkpoints/language/full \\
        --pretrained demo/checkpoints/base --data demo/data/language.jsonl.gz \\
        --tolerance 1 --out runs/language-plan
    """
    limit = parse_bytes(budget) if budget is not None else None
    from models.pruning.planner import Request
    from models.pruning.planner import plan as search
    from service.plan_page import FRONT_COLUMNS, front_rows, render, verdict, watched_lines

    with progress_shown() as progress:
        found = search(Request(finetuned, data, out, pretrained, tolerance, limit, thorough, seed), progress)
    (out / PAGE).write_text(render(found), encoding="utf-8")
    if as_json:
        print_json(_report(found))
    else:
        print_table(f"{finetuned.name} and what stays of it", FRONT_COLUMNS, front_rows(found))
        for line in watched_lines(found):
            note(line)
    note(verdict(found))
    note(f"{out / PAGE} has the plot, and what else was tried")
    if found["chosen"] is None:
        raise typer.Exit(NOTHING_PASSES)


def _report(found: dict[str, Any]) -> dict[str, Any]:
    """Everything but the single rows."""
    return {key: value for key, value in found.items() if key not in ("measured", "latency")}
