"""Arithmetic per token against counts by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.architecture import build
from models.checkpoint import load_checkpoint
from models.flops import flops_per_token
from models.pruning.apply import apply
from models.pruning.plan import LayerPlan, keep_best

LENGTH = 9.0


def by_hand(width: int, heads: int, kv_heads: int, head: int, inner: int, experts: int, slots: float) -> float:
    """One layer: two for each multiplied weight, and attention to (9 + 1) / 2 tokens."""
    attention = width * (heads + 2 * kv_heads) * head + heads * head * width
    return 2 * (attention + experts * width + slots * 3 * width * inner) + 4 * heads * head * 5


def test_two_layers_by_hand(pristine: Path) -> None:
    model = load_checkpoint(pristine).model
    want = 2 * by_hand(16, 4, 2, 6, 12, 4, slots=2)
    assert flops_per_token(model, 1.0, LENGTH) == want


def test_cut_slots_cost_nothing_and_cut_rows_leave_the_router(pristine: Path) -> None:
    model = load_checkpoint(pristine).model
    zero = apply(model, {layer: keep_best([4, 3, 2, 1], 2, "zero") for layer in (0, 1)})
    assert flops_per_token(zero, 0.5, LENGTH) == 2 * by_hand(16, 4, 2, 6, 12, 4, slots=1)
    sliced = apply(model, {layer: keep_best([4, 3, 2, 1], 2, "slice") for layer in (0, 1)})
    assert flops_per_token(sliced, 1.0, LENGTH) == 2 * by_hand(16, 4, 2, 6, 12, 2, slots=2)


def test_a_constant_is_added_for_each_cut_slot(pristine: Path) -> None:
    model = load_checkpoint(pristine).model
    zero: LayerPlan = keep_best([4, 3, 2, 1], 2, "zero")
    constant = replace(zero, semantics="constant", const_ED=np.ones((4, 16), dtype=np.float32))
    plain = flops_per_token(apply(model, {0: zero}), 0.5, LENGTH)
    assert flops_per_token(apply(model, {0: constant}), 0.5, LENGTH) == plain + 2 * 16 * 2 * 0.5


def test_a_long_input_costs_more_by_attention_alone(pristine: Path) -> None:
    model = build(load_checkpoint(pristine).model.config)
    assert flops_per_token(model, 1.0, 19) - flops_per_token(model, 1.0, 9) == pytest.approx(2 * 4 * 4 * 6 * 5)
