"""Applying plans: the smaller model against the old one with its experts silenced, merged or replaced by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import memory
from models.checkpoint import load_checkpoint
from models.decoder import MoEClassifier
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.plan import LayerPlan, keep_best

SEQUENCES = ([3, 9, 27, 1], [5], [8, 8, 8, 41, 2, 7, 13])


@pytest.fixture
def model(pristine: Path) -> MoEClassifier:
    return load_checkpoint(pristine).model


def logits(model: MoEClassifier) -> torch.Tensor:
    return model.classify(SEQUENCES).logits_BC


def plans(semantics: Any, **options: Any) -> dict[int, LayerPlan]:
    """Layer 0 keeps experts 1 and 2, layer 1 keeps 0, 2 and 3: uneven on purpose."""
    return {0: keep_best([0, 9, 8, 1], 2, semantics), 1: keep_best([5, 1, 6, 7], 3, semantics)}


def test_keeping_all_gives_identical_weights(model: MoEClassifier) -> None:
    for semantics in ("slice", "zero"):
        same = apply(model, {i: keep_best([1, 2, 3, 4], 4, semantics) for i in (0, 1)})
        for (name, old), (_, new) in zip(model.named_parameters(), same.named_parameters(), strict=True):
            assert torch.equal(old, new), name
        assert torch.equal(logits(model), logits(same))


def test_zero_equals_the_parent_with_those_outputs_forced_to_zero(model: MoEClassifier) -> None:
    pruned = logits(apply(model, plans("zero")))
    with torch.no_grad():
        for layer, dropped in ((0, [0, 3]), (1, [1])):
            model.layers[layer].w_out_PDF[dropped] = 0.0  # type: ignore[operator]
    torch.testing.assert_close(pruned, logits(model), rtol=1e-5, atol=1e-6)


def test_slice_equals_the_parent_with_those_logits_at_minus_infinity(model: MoEClassifier) -> None:
    pruned = apply(model, plans("slice"))
    assert [layer.num_rows for layer in pruned.config.layers] == [2, 3]
    for layer, dropped in ((0, [0, 3]), (1, [1])):
        hide_rows(model, layer, dropped)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-6)


def hide_rows(model: MoEClassifier, layer: int, dropped: list[int]) -> None:
    """Make the backend see -inf-like logits for these rows of this layer."""
    from dataclasses import replace

    from kernels.moe import Backend

    plain = model.backend
    table = model.layers[layer].table_VE

    def route(logits_TE: torch.Tensor, table_VE: torch.Tensor, policy: Any) -> Any:
        if table_VE is table:
            logits_TE = logits_TE.clone()
            logits_TE[:, dropped] = -1e30
        return plain.route(logits_TE, table_VE, policy)

    model.backend = replace(plain, route=route) if isinstance(plain, Backend) else plain


def test_dropped_slots_are_counted(model: MoEClassifier) -> None:
    output = apply(model, plans("zero")).classify(SEQUENCES)
    # layer 0 routes all 12 tokens, layer 1 only the 3 last ones; top-2 each
    assert output.routed_slots == 2 * (12 + 3)
    assert 0 < output.dropped_slots < output.routed_slots
    assert model.classify(SEQUENCES).dropped_slots == 0
    assert apply(model, plans("slice")).classify(SEQUENCES).dropped_slots == 0


def test_merging_equal_experts_under_tie_changes_nothing(model: MoEClassifier) -> None:
    before_copy = logits(model)
    with torch.no_grad():
        for name in ("w_in_PGD", "w_out_PDF"):
            weight = getattr(model.layers[0], name)
            weight[3] = weight[1]
    equal = logits(model)
    assert not torch.allclose(before_copy, equal)
    mix = np.array([[1, 0, 0, 0], [0, 0.25, 0, 0.75], [0, 0, 1, 0]])
    merged = apply(model, {0: LayerPlan(mix, np.array([0, 1, 2, 1]), "tie")})
    assert merged.config.layers[0].num_experts == 3
    torch.testing.assert_close(logits(merged), equal, rtol=1e-5, atol=1e-6)


def test_constant_with_zero_vectors_equals_zero(model: MoEClassifier) -> None:
    zero = keep_best([0, 9, 8, 1], 2, "zero")
    constant = LayerPlan(zero.mix_KE, zero.route_E, "constant", const_ED=np.zeros((4, 16), dtype=np.float32))
    silent, dropped = apply(model, {0: constant}), apply(model, {0: zero})
    torch.testing.assert_close(logits(silent), logits(dropped), rtol=1e-6, atol=1e-7)
    assert silent.classify(SEQUENCES).dropped_slots == dropped.classify(SEQUENCES).dropped_slots


def test_constant_adds_its_vector(model: MoEClassifier) -> None:
    zero = keep_best([0, 9, 8, 1], 2, "zero")
    ones = LayerPlan(zero.mix_KE, zero.route_E, "constant", const_ED=np.ones((4, 16), dtype=np.float32))
    assert not torch.allclose(logits(apply(model, {0: ones})), logits(apply(model, {0: zero})))


def test_slice_below_top_k_is_refused(model: MoEClassifier) -> None:
    with pytest.raises(PlanError, match="fewer than the 2 each token chooses"):
        apply(model, {0: keep_best([1, 2, 3, 4], 1, "slice")})


def test_pruning_what_was_pruned_in_place_is_refused(model: MoEClassifier) -> None:
    once = apply(model, plans("zero"))
    with pytest.raises(PlanError, match="prune its parent instead"):
        apply(once, {0: keep_best([1, 2], 1, "zero")})


def test_slices_can_be_sliced_again(model: MoEClassifier) -> None:
    twice = apply(apply(model, plans("slice")), {1: keep_best([0, 2, 1], 2, "slice")})
    once = apply(model, {0: keep_best([0, 9, 8, 1], 2, "slice"), 1: keep_best([0, 0, 9, 8], 2, "slice")})
    assert torch.equal(logits(twice), logits(once))


def test_the_child_shares_what_was_not_cut_and_owns_what_was(model: MoEClassifier) -> None:
    child = apply(model, plans("zero"))
    assert child.embedding_VD.data_ptr() == model.embedding_VD.data_ptr()
    saved = memory.weight_bytes(model)["experts"] - memory.weight_bytes(child)["experts"]
    # 3 experts of 3 matrices 16 x 12 in float32
    assert saved == 3 * 3 * 16 * 12 * 4
    alone = memory.resident_bytes([child]) - memory.resident_bytes([model])
    assert alone == -saved


def test_every_family_can_be_cut_unevenly(
    make_oracle: Callable[..., Any], write_oracle: Callable[..., Path], tmp_path: Path
) -> None:
    for family in ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral"):
        parent = load_checkpoint(write_oracle(make_oracle(family), tmp_path / family)).model
        child = apply(parent, plans("zero"))
        assert torch.isfinite(logits(child)).all()
        assert not torch.allclose(logits(child), logits(parent))
