"""MoE-Pruner: which weights go, by hand and in every group, and what is then stored, run and refused.

Legend: E experts, D model width, F expert inner width. Of one matrix: Y rows, X columns.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.compressed import CompressedExperts
from models.checkpoint import load_checkpoint
from models.classifier import Classifier, MoELayer
from models.config import Bitmask
from models.errors import PlanError
from models.pruning import METHODS
from models.pruning.apply import apply
from models.pruning.calibrate import calibrate
from models.pruning.compress import kept_values, read_pattern
from models.pruning.method import Job
from models.pruning.plan import LayerPlan
from models.pruning.post import Mask
from models.pruning.stats import Core, Inputs, LayerStats

W = torch.tensor([[1.3, 2.0, -1.6, 100.0]])
# Two tokens with these inputs and gates: gated norms 5, 3, 4, 0; without gates 7.07, 5, 5, 0.
X = np.array([[5.0, 5.0, 0.0, 0.0], [5.0, 0.0, 5.0, 0.0]])
GATE = np.array([[0.6], [0.8]])
FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")


def job(parent: Classifier, sequences: Any, statistics: bool = True, **options: Any) -> Job:
    """All experts kept; options as the command line would give them."""
    config, method = parent.config, METHODS["moe-pruner"]
    found = calibrate(parent, sequences, (Core, Inputs)) if statistics else {}
    return Job(
        parent=parent,
        stats={
            i: LayerStats(i, config.layers[i].num_rows, config.top_k, groups=found.get(i, ()))
            for i in config.moe_layers
        },
        keep={i: config.layers[i].num_rows for i in config.moe_layers},
        semantics="zero",
        options=method.read_options({name: str(value) for name, value in options.items()}),
        sequences=tuple(map(tuple, sequences)),
    )


def plans(job: Job) -> dict[int, LayerPlan]:
    return METHODS["moe-pruner"].plan(job)


def dense_of(model: Classifier, layer: int) -> Any:
    """The layer's experts with every zero written out."""
    module = model.layers[layer]
    assert isinstance(module, MoELayer)
    experts = module.experts
    return experts.dense() if isinstance(experts, CompressedExperts) else experts


def mask_of(plan: LayerPlan) -> Mask:
    (step,) = plan.post
    assert isinstance(step, Mask)
    return step


@pytest.mark.parametrize("form", [Bitmask(2, 4), read_pattern("0.5", 4)])
def test_columns_3_and_1_go_by_gated_norms_and_3_and_2_without_gates(form: Bitmask) -> None:
    """S = (6.5, 6, 6.4, 0), and for Wanda (9.19, 10, 8, 0)."""
    gated, plain = np.sqrt(((GATE * X) ** 2).sum(0)), np.sqrt((X**2).sum(0))
    assert gated == pytest.approx([5, 3, 4, 0])
    assert kept_values(W, gated, form).tolist() == [[True, False, True, False]]
    assert kept_values(W, plain, form).tolist() == [[True, True, False, False]]
    assert kept_values(W, None, form).tolist() == [[False, True, False, True]]


def test_ties_keep_the_lower_column() -> None:
    assert kept_values(torch.ones(1, 8), None, Bitmask(2, 4)).tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize(
    ("pattern", "width", "form"),
    [
        ("0.5", 12, Bitmask(6, 12)),
        ("0.3", 10, Bitmask(7, 10)),
        ("0.29", 100, Bitmask(71, 100)),  # 0.29 * 100 is 28.999999999999996
        ("0.5", 7, Bitmask(4, 7)),
        (".25", 8, Bitmask(6, 8)),
        ("2:4", 8, Bitmask(2, 4)),
        ("4:8", 8, Bitmask(4, 8)),
        ("1:4", 8, Bitmask(1, 4)),
    ],
)
def test_patterns(pattern: str, width: int, form: Bitmask) -> None:
    assert read_pattern(pattern, width) == form


@pytest.mark.parametrize("pattern", ["0", "1", "1.0", "-0.5", "0.01", "half", "4:4", "0:4", "5:4", "2:5", "nan", "0.0"])
def test_patterns_that_mean_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(PlanError, match="pattern is"):
        read_pattern(pattern, 12)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("0.5", None, None)])
def test_every_group_of_every_row_keeps_exactly_n(
    pattern: str, kept: int | None, group: int | None, sequential: bool, pristine: Path, sequences: list[list[int]]
) -> None:
    """Width 16 and inner width 12: rows of up and gate are never mixed, nor groups of neighbouring rows."""
    parent = load_checkpoint(pristine).model
    child = apply(parent, plans(job(parent, sequences, pattern=pattern, sequential=sequential)))
    for layer in (0, 1):
        old, new = dense_of(parent, layer), dense_of(child, layer)
        for before, after in ((old.w_in_PGD, new.w_in_PGD), (old.w_out_PDF, new.w_out_PDF)):
            width = before.shape[2]
            nonzero = (after != 0).unflatten(2, (-1, group or width)).sum(-1)
            assert (nonzero == (kept or width // 2)).all()
            assert torch.equal(after[after != 0], before[after != 0])


def test_what_goes_is_what_the_formula_says(pristine: Path, sequences: list[list[int]]) -> None:
    """Row by row against |W| sqrt(sum (g x)^2), sorted by numpy, for every matrix of every expert."""
    parent = load_checkpoint(pristine).model
    found = calibrate(parent, sequences, (Core, Inputs))
    child = apply(parent, plans(job(parent, sequences, pattern="0.25", sequential=False)))
    for layer in (0, 1):
        inputs = next(g for g in found[layer] if isinstance(g, Inputs))
        old, new = dense_of(parent, layer), dense_of(child, layer)
        for before, after, sums in (
            (old.w_in_PGD, new.w_in_PGD, inputs.xg2_ED),
            (old.w_out_PDF, new.w_out_PDF, inputs.ag2_EF),
        ):
            assert sums.any(1).all()
            score = np.abs(before.detach().double().numpy()) * np.sqrt(sums)[:, None, :]
            zeros = before.shape[2] // 4
            limit = np.sort(score, axis=2)[:, :, zeros : zeros + 1]
            assert np.array_equal(after.detach().numpy() != 0, score >= limit)


def test_gates_can_be_left_out(pristine: Path, sequences: list[list[int]]) -> None:
    """With gate=false the norms are of the inputs themselves: each gate is below 1, so none is smaller."""
    parent = load_checkpoint(pristine).model
    gated = plans(job(parent, sequences))
    plain = plans(job(parent, sequences, gate=False, sequential=False))
    inner, wanda = mask_of(gated[0]).inner_KD, mask_of(plain[0]).inner_KD
    assert inner is not None
    assert wanda is not None
    assert (wanda >= inner).all()
    assert (wanda > 1.01 * inner).any()


def test_later_layers_see_what_pruned_layers_send(pristine: Path, sequences: list[list[int]]) -> None:
    """Layer 1's inputs are those of a parent whose layer 0 was given zeros by hand."""
    parent = load_checkpoint(pristine).model
    at_once = plans(job(parent, sequences, sequential=False))
    in_turn = plans(job(parent, sequences))
    half = apply(parent, {0: in_turn[0]})
    by_hand = load_checkpoint(pristine).model
    zeros = dense_of(half, 0)
    with torch.no_grad():
        by_hand.layers[0].w_in_PGD.copy_(zeros.w_in_PGD)  # type: ignore[operator]
        by_hand.layers[0].w_out_PDF.copy_(zeros.w_out_PDF)  # type: ignore[operator]
    found = calibrate(by_hand, sequences, (Inputs,))
    expected = np.sqrt(next(g for g in found[1] if isinstance(g, Inputs)).xg2_ED)
    got, parents = mask_of(in_turn[1]).inner_KD, mask_of(at_once[1]).inner_KD
    assert got == pytest.approx(expected, rel=1e-5)
    assert parents is not None
    assert not np.allclose(parents, expected, rtol=1e-3)
    assert mask_of(in_turn[0]).inner_KD == pytest.approx(mask_of(at_once[0]).inner_KD, rel=1e-6)


def test_an_expert_without_tokens_is_pruned_by_size_and_named(
    pristine: Path, sequences: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "secateur.pruning")
    parent = load_checkpoint(pristine).model
    asked = job(parent, sequences, sequential=False, pattern="2:4")
    inputs, core = asked.stats[0].need(Inputs), asked.stats[0].need(Core)
    unseen = Inputs(inputs.xg2_ED.copy(), inputs.ag2_EF.copy())
    unseen.xg2_ED[2] = unseen.ag2_EF[2] = 0.0
    count = replace(core, n_E=np.array([4, 4, 0, 8]))
    child = apply(parent, plans(replace(asked, stats={**asked.stats, 0: asked.stats[0].having(unseen, count)})))
    assert "layer 0: no token reached expert 2, pruned by |W| alone" in caplog.text
    assert "layer 0: load CV 0.71" in caplog.text  # of 4, 4, 0, 8: sqrt(8) / 4
    assert caplog.text.count("no token reached") == 1
    for before, after in zip(dense_of(parent, 0).w_in_PGD[2], dense_of(child, 0).w_in_PGD[2], strict=True):
        assert torch.equal(after != 0, kept_values(before[None], None, Bitmask(2, 4))[0])


@pytest.mark.parametrize("targets", ["gate", "up,down", "down", "gate, up"])
def test_targets_alone_are_pruned(targets: str, pristine: Path, sequences: list[list[int]]) -> None:
    parent = load_checkpoint(pristine).model
    child = apply(parent, plans(job(parent, sequences, targets=targets)))
    old, new = dense_of(parent, 0), dense_of(child, 0)
    matrices = {
        "gate": (old.w_in_PGD[:, :12], new.w_in_PGD[:, :12]),
        "up": (old.w_in_PGD[:, 12:], new.w_in_PGD[:, 12:]),
        "down": (old.w_out_PDF, new.w_out_PDF),
    }
    for name, (before, after) in matrices.items():
        assert torch.equal(before, after) != (name in targets), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(
    family: str,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    tmp_path: Path,
    sequences: list[list[int]],
) -> None:
    parent = load_checkpoint(write_oracle(make_oracle(family), tmp_path / family)).model
    child = apply(parent, plans(job(parent, sequences, pattern="2:4")))
    twin = apply(parent, {})
    for layer in child.config.moe_layers:
        dense = dense_of(child, layer)
        for name in ("w_in_PGD", "w_out_PDF"):
            setattr(twin.layers[layer], name, torch.nn.Parameter(getattr(dense, name), requires_grad=False))
    torch.testing.assert_close(
        child.classify(sequences).logits_BC, twin.classify(sequences).logits_BC, rtol=1e-5, atol=1e-5
    )


def test_exempt_layers_stay(pristine: Path, sequences: list[list[int]]) -> None:
    parent = load_checkpoint(pristine).model
    assert list(plans(replace(job(parent, sequences), exempt=(0,)))) == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": {0: 3, 1: 4}}, "cuts weights, not experts: keep all 4"),
        ({"sequences": ()}, "give --data FILE, or sequential=false"),
        ({"options": {"targets": "gate,side"}}, "targets name 'side', must be some of gate, up, down"),
        ({"options": {"pattern": "8:16"}}, "a row of 12 columns is no multiple of 16"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, pristine: Path, sequences: list[list[int]]) -> None:
    asked = job(load_checkpoint(pristine).model, sequences)
    options = {**asked.options, **change.pop("options", {})}
    with pytest.raises(PlanError, match=message):
        plans(replace(asked, options=options, **change))
