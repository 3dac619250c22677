"""Shared by all tests: explicit seeds, and memory that is poisoned until somebody writes it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


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
