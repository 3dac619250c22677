"""The one place that decides which implementation runs, so that the choice can be logged and forced."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from kernels import cpu, reference
from kernels.routing import Routing

logger = logging.getLogger("secateur.kernels")

# Before this, no bfloat16 tensor cores and no asynchronous copies, which the Triton kernels are built on.
OLDEST_CAPABILITY = (8, 0)
FASTEST_FOR_DEVICE = {"cpu": "cpu", "cuda": "triton"}


@dataclass(frozen=True)
class Backend:
    """The functions of `kernels.reference` of the same names, with the same signatures."""

    name: str
    linear: Callable[..., torch.Tensor]
    route: Callable[..., Routing]
    remap: Callable[..., Routing]
    moe_ffn: Callable[..., torch.Tensor]
    version: str = ""


@cache
def _reference() -> Backend:
    return Backend("reference", reference.linear, reference.route, reference.remap, reference.moe_ffn)


@cache
def _cpu() -> Backend:
    return Backend("cpu", cpu.linear, cpu.route, reference.remap, cpu.moe_ffn)


@cache
def _triton() -> Backend:
    import triton

    from kernels import gpu

    return Backend("triton", gpu.linear, gpu.route, gpu.remap, gpu.moe_ffn, triton.__version__)


# Loaders, not backends: Triton is an optional dependency, imported when it is chosen.
BACKENDS: dict[str, Callable[[], Backend]] = {"reference": _reference, "cpu": _cpu, "triton": _triton}


def select_backend(device: torch.device, name: str | None = None) -> Backend:
    """The named backend, or the fastest one for the device; what has none of its own gets the reference.

    The choice is logged once per device. Raises ValueError for an unknown name and for a named backend that cannot run
    on the device; if it was not named, the reference takes its place, with a warning.
    """
    chosen = name or FASTEST_FOR_DEVICE.get(device.type, "reference")
    if chosen not in BACKENDS:
        raise ValueError(f"backend is {chosen!r}, must be one of {sorted(BACKENDS)}")
    obstacle = _obstacle(chosen, device)
    if obstacle is not None:
        if name is not None:
            raise ValueError(f"backend {name} cannot run on {device}: {obstacle}")
        chosen = "reference"
    backend = BACKENDS[chosen]()
    if device.type != "meta":  # which computes nothing: pruning fills such models with tensors of other devices
        _log_choice(device, backend, obstacle)
    return backend


def _obstacle(name: str, device: torch.device) -> str | None:
    """Why the backend cannot run on the device, and what to do about it; None if it can."""
    if name == "cpu" and device.type != "cpu":
        return "it computes on the CPU only, choose triton or reference"
    if name != "triton":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device, check the driver or choose the device cpu"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{_described(device)} is too old, sm_80 (A100, 2020) or newer is needed; choose reference"
    try:
        import triton

        _triton()
    except ImportError as error:
        return f"triton cannot be imported ({error}), install the extra `gpu`: pip install -e '.[gpu]'"
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return "it needs a CUDA device (or a CPU and TRITON_INTERPRET=1, which is for tests), choose reference"


@cache
def _log_choice(device: torch.device, backend: Backend, obstacle: str | None) -> None:
    if obstacle is not None:
        logger.warning("no triton on %s: %s; the slow reference runs instead", device, obstacle)
    logger.info("experts on %s run through %s", _described(device), f"{backend.name} {backend.version}".strip())


def _described(device: torch.device) -> str:
    """The device with its kind: `cuda:0 (NVIDIA H100, sm_90)`, `cpu (AVX512)`."""
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"
    if device.type == "cpu":
        return f"{device} ({torch.backends.cpu.get_cpu_capability()})"
    return str(device)
