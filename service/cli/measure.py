"""What checkpoints cost in memory, each measured in a process of its own."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.arguments import JsonFlag
from service.cli.output import percent, print_json, print_table, size

CheckpointDirs = Annotated[
    list[Path],
    typer.Argument(exists=True, file_okay=False, help="Checkpoint directories, the parent first.", metavar="DIR..."),
]


def measure(
    checkpoints: CheckpointDirs,
    device: Annotated[str, typer.Option(help="Where to load: cpu or cuda.", metavar="DEVICE")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", metavar="DTYPE")] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Load each checkpoint in a fresh process and show what it takes there, against the first one.

    \b
    Example:
      secateur measure demo/checkpoints/language/full demo/checkpoints/language/pruned
    """
    from dataclasses import asdict

    from service.cli.progress import progress_shown
    from service.measurement import measure as measured

    found = []
    with progress_shown() as progress:
        for number, checkpoint in enumerate(checkpoints):
            progress(number, len(checkpoints), f"loading {checkpoint.parent.name}/{checkpoint.name}")
            found.append((checkpoint, measured(checkpoint, device, dtype)))
        progress(len(checkpoints), len(checkpoints), "measured")
    if as_json:
        print_json([{"checkpoint": str(checkpoint), **asdict(taken)} for checkpoint, taken in found])
        return
    first = found[0][1]
    rows = [
        (
            f"{checkpoint.parent.name}/{checkpoint.name}",
            size(taken.held),
            percent(first.held - taken.held, first.held),
            size(taken.process),
            size(taken.process_peak),
            "-" if taken.device is None else size(taken.device),
            "-" if taken.device_peak is None else size(taken.device_peak),
        )
        for checkpoint, taken in found
    ]
    columns = ("checkpoint", "weights hold", "saved", "process grows", "at its peak", "device grows", "at its peak")
    print_table("memory by loading, each in a process of its own", columns, rows)
