"""Kernel tests always run on poisoned memory, and on every implementation that the machine can run."""

from collections.abc import Iterator

import pytest
import torch

from kernels.moe import BACKENDS, Backend

# torch lists what a default device applies to when it first needs the list: before poison puts other functions there.
with torch.device("cpu"):
    torch.zeros(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(poison: None) -> None:
    """A kernel that reads what it did not write meets NaN or an impossible index."""


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn. Triton's gets tensors on the GPU if there is one, else it runs in the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        yield BACKENDS[request.param]()
