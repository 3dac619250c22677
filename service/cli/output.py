"""What commands print: tables for people and one JSON document for programs on standard output, notes beside it."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

# Wide enough that a table in a file or a pipe is never folded; a terminal folds at its own width.
PIPE_COLUMNS = 200


def note(message: str) -> None:
    """One line for a person on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """The one document of `--json`. NaN and infinities are refused: no reader has to accept them."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = ()) -> None:
    """A table on standard output; the first column and those in `words` are left-aligned, the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and number not in words else "left")
    for row in rows:
        # Text, not str: labels and inputs are other people's and may look like markup.
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    # Not the table's own title, which would be folded at the width of the table.
    console.print(Text(title, style="bold"), table)


def size(num_bytes: int) -> str:
    """Bytes as a person reads them, in decimal units: 12345678 -> 12.3 MB."""
    value, units = float(num_bytes), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 999.95 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def interval(center: float, bounds: tuple[float, float]) -> str:
    """An estimate between its bounds, as fractions with three decimals."""
    return f"{center:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
