"""The one place that decides which implementation runs, so that it can be logged and forced in tests."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import cpu, reference
from kernels.routing import Routing


@dataclass(frozen=True)
class Backend:
    """The functions of `kernels.reference` of the same names, with the same signatures."""

    name: str
    linear: Callable[..., torch.Tensor]
    route: Callable[..., Routing]
    moe_ffn: Callable[..., torch.Tensor]


BACKENDS = {
    "reference": Backend("reference", reference.linear, reference.route, reference.moe_ffn),
    "cpu": Backend("cpu", cpu.linear, cpu.route, cpu.moe_ffn),
}
FASTEST_FOR_DEVICE = {"cpu": "cpu"}


def select_backend(device: torch.device, name: str | None = None) -> Backend:
    """The named backend, or the fastest one for the device; devices without one of their own get the reference.

    Raises ValueError for an unknown name.
    """
    chosen = name or FASTEST_FOR_DEVICE.get(device.type, "reference")
    if chosen not in BACKENDS:
        raise ValueError(f"backend is {chosen!r}, must be one of {sorted(BACKENDS)}")
    return BACKENDS[chosen]
