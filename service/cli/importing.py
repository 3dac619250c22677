"""Turn another project's checkpoint into one of ours."""

from pathlib import Path
from typing import Annotated

import typer

from models.errors import DataError
from service.cli.arguments import JsonFlag, NewDirectory
from service.cli.output import note, print_json


def import_vmoe(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, metavar="FILE.npz", help="Arrays of a google-research/vmoe model."),
    ],
    out: NewDirectory,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that each token chooses: no array says it.")] = 2,
    capacity: Annotated[
        int, typer.Option(min=0, help="Tokens that each expert takes of an image, where experts choose.")
    ] = 0,
    labels: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Names of the classes, one a line; default: numbers."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a V-MoE of google-research/vmoe as a checkpoint of ours; names of arrays are as in that repository.

    \b
    Example:
      secateur import-vmoe vmoe_b16.npz --top-k 2 --labels imagenet.txt --out runs/vmoe
    """
    from models.vmoe_npz import import_vmoe as convert

    try:
        names = tuple(labels.read_text(encoding="utf-8").splitlines()) if labels is not None else ()
    except UnicodeDecodeError:
        raise DataError(f"{labels} is not UTF-8") from None
    imported = convert(file, out, top_k, capacity, names)
    if as_json:
        print_json({"out": str(out), "labels": list(imported.labels), "artifact_sha256": imported.artifact_sha256})
    else:
        note(f"verified and written to {out}")
