"""Parameters that several commands share, declared once."""

from pathlib import Path
from typing import Annotated

import typer

from models.errors import PlanError


def must_be_new(path: Path) -> Path:
    """Refuse an output that exists before any work is done for it."""
    if path.exists():
        raise typer.BadParameter(f"{path} exists already: choose another or remove it")
    return path


def parse_keep(text: str) -> int | float:
    """`8` keeps eight experts per layer; `0.5`, with a point, keeps half of them. Raises PlanError for all else."""
    try:
        number: int | float = float(text) if "." in text else int(text)
    except ValueError:
        number = 0
    if not number > 0 or ("." in text and number > 1):
        raise PlanError(f"--keep is {text!r}, must be a count such as 8 or a ratio with a point such as 0.5")
    return number


CheckpointDir = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A checkpoint directory.")]
CheckpointDirs = Annotated[
    list[Path], typer.Argument(exists=True, file_okay=False, help="Checkpoint directories, the parent first.")
]
NewDirectory = Annotated[
    Path, typer.Option(help="The directory to write; it must not exist.", metavar="DIR", callback=must_be_new)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
