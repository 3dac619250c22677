"""What one checkpoint costs in a fresh process: `python -m service.measurement CHECKPOINT DEVICE DTYPE`.

In a process that has loaded anything before, freed memory stays with the allocator and hides what the next model takes.
"""

import gc
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from models.errors import CheckpointError, DataError

SMAPS = Path("/proc/self/smaps_rollup")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Measured:
    """Bytes. weights: numel * itemsize; held: the storages behind them; resident: buffers as well.

    process: growth of the proportional set size by loading, the model's pages and nothing shared; process_peak: the
    highest resident size on the way, over that before. device, device_peak: the CUDA allocator's growth, None on a CPU.
    """

    weights: int
    held: int
    resident: int
    process: int
    process_peak: int
    device: int | None
    device_peak: int | None


def measure(checkpoint: Path, device: str, dtype: str) -> Measured:
    """Load a checkpoint in a process of its own and measure there. Raises CheckpointError, or DataError off Linux."""
    if not SMAPS.is_file():
        raise DataError("measuring a process needs Linux: there is no /proc/self/smaps_rollup here")
    command = [sys.executable, "-m", "service.measurement", str(checkpoint.absolute()), device, dtype]
    root = Path(__file__).resolve().parents[1]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise CheckpointError(f"{checkpoint} could not be measured: {ran.stderr.strip().splitlines()[-1]}")
    return Measured(**json.loads(ran.stdout))


def _kilobytes(file: Path, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _measure_here(checkpoint: Path, device: str, dtype: str) -> Measured:
    import torch

    from models.checkpoint import load_checkpoint
    from models.memory import held_bytes, resident_bytes, weight_bytes
    from service.device_memory import allocated_bytes

    torch.zeros(1, device=device)  # the device's own context is not the model's
    before, pages, most = allocated_bytes(device), _kilobytes(SMAPS, "Pss"), _kilobytes(STATUS, "VmHWM")
    model = load_checkpoint(checkpoint, device=device, dtype=dtype).model
    gc.collect()
    after = allocated_bytes(device)
    return Measured(
        weights=sum(weight_bytes(model).values()),
        held=held_bytes(model),
        resident=resident_bytes([model]),
        process=_kilobytes(SMAPS, "Pss") - pages,
        process_peak=_kilobytes(STATUS, "VmHWM") - most,
        device=None if after is None or before is None else after - before,
        device_peak=None if before is None else torch.cuda.max_memory_allocated(device) - before,
    )


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(_measure_here(Path(sys.argv[1]), *sys.argv[2:]))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
