"""MoNE: the golden row, and constants that replace a constant expert exactly.

Legend: T tokens, E experts, D model width.
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.routing import ExpertWeights, RouterPolicy
from models.errors import PlanError
from models.pruning.method import Job
from models.pruning.methods.mone import MONE, mean_outputs, mone, novice_score
from models.pruning.stats import Core, LayerStats, Means
from tests.models.golden import golden


def test_score_is_mass_times_fluctuation() -> None:
    assert novice_score(golden()) == pytest.approx([1.09012, 1.13352, 1.25281, 0], abs=5e-6)
    assert novice_score(golden(), "mass").tolist() == pytest.approx([1.85 / 4, 1.45 / 4, 0.7 / 4, 0])
    assert novice_score(golden(), "fluctuation") == pytest.approx([2.35702, 3.12694, 7.15891, 0], abs=5e-6)


def test_unbiased_divides_by_one_token_less() -> None:
    # 3, 3, 2 tokens: variances grow by 3/2, 3/2, 2
    growth = novice_score(golden(), "fluctuation", unbiased=True)[:3] / novice_score(golden(), "fluctuation")[:3]
    assert growth**2 == pytest.approx([1.5, 1.5, 2])


def test_a_single_token_has_no_fluctuation() -> None:
    core = golden().need(Core)
    once = replace(core, n_E=np.ones(4, dtype=np.int64), f2_E=np.full(4, 25.0))
    layer = golden().having(once, Means(np.tile([3.0, 4.0], (4, 1))))
    for unbiased in (False, True):
        assert novice_score(layer, "fusion", unbiased).tolist() == [0, 0, 0, 0]


def test_golden_order_differs_from_frequency() -> None:
    kept = [mone(golden(), keep, "constant").kept for keep in (3, 2, 1)]
    assert kept == [(0, 1, 2), (1, 2), (2,)]


def test_constants_are_mean_outputs_and_zero_where_unrouted() -> None:
    assert mean_outputs(golden()) == pytest.approx(
        np.array([[4, 16 / 3], [19 / 3, 35 / 3], [1.5, -3], [0, 0]]), rel=1e-12
    )
    plan = mone(golden(), 2, "constant")
    assert plan.const_ED is not None
    assert plan.const_ED.dtype == np.float32
    assert plan.const_ED[0] == pytest.approx([4, 5.3333], abs=1e-4)
    assert plan.const_ED[3].tolist() == [0, 0]


@pytest.mark.parametrize("semantics", ["zero", "slice"])
def test_other_semantics_keep_the_same_experts_without_constants(semantics: Any) -> None:
    plan = mone(golden(), 2, semantics)
    assert plan.kept == (1, 2)
    assert plan.const_ED is None


def test_doubling_every_token_changes_nothing() -> None:
    core, means = golden().need(Core), golden().need(Means)
    doubled = golden().having(core + core, means + means)
    assert novice_score(doubled) == pytest.approx(novice_score(golden()), rel=1e-12)
    assert mean_outputs(doubled) == pytest.approx(mean_outputs(golden()), rel=1e-12)


def test_permuting_experts_permutes_scores_and_constants() -> None:
    order_E = np.array([2, 0, 3, 1])
    core, means = golden().need(Core), golden().need(Means)
    arrays = {name: value[order_E] for name, value in vars(core).items() if name.endswith("_E")}
    layer = golden().having(replace(core, **arrays), Means(means.fsum_ED[order_E]))
    assert novice_score(layer).tolist() == novice_score(golden())[order_E].tolist()
    assert {int(order_E[e]) for e in mone(layer, 2, "constant").kept} == {1, 2}


def test_defaults_are_the_options_defaults_and_keeping_all_plans_nothing() -> None:
    options = {option.name: option.default for option in MONE.options}
    job = Job(cast(Any, None), {0: golden()}, {0: 2}, MONE.semantics[0], options)
    assert MONE.plan(job)[0].kept == mone(golden(), 2, "constant").kept
    assert MONE.plan(job)[0].semantics == "constant"
    assert MONE.plan(replace(job, keep={0: 4})) == {}


def test_without_data_it_says_what_to_give() -> None:
    with pytest.raises(PlanError, match="--data"):
        mone(LayerStats(layer=0, num_experts=4, top_k=2), 2, "constant")


def test_a_constant_expert_goes_first_and_its_replacement_is_exact() -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(64, 5, dtype=torch.float64)
    x_TD[:, 0] = 1.0
    w_in_PGD, w_out_PDF = torch.randn(4, 6, 5).double(), torch.randn(4, 5, 3).double()
    w_in_PGD[1, :, 1:] = 0.0  # expert 1 reads the constant coordinate only
    logits_TE = torch.randn(64, 4)
    policy, experts = RouterPolicy(top_k=2, normalize=True), ExpertWeights(w_in_PGD, w_out_PDF)
    routing = reference.route(logits_TE, torch.arange(4)[None], policy)
    plan = mone(_observed(x_TD, routing.slot_TK, routing.weight_TK, experts), 3, "constant")
    assert plan.kept == (0, 2, 3)
    assert plan.score_E is not None
    assert plan.score_E[1] < 1e-6 < plan.score_E[[0, 2, 3]].min()

    kept, const_ED = list(plan.kept), plan.const_ED
    assert const_ED is not None
    table_VE = torch.tensor([[slot if slot >= 0 else -2 for slot in plan.route_E.tolist()]])
    fewer = ExpertWeights(w_in_PGD[kept], w_out_PDF[kept], torch.from_numpy(const_ED[[1]]).double())
    before = reference.moe_ffn(x_TD, routing, experts)
    after = reference.moe_ffn(x_TD, reference.route(logits_TE, table_VE, policy), fewer)
    assert float((after - before).norm() / before.norm()) < 1e-6
    zeroed = replace(fewer, const_CD=torch.zeros(1, 5).double())
    without = reference.moe_ffn(x_TD, reference.route(logits_TE, table_VE, policy), zeroed)
    assert float((without - before).norm() / before.norm()) > 0.01


def _observed(x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor, experts: ExpertWeights) -> LayerStats:
    """Core and Means of these tokens, expert by expert; sums that MoNE does not read stay 0."""
    count_E, zeros_E, width = np.zeros(4, dtype=np.int64), np.zeros(4), x_TD.shape[1]
    g_E, f2_E, fsum_ED = np.zeros(4), np.zeros(4), np.zeros((4, width))
    for e in range(4):
        token_N, choice_N = torch.nonzero(slot_TK == e, as_tuple=True)
        h_NF = reference.expert_in(x_TD[token_N], experts.w_in_PGD[e], None, "silu", True)
        f_ND = reference.expert_out(h_NF, experts.w_out_PDF[e], None).numpy()
        count_E[e], g_E[e] = len(token_N), float(weight_TK[token_N, choice_N].sum())
        f2_E[e], fsum_ED[e] = (f_ND**2).sum(), f_ND.sum(0)
    core = Core(
        tokens=np.array(len(x_TD)),
        n_E=count_E,
        g_E=g_E,
        f_E=zeros_E,
        f2_E=f2_E,
        gf_E=zeros_E,
        gf2_E=zeros_E,
        wgf_E=zeros_E,
        fmax_E=np.zeros(4, dtype=np.float32),
        p_E=zeros_E,
    )
    return LayerStats(0, 4, 2, normalize=True, groups=(core, Means(fsum_ED)))
