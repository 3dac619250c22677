"""Applying plans: the smaller model against the old one with its experts silenced, merged or replaced by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.moe import BACKENDS
from kernels.reference import expert_in, expert_out
from kernels.routing import ExpertWeights, Routing
from models import memory
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import Classifier, Experts, MoELayer
from models.errors import PlanError
from models.manifest import Layer
from models.pruning.align import permuted
from models.pruning.apply import apply
from models.pruning.plan import LayerPlan, keep_best
from models.pruning.post import Neurons, Project
from models.weights import tensor_headers, weight_files

SEQUENCES = ([3, 9, 27, 1], [5], [8, 8, 8, 41, 2, 7, 13])


@pytest.fixture
def model(pristine: Path) -> Classifier:
    return load_checkpoint(pristine).model


def logits(model: Classifier) -> torch.Tensor:
    return model.classify(SEQUENCES).logits_BC


def stacks(model: Classifier, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """w_in_PGD and w_out_PDF of one layer."""
    found = model.layers[layer]
    assert isinstance(found, MoELayer)
    return found.w_in_PGD, found.w_out_PDF


def plans(semantics: Any, **options: Any) -> dict[int, LayerPlan]:
    """Layer 0 keeps experts 1 and 2, layer 1 keeps 0, 2 and 3: uneven on purpose."""
    return {0: keep_best([0, 9, 8, 1], 2, semantics), 1: keep_best([5, 1, 6, 7], 3, semantics)}


def test_keeping_all_gives_identical_weights(model: Classifier) -> None:
    for semantics in ("slice", "zero"):
        same = apply(model, {i: keep_best([1, 2, 3, 4], 4, semantics) for i in (0, 1)})
        for (name, old), (_, new) in zip(model.named_parameters(), same.named_parameters(), strict=True):
            assert torch.equal(old, new), name
        assert torch.equal(logits(model), logits(same))


def test_zero_equals_the_parent_with_those_outputs_forced_to_zero(model: Classifier) -> None:
    pruned = logits(apply(model, plans("zero")))
    with torch.no_grad():
        for layer, dropped in ((0, [0, 3]), (1, [1])):
            model.layers[layer].w_out_PDF[dropped] = 0.0  # type: ignore[operator]
    torch.testing.assert_close(pruned, logits(model), rtol=1e-5, atol=1e-6)


def test_slice_equals_the_parent_with_those_logits_at_minus_infinity(model: Classifier) -> None:
    pruned = apply(model, plans("slice"))
    assert [layer.num_rows for layer in pruned.config.layers] == [2, 3]
    for layer, dropped in ((0, [0, 3]), (1, [1])):
        hide_rows(model, layer, dropped)
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-6)


def hide_rows(model: Classifier, layer: int, dropped: list[int]) -> None:
    """Make the backend see -inf-like logits for these rows of this layer."""
    plain = model.backend
    table = model.layers[layer].table_VE

    def route(logits_TE: torch.Tensor, table_VE: torch.Tensor, policy: Any) -> Any:
        if table_VE is table:
            logits_TE = logits_TE.clone()
            logits_TE[:, dropped] = -1e30
        return plain.route(logits_TE, table_VE, policy)

    model.backend = replace(plain, route=route)


def test_dropped_slots_are_counted(model: Classifier) -> None:
    output = apply(model, plans("zero")).classify(SEQUENCES)
    # layer 0 routes all 12 tokens, layer 1 only the 3 last ones; top-2 each
    assert output.routed_slots == 2 * (12 + 3)
    assert 0 < output.dropped_slots < output.routed_slots
    assert model.classify(SEQUENCES).dropped_slots == 0
    assert apply(model, plans("slice")).classify(SEQUENCES).dropped_slots == 0


def test_merging_equal_experts_under_tie_changes_nothing(model: Classifier) -> None:
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


def test_constant_with_zero_vectors_equals_zero(model: Classifier) -> None:
    zero = keep_best([0, 9, 8, 1], 2, "zero")
    constant = LayerPlan(zero.mix_KE, zero.route_E, "constant", const_ED=np.zeros((4, 16), dtype=np.float32))
    silent, dropped = apply(model, {0: constant}), apply(model, {0: zero})
    torch.testing.assert_close(logits(silent), logits(dropped), rtol=1e-6, atol=1e-7)
    assert silent.classify(SEQUENCES).dropped_slots == dropped.classify(SEQUENCES).dropped_slots


def test_constant_adds_its_vector(model: Classifier) -> None:
    zero = keep_best([0, 9, 8, 1], 2, "zero")
    ones = LayerPlan(zero.mix_KE, zero.route_E, "constant", const_ED=np.ones((4, 16), dtype=np.float32))
    assert not torch.allclose(logits(apply(model, {0: ones})), logits(apply(model, {0: zero})))


def test_slice_below_top_k_is_refused(model: Classifier) -> None:
    with pytest.raises(PlanError, match="fewer than the 2 each token chooses"):
        apply(model, {0: keep_best([1, 2, 3, 4], 1, "slice")})


def test_pruning_what_was_pruned_in_place_is_refused(model: Classifier) -> None:
    once = apply(model, plans("zero"))
    with pytest.raises(PlanError, match="prune its parent instead"):
        apply(once, {0: keep_best([1, 2], 1, "zero")})


def test_slices_can_be_sliced_again(model: Classifier) -> None:
    twice = apply(apply(model, plans("slice")), {1: keep_best([0, 2, 1], 2, "slice")})
    once = apply(model, {0: keep_best([0, 9, 8, 1], 2, "slice"), 1: keep_best([0, 0, 9, 8], 2, "slice")})
    assert torch.equal(logits(twice), logits(once))


def test_the_child_shares_what_was_not_cut_and_owns_what_was(model: Classifier) -> None:
    child = apply(model, plans("zero"))
    old, new = dict(model.named_parameters()), dict(child.named_parameters())
    assert new["embedding_VD"].data_ptr() == old["embedding_VD"].data_ptr()
    saved = memory.weight_bytes(model)["experts"] - memory.weight_bytes(child)["experts"]
    # 3 experts of 3 matrices 16 x 12 in float32
    assert saved == 3 * 3 * 16 * 12 * 4
    alone = memory.resident_bytes([child]) - memory.resident_bytes([model])
    assert alone == -saved


def simulated(
    model: Classifier, plans: dict[int, LayerPlan], outputs: Callable[[int, int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The parent, looked up token by token in float64: methods.md's definitions of the four semantics, word by word.

    outputs(layer, new slot, x) is what the new expert gives.
    """
    state: dict[str, Any] = {}

    def tap(layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts) -> None:
        state.update(layer=layer, logits_TE=logits_TE.double(), experts=experts)

    def moe_ffn(
        x_TD: torch.Tensor, routing: Routing, experts: ExpertWeights, residual_TD: Any, shared_TD: Any
    ) -> torch.Tensor:
        layer, h_TE = state["layer"], state["logits_TE"]
        plan = plans[layer]
        rows = plan.router_mix_KE if plan.router_mix_KE is not None else plan.mix_KE
        if plan.semantics == "slice":
            h_TE = h_TE @ torch.from_numpy(rows).T  # router rows are linear, and so are their mixtures
        result = torch.zeros_like(x_TD, dtype=torch.float64)
        for t in range(len(x_TD)):
            p_E = torch.softmax(h_TE[t], 0)
            chosen = sorted(range(len(p_E)), key=lambda e: (-float(p_E[e]), e))[: model.config.top_k]
            total = sum(p_E[e] for e in chosen) if model.config.normalize_top_k else 1.0
            for e in chosen:
                slot = e if plan.semantics == "slice" else int(plan.route_E[e])
                if slot >= 0:
                    result[t] += p_E[e] / total * outputs(layer, slot, x_TD[t].double())
                elif plan.semantics == "constant":
                    assert plan.const_ED is not None
                    result[t] += p_E[e] / total * torch.from_numpy(plan.const_ED[e]).double()
        result += residual_TD.double()
        if shared_TD is not None:
            result += shared_TD.double()
        return result.to(x_TD.dtype)

    plain = model.backend
    model.backend = replace(BACKENDS["reference"](), moe_ffn=moe_ffn)
    try:
        with torch.inference_mode():
            result = torch.cat([model(model.pack([ids]), tap) for ids in SEQUENCES])
    finally:
        model.backend = plain
    return result


GENERATOR = np.random.default_rng(5)
MIX = np.array([[0.3, 0, 0.7, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
CONSTANTS = GENERATOR.normal(size=(4, 16)).astype(np.float32)


def varied(semantics: Any) -> dict[int, LayerPlan]:
    """A pruning plan and, where rows may be mixed, a merge: uneven over the layers."""
    if semantics == "tie":
        merge = LayerPlan(MIX, np.array([0, 1, 0, 2]), semantics)
        other = LayerPlan(np.array([[1, 0, 0, 0], [0, 0.5, 0.25, 0.25]]), np.array([0, 1, 1, 1]), semantics)
        return {0: merge, 1: other}
    cut = replace(keep_best([0, 9, 8, 1], 2, "zero"), semantics=semantics, const_ED=CONSTANTS)
    if semantics == "slice":
        rows = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5]])
        return {0: cut, 1: LayerPlan(MIX, np.array([0, 1, 0, 2]), semantics, router_mix_KE=rows)}
    return {0: cut, 1: replace(keep_best([5, 1, 6, 7], 3, "zero"), semantics=semantics, const_ED=CONSTANTS)}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe"])
@pytest.mark.parametrize("semantics", ["slice", "zero", "tie", "constant"])
def test_what_is_applied_stored_and_loaded_is_what_the_plan_means(
    semantics: Any, family: str, make_oracle: Callable[..., Any], write_oracle: Callable[..., Path], tmp_path: Path
) -> None:
    """Mixtral divides gates by their sum, the others do not; qwen2 has a shared expert beside."""
    parent = load_checkpoint(write_oracle(make_oracle(family), tmp_path / family))
    plan = varied(semantics)
    child = apply(parent.model, plan)
    layers = tuple(
        Layer(total=4, num_experts=shape.num_experts, kept=plan[i].kept, route=shape.route_E)
        for i, shape in enumerate(child.config.layers)
    )
    stored = save_checkpoint(
        tmp_path / "child", child, parent.raw_config, parent.path / "tokenizer.json", layers, semantics=semantics
    )
    old = [tuple(stack.double() for stack in stacks(parent.model, layer)) for layer in (0, 1)]

    def mixed(layer: int, slot: int, x_D: torch.Tensor) -> torch.Tensor:
        share_E = torch.from_numpy(plan[layer].mix_KE[slot])
        w_in, w_out = (torch.tensordot(share_E, stack, dims=1) for stack in old[layer])
        return expert_out(expert_in(x_D[None], w_in), w_out)[0]

    want = simulated(parent.model, plan, mixed)
    for model in (child, stored.model):
        torch.testing.assert_close(logits(model), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    assert not torch.allclose(logits(parent.model), want, rtol=1e-3)


def test_a_merged_expert_is_stored_and_held_once(pristine: Path, tmp_path: Path) -> None:
    parent = load_checkpoint(pristine)
    plan = LayerPlan(np.array([[0.5, 0.25, 0.25, 0], [0, 0, 0, 1]]), np.array([0, 0, 0, 1]), "tie")
    child = apply(parent.model, {0: plan})
    saved = 2 * 3 * 16 * 12 * 4  # two experts of three matrices 16 x 12 in float32
    assert memory.weight_bytes(parent.model)["experts"] - memory.weight_bytes(child)["experts"] == saved
    layers = (
        Layer(total=4, num_experts=2, kept=plan.kept, route=(0, 0, 0, 1)),
        Layer(total=4, num_experts=4, kept=(), route=(0, 1, 2, 3)),
    )
    stored = save_checkpoint(
        tmp_path / "child", child, parent.raw_config, pristine / "tokenizer.json", layers, semantics="tie"
    )
    assert memory.weight_bytes(stored.model) == memory.weight_bytes(child)
    names = [name for name in tensor_headers(weight_files(tmp_path / "child")) if ".layers.0.mlp.experts." in name]
    assert {name.split("experts.")[1].split(".")[0] for name in names} == {"0", "1"}
    assert json.loads((tmp_path / "child" / "config.json").read_text())["model_type"] == "secateur"


def test_merging_a_shuffled_copy_reproduces_the_expert_if_aligned(model: Classifier) -> None:
    shuffle = np.random.default_rng(0).permutation(12)
    w_in, w_out = stacks(model)
    with torch.no_grad():
        w_in[3], w_out[3] = permuted(w_in[1], w_out[1], shuffle)
    before = logits(model)
    mix = np.array([[1, 0, 0, 0], [0, 0.25, 0, 0.75], [0, 0, 1, 0]])
    plan = LayerPlan(mix, np.array([0, 1, 2, 1]), "tie", align=True)
    torch.testing.assert_close(logits(apply(model, {0: plan})), before, rtol=1e-6, atol=1e-6)
    blurred = logits(apply(model, {0: replace(plan, align=False)}))
    assert not torch.allclose(blurred, before, rtol=1e-2)


def test_the_heaviest_member_gives_the_order_of_neurons(model: Classifier) -> None:
    """With all but no weight of the other, the merged expert is the reference's own matrix, in its own order."""
    mix = np.array([[1, 0, 0, 0], [0, 1e-9, 0, 1 - 1e-9], [0, 0, 1, 0]])
    merged = apply(model, {0: LayerPlan(mix, np.array([0, 1, 2, 1]), "tie", align=True)})
    torch.testing.assert_close(stacks(merged)[0][1], stacks(model)[0][3])


def test_projection_is_on_the_left_singular_vectors_the_members_share(model: Classifier) -> None:
    mix = np.array([[0.7, 0.3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    plan = LayerPlan(mix, np.array([0, 0, 1, 2]), "tie")
    old_in, old_out = (stack.double().numpy() for stack in stacks(model))

    def expected(matrices: list[Any], rank: int) -> Any:
        u = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)[0][:, :rank]
        return u @ u.T @ (0.7 * matrices[0] + 0.3 * matrices[1])

    for rank in (3, 12, 16, 99):
        new_in, new_out = stacks(apply(model, {0: replace(plan, post=(Project(rank, mix > 0),))}))
        gate, up = (expected([old_in[e, rows] for e in (0, 1)], rank) for rows in (slice(12), slice(12, 24)))
        np.testing.assert_allclose(new_in[0], np.concatenate((gate, up)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new_out[0], expected([old_out[e] for e in (0, 1)], rank), rtol=1e-5, atol=1e-6)
        for slot, kept in ((1, 2), (2, 3)):
            assert torch.equal(new_in[slot], stacks(model)[0][kept])
    plain, full = apply(model, {0: plan}), apply(model, {0: replace(plan, post=(Project(99, mix > 0),))})
    assert torch.equal(stacks(plain)[0], stacks(full)[0])


def test_foreign_neurons_are_averaged_into_their_places(model: Classifier) -> None:
    """New expert 0 (old 2) gets neuron 5 of expert 0 with weight 1 and neuron 7 of expert 1 with weight 2, both at
    place 4, whose own weight is 3: (3 own + 1 first + 2 second) / 6. Gate row, up row and down column alike."""
    cut = keep_best([0, 0, 9, 8], 2, "slice")
    step = Neurons(
        expert_J=np.array([0, 1]),
        neuron_J=np.array([5, 7]),
        to_J=np.array([0, 0]),
        at_J=np.array([4, 4]),
        weight_J=np.array([1.0, 2.0]),
        own_KF=np.full((2, 12), 3.0),
    )
    (old_in, old_out), (new_in, new_out) = stacks(model), stacks(apply(model, {0: replace(cut, post=(step,))}))
    for first in (0, 12):
        own, one, two = old_in[2, first + 4], old_in[0, first + 5], old_in[1, first + 7]
        torch.testing.assert_close(new_in[0, first + 4], (3 * own + one + 2 * two) / 6)
    own, one, two = old_out[2, :, 4], old_out[0, :, 5], old_out[1, :, 7]
    torch.testing.assert_close(new_out[0, :, 4], (3 * own + one + 2 * two) / 6)
    plain_in, plain_out = stacks(apply(model, {0: cut}))
    assert int(new_in.ne(plain_in).any(2).sum()) == 2
    assert int(new_out.ne(plain_out).any(1).sum()) == 1
    nothing = Neurons(*(np.zeros(0, dtype=np.int64),) * 4, np.zeros(0), np.ones((2, 12)))
    untouched = stacks(apply(model, {0: replace(cut, post=(nothing,))}))
    assert torch.equal(untouched[0], plain_in)
    assert torch.equal(untouched[1], plain_out)


def test_a_lower_k_is_one_for_all_layers_or_none(model: Classifier) -> None:
    ones = {i: keep_best([1, 2, 3, 4], 1, "slice") for i in (0, 1)}
    child = apply(model, ones, allow_lower_k=True)
    assert child.config.top_k == 1
    assert torch.isfinite(logits(child)).all()
    with pytest.raises(PlanError, match="tokens choose equally many in every layer"):
        apply(model, {0: ones[0]}, allow_lower_k=True)
    # router rows that stay let tokens choose as before
    zero = apply(model, {0: keep_best([1, 2, 3, 4], 1, "zero")}, allow_lower_k=True)
    assert zero.config.top_k == 2


def test_planned_identities_keep_every_bit_whatever_the_semantics(model: Classifier) -> None:
    with torch.no_grad():
        stacks(model)[0][0, 0, 0] = -0.0
    for semantics in ("slice", "zero", "tie", "constant"):
        plan = LayerPlan(np.eye(4), np.arange(4), semantics, align=True)
        same = apply(model, dict.fromkeys((0, 1), plan))
        for (name, old), (_, new) in zip(model.named_parameters(), same.named_parameters(), strict=True):
            assert torch.equal(old.view(torch.int32), new.view(torch.int32)), name


def test_every_family_can_be_cut_unevenly(
    make_oracle: Callable[..., Any], write_oracle: Callable[..., Path], tmp_path: Path
) -> None:
    for family in ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral"):
        parent = load_checkpoint(write_oracle(make_oracle(family), tmp_path / family)).model
        child = apply(parent, plans("zero"))
        assert torch.isfinite(logits(child)).all()
        assert not torch.allclose(logits(child), logits(parent))
