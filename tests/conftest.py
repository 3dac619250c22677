"""Shared by all tests: explicit seeds, memory that is poisoned until somebody writes it, Triton's interpreter.

Triton decides at the definition of a kernel whether to interpret it, so the choice is made here, before any test module
is imported: on a machine without a CUDA device, kernels run in the interpreter.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where this is unset, and warnings are errors
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors hold NaN (floats) or an index no tensor has (integers) instead of convenient zeros."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = create(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        if tensor.dtype in (torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(torch.int32).min)
        return tensor

    return wrapped
