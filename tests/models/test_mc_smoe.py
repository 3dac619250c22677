"""MC-SMoE: U V + S of merged experts, exact where nothing is cut, its bytes, and which rows of S stay.

Legend: K experts after, D model width, F expert inner width. Of one matrix: Y rows, X columns.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.compressed import CompressedExperts
from models import memory
from models.checkpoint import load_checkpoint
from models.classifier import Classifier, MoELayer
from models.config import LowRank, ModelConfig
from models.errors import PlanError
from models.pruning import METHODS
from models.pruning.apply import apply
from models.pruning.calibrate import calibrate
from models.pruning.compress import compressed, compression
from models.pruning.method import Job
from models.pruning.plan import LayerPlan, keep_best
from models.pruning.post import Factor, Mask
from models.pruning.stats import Core, Gram, Inputs, LayerStats


def job(parent: Classifier, sequences: Any, keep: int, method: str = "mc-smoe", **options: Any) -> Job:
    config = parent.config
    found = calibrate(parent, sequences, (Core, Gram, Inputs))
    return Job(
        parent=parent,
        stats={i: LayerStats(i, config.layers[i].num_rows, config.top_k, groups=found[i]) for i in config.moe_layers},
        keep=dict.fromkeys(config.moe_layers, keep),
        semantics="tie",
        options=METHODS[method].read_options({name: str(value) for name, value in options.items()}),
    )


def cut(parent: Classifier, sequences: Any, keep: int = 2, method: str = "mc-smoe", **options: Any) -> Classifier:
    return apply(parent, METHODS[method].plan(job(parent, sequences, keep, method, **options)))


def dense_of(model: Classifier, layer: int) -> Any:
    module = model.layers[layer]
    assert isinstance(module, MoELayer)
    experts = module.experts
    return experts.dense() if isinstance(experts, CompressedExperts) else experts


@pytest.fixture
def parent(pristine: Path) -> Classifier:
    return load_checkpoint(pristine).model


@pytest.fixture
def config(parent: Classifier) -> ModelConfig:
    return parent.config


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 99, "row_ratio": 0},
        {"rank": 12, "row_ratio": 0.0},
        {"rank": 1, "row_ratio": 1},
        {"rank": 1, "row_ratio": 1.0, "structure": "col"},
        {"rank": 3, "row_ratio": 1.0, "importance": "input"},
    ],
)
def test_exact_at_full_rank_and_where_every_row_stays(
    options: dict[str, Any], parent: Classifier, sequences: list[list[int]]
) -> None:
    merged, child = cut(parent, sequences, method="m-smoe"), cut(parent, sequences, **options)
    for layer in (0, 1):
        for name in ("w_in_PGD", "w_out_PDF"):
            got, want = getattr(dense_of(child, layer), name), getattr(dense_of(merged, layer), name)
            assert float((got - want).norm() / want.norm()) < 1e-6
    torch.testing.assert_close(
        child.classify(sequences).logits_BC, merged.classify(sequences).logits_BC, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("structure", ["row", "col"])
def test_each_matrix_by_itself_is_the_best_of_its_rank_plus_its_worst_lines(
    structure: str, parent: Classifier, sequences: list[list[int]]
) -> None:
    """Singular values and residual by numpy; 3 of gate's 12 rows, 4 of down's 16; columns the other way round."""
    merged = cut(parent, sequences, method="m-smoe")
    child = cut(parent, sequences, rank=2, row_ratio=0.25, structure=structure)
    old, new = dense_of(merged, 0), dense_of(child, 0)
    axis = 1 if structure == "row" else 0
    for k in range(2):
        pairs = (
            (old.w_in_PGD[k, :12], new.w_in_PGD[k, :12]),
            (old.w_in_PGD[k, 12:], new.w_in_PGD[k, 12:]),
            (old.w_out_PDF[k], new.w_out_PDF[k]),
        )
        for before, after in ((b.double().numpy(), a.double().numpy()) for b, a in pairs):
            u, value, v = np.linalg.svd(before)
            best = (u[:, :2] * value[:2]) @ v[:2]
            norm = np.linalg.norm(before - best, axis=axis)
            kept = norm >= np.sort(norm)[-norm.size // 4]
            expected = np.where(kept[:, None] if structure == "row" else kept[None], before, best)
            assert kept.sum() == norm.size // 4
            assert after == pytest.approx(expected, abs=1e-5)


def test_inputs_decide_which_rows_matter(config: ModelConfig) -> None:
    """Rank 1 takes the first row; of the others, the second is longest, but what it reads is never large."""
    w_in = torch.zeros(1, 6, 3)
    w_in[0, :3] = w_in[0, 3:] = torch.diag(torch.tensor([9.0, 3.0, 2.0]))
    for inner_KD, row in ((None, 1), (np.array([[1.0, 0.1, 1.0]]), 2)):
        step = Factor(1, 1 / 3, inner_KD=inner_KD)
        found = compressed(replace(config, expert_width=3, width=3), w_in, torch.zeros(1, 3, 3), step)
        assert found["w_gate_index_PQ"].tolist() == found["w_up_index_PQ"].tolist() == [[row]]
        assert found["w_gate_rows_PQX"][0, 0, row] == pytest.approx(w_in[0, row, row])


def test_members_of_a_group_add_up_their_inputs(parent: Classifier, sequences: list[list[int]]) -> None:
    asked = job(parent, sequences, 2, importance="input")
    for layer, plan in METHODS["mc-smoe"].plan(asked).items():
        inputs, (step,) = asked.stats[layer].need(Inputs), plan.post
        assert isinstance(step, Factor)
        for slot in range(2):
            members = [e for e in range(4) if plan.route_E[e] == slot]
            assert step.inner_KD is not None
            assert step.inner_KD[slot] ** 2 == pytest.approx(inputs.xg2_ED[members].sum(0))


def test_merges_are_those_of_m_smoe(parent: Classifier, sequences: list[list[int]]) -> None:
    merged = METHODS["m-smoe"].plan(job(parent, sequences, 2, "m-smoe", weights="uniform", similarity="router_logits"))
    both = METHODS["mc-smoe"].plan(job(parent, sequences, 2, weights="uniform", similarity="router_logits"))
    assert merged.keys() == both.keys() == {0, 1}
    for layer, plan in merged.items():
        assert np.array_equal(plan.mix_KE, both[layer].mix_KE)
        assert np.array_equal(plan.route_E, both[layer].route_E)


def test_layers_that_keep_all_experts_are_left_alone(parent: Classifier, sequences: list[list[int]]) -> None:
    assert METHODS["mc-smoe"].plan(job(parent, sequences, 4)) == {}


@pytest.mark.parametrize("structure", ["row", "col"])
def test_parameters_are_the_sum_of_factors_and_lines(
    structure: str, parent: Classifier, sequences: list[list[int]]
) -> None:
    """Rank 2 of 12 x 16: 2 * 28; a quarter of 12 rows of 16 or of 16 columns of 12 is 48 either way."""
    child = cut(parent, sequences, keep=3, rank=2, row_ratio=0.25, structure=structure)
    factors, lines, indices = 2 * 28, 48, (3 + 3 + 4 if structure == "row" else 4 + 4 + 3)
    assert memory.weight_bytes(child)["experts"] == 4 * 2 * 3 * (3 * (factors + lines) + indices)
    dense = cut(parent, sequences, keep=3, method="m-smoe")
    assert memory.num_parameters(dense) - memory.num_parameters(child) == 2 * 3 * 3 * (12 * 16 - factors - lines)


def test_the_papers_arithmetic(config: ModelConfig) -> None:
    """768 x 3072 at rank 32 with a tenth of the rows: 5.2 % and 10 % of the numbers."""
    forms = compression(replace(config, expert_width=3072, width=768), Factor(32, 0.1))
    assert forms.up == LowRank(32, 307, "row")
    assert forms.down == LowRank(32, 77, "row")
    share = (32 * (768 + 3072) + 307 * 768) / (768 * 3072)
    assert share == pytest.approx(0.152, abs=5e-4)


def test_factors_larger_than_the_matrix_are_warned_about(
    parent: Classifier, sequences: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    METHODS["mc-smoe"].plan(job(parent, sequences, 2, rank=2))
    assert not caplog.records
    METHODS["mc-smoe"].plan(job(parent, sequences, 2))
    assert "layer 0: rank 32 and 10 % of the rows take 2128 numbers, the merged experts themselves 1152" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"), [({"rank": 0}, "rank is 0"), ({"row_ratio": 1.5}, "row-ratio is 1.5, must be from 0 to 1")]
)
def test_refusals(options: dict[str, Any], message: str, parent: Classifier, sequences: list[list[int]]) -> None:
    with pytest.raises(PlanError, match=message):
        METHODS["mc-smoe"].plan(job(parent, sequences, 2, **options))


def test_nothing_comes_after_compression(parent: Classifier) -> None:
    plan = keep_best([1, 2, 3, 4], 4, "zero")
    steps = (Factor(2, 0.0), Mask("0.5", ("gate",)))
    with pytest.raises(PlanError, match="must be the last step"):
        apply(parent, {0: LayerPlan(plan.mix_KE, plan.route_E, "zero", post=steps)})


def test_input_importance_needs_its_statistics(parent: Classifier) -> None:
    method = METHODS["mc-smoe"]
    assert method.needed(method.read_options({})) == {Core, Gram}
    assert method.needed(method.read_options({"importance": "input"})) == {Core, Gram, Inputs}
