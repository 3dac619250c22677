"""Parameters that several commands share, declared once."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from models.errors import PlanError

SIZES = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "kiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def must_be_new(path: Path) -> Path:
    """Refuse an output that exists before any work is done for it."""
    if path.exists():
        raise typer.BadParameter(f"{path} exists already: choose another or remove it")
    return path


def parse_keep(text: str) -> int | float | tuple[int, ...]:
    """`8` keeps eight experts per layer, `0.5`, with a point, half of them, `4,8` four in the first layer with experts
    and eight in the next. Raises PlanError for all else."""
    try:
        keep: int | float | tuple[int, ...]
        if "," in text:
            keep = tuple(int(count) for count in text.split(","))
        else:
            keep = float(text) if "." in text else int(text)
    except ValueError:
        keep = 0
    counts = keep if isinstance(keep, tuple) else (keep,)
    if not all(count > 0 for count in counts) or (isinstance(keep, float) and keep > 1):
        raise PlanError(
            f"--keep is {text!r}, must be a count such as 8, a ratio with a point such as 0.5, "
            "or a count for each layer such as 4,8"
        )
    return keep


def parse_bytes(text: str) -> int:
    """`5000000`, `5MB`, `4.5 MiB`. Raises PlanError for what is no size above 0."""
    match = re.fullmatch(r"([0-9.]+) ?(|[kMG]i?B)", text.strip())
    try:
        value = float(match[1]) * SIZES[match[2]] if match else 0.0
    except ValueError:
        value = 0.0
    if value < 1:
        raise PlanError(f"--budget is {text!r}, must be a number of bytes such as 5000000, 5MB or 4.5MiB")
    return int(value)


def parse_layers(text: str) -> tuple[int, ...]:
    """`0,3`: layer numbers. Raises PlanError for anything else."""
    try:
        return tuple(sorted({int(layer) for layer in text.split(",")})) if text.strip() else ()
    except ValueError:
        raise PlanError(f"--exempt is {text!r}, must be layer numbers such as 0,3") from None


def parse_protected(text: str) -> dict[int, tuple[int, ...]]:
    """`0:5,2:1`: expert 5 of layer 0 and expert 1 of layer 2. Raises PlanError for anything else."""
    experts: dict[int, set[int]] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+):(\d+)", pair)
        if not match:
            raise PlanError(f"--protect is {text!r}, must be pairs layer:expert such as 0:5,2:1")
        experts.setdefault(int(match[1]), set()).add(int(match[2]))
    return {layer: tuple(sorted(ids)) for layer, ids in sorted(experts.items())}


def parse_options(texts: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` each, a name once. Raises PlanError for anything else."""
    options: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise PlanError(f"--option is {text!r}, must be NAME=VALUE")
        if name in options:
            raise PlanError(f"--option {name} is given twice")
        options[name] = value
    return options


CheckpointDir = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A checkpoint directory.")]
CheckpointDirs = Annotated[
    list[Path], typer.Argument(exists=True, file_okay=False, help="Checkpoint directories, the parent first.")
]
NewDirectory = Annotated[
    Path, typer.Option(help="The directory to write; it must not exist.", metavar="DIR", callback=must_be_new)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
