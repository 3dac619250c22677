"""Routing: the worked numbers of the four semantics, degenerate rows, and the fast path against its twin.

Legend: T tokens, K chosen experts per token, E router rows, V variants.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cpu, reference
from kernels.moe import BACKENDS, Backend
from kernels.routing import FIRST_CONSTANT, SKIP, ExpertWeights, RouterPolicy, Routing, ScoreFunction

NAN, INF = math.nan, math.inf

# Four experts, two chosen, expert 1 pruned: probabilities, sigmoid scores, and what each expert answers to x = 1.
P_E = (0.5, 0.25, 0.15, 0.10)
S_E = (0.8, 0.6, 0.5, 0.2)
F_E = (1.0, 2.0, 4.0, 8.0)
MERGED, CONSTANT = 1.5, 3.0

R1 = RouterPolicy(top_k=2)
R2 = RouterPolicy(top_k=2, normalize=True)
R3 = RouterPolicy(top_k=2, score="sigmoid")
R3_NORM = RouterPolicy(top_k=2, score="sigmoid", normalize=True)


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


def route_one(backend: Backend, logits: tuple[float, ...], table: tuple[int, ...], policy: RouterPolicy) -> Routing:
    return backend.route(torch.tensor([logits]), torch.tensor([table], dtype=torch.int32), policy)


def pairs(routing: Routing) -> list[list[tuple[int, float]]]:
    """Per token: (slot, weight) of each choice."""
    rows = zip(routing.slot_TK.tolist(), routing.weight_TK.tolist(), strict=True)
    return [list(zip(slots, weights, strict=True)) for slots, weights in rows]


def scalar_experts(answers: tuple[float, ...]) -> ExpertWeights:
    """Experts of width 1 that answer `answers[e]` to the input 1: silu(1) * (1 / silu(1)) * answer."""
    silu_1 = 1 / (1 + math.exp(-1))
    return ExpertWeights(
        w_in_PGD=torch.tensor([[1.0], [1 / silu_1]]).repeat(len(answers), 1, 1),
        w_out_PDF=torch.tensor(answers).view(-1, 1, 1),
        const_CD=torch.tensor([[CONSTANT]]),
    )


def log(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(math.log(v) for v in values)


def logit(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(math.log(v / (1 - v)) for v in values)


KEPT = (F_E[0], F_E[2], F_E[3])
TIED = (MERGED, F_E[2], F_E[3])
# table, options of the policy, answers of the physical experts, result for R1, R2, R3, R3 renormalised
SEMANTICS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[float, ...], tuple[float, ...]]] = {
    "full": ((0, 1, 2, 3), {}, F_E, (1.0, 1.33333, 2.0, 1.42857)),
    "slice": ((0, -1, 1, 2), {"slice": True}, KEPT, (1.46667, 1.69231, 2.8, 2.15385)),
    "zero": ((0, -1, 1, 2), {}, KEPT, (0.5, 0.66667, 0.8, 0.57143)),
    "zero, survivors rescaled": ((0, -1, 1, 2), {"survivors": "old_sum"}, KEPT, (0.75, 1.0, 1.4, 1.0)),
    "constant": ((0, -2, 1, 2), {}, KEPT, (1.25, 1.66667, 2.6, 1.85714)),
    "tie": ((0, 0, 1, 2), {}, TIED, (1.125, 1.5, 2.1, 1.5)),
}
KINDS = {"R1": (log(P_E), R1), "R2": (log(P_E), R2), "R3": (logit(S_E), R3), "R3 renorm": (logit(S_E), R3_NORM)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_each_semantics_gives_the_number_computed_by_hand(backend: Backend, semantics: str, kind: str) -> None:
    table, options, answers, expected = SEMANTICS[semantics]
    logits, policy = KINDS[kind]
    policy = replace(policy, **options)
    routing = route_one(backend, logits, table, policy)
    result = backend.moe_ffn(torch.ones(1, 1), routing, scalar_experts(answers))
    assert result.item() == pytest.approx(expected[list(KINDS).index(kind)], abs=1e-5)


@pytest.mark.parametrize(("policy", "expected"), [(R1, 1.725), (R2, 1.91667)])
def test_tie_before_top_k_is_routing_by_the_summed_probabilities(
    backend: Backend, policy: RouterPolicy, expected: float
) -> None:
    summed = log((P_E[0] + P_E[1], P_E[2], P_E[3]))
    routing = route_one(backend, summed, (0, 1, 2), policy)
    assert backend.moe_ffn(torch.ones(1, 1), routing, scalar_experts(TIED)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"), [("R1", 1.87279), ("R2", 2.24471), ("R3", 3.06515), ("R3 renorm", 2.53297)]
)
def test_averaging_router_rows_is_not_tying(backend: Backend, kind: str, expected: float) -> None:
    logits, policy = KINDS[kind]
    averaged = ((logits[0] + logits[1]) / 2, logits[2], logits[3])
    routing = route_one(backend, averaged, (0, 1, 2), policy)
    assert backend.moe_ffn(torch.ones(1, 1), routing, scalar_experts(TIED)).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("table", "options", "r1", "r2"),
    [
        ((0, -1, 1, 2), {"slice": True}, [(0, 0.66667), (1, 0.2)], [(0, 0.76923), (1, 0.23077)]),
        ((0, -1, 1, 2), {}, [(0, 0.5), (-1, 0)], [(0, 0.66667), (-1, 0)]),
        ((0, -1, 1, 2), {"survivors": "old_sum"}, [(0, 0.75), (-1, 0)], [(0, 1), (-1, 0)]),
        ((0, -1, 1, 2), {"survivors": "one"}, [(0, 1), (-1, 0)], [(0, 1), (-1, 0)]),
        ((0, -2, 1, 2), {}, [(0, 0.5), (-2, 0.25)], [(0, 0.66667), (-2, 0.33333)]),
        ((0, 0, 1, 2), {}, [(0, 0.75), (-1, 0)], [(0, 1), (-1, 0)]),
    ],
)
def test_slots_and_weights_of_the_worked_example(
    backend: Backend,
    table: tuple[int, ...],
    options: dict[str, Any],
    r1: list[tuple[int, float]],
    r2: list[tuple[int, float]],
) -> None:
    for policy, expected in ((R1, r1), (R2, r2)):
        got = pairs(route_one(backend, log(P_E), table, replace(policy, **options)))[0]
        assert [slot for slot, _ in got] == [slot for slot, _ in expected]
        assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected], abs=1e-5)


def test_top_1_after_pruning_the_winner(backend: Backend) -> None:
    """Switch-style: full .5, zero exactly 0, slice (.25 / .5) * 2 = 1."""
    top_1 = RouterPolicy(top_k=1)
    x, table = torch.ones(1, 1), (-1, 0, 1, 2)
    experts = scalar_experts(F_E[1:])
    assert backend.moe_ffn(x, route_one(backend, log(P_E), table, top_1), experts).item() == 0.0
    hidden = RouterPolicy(top_k=1, slice=True)
    assert backend.moe_ffn(x, route_one(backend, log(P_E), table, hidden), experts).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("logits", "table", "policy", "expected"),
    [
        pytest.param((NAN,) * 4, (0, 1, 2, 3), R1, [(0, 0.25), (1, 0.25)], id="all NaN: first rows, 1/E each"),
        pytest.param((NAN, NAN, 0.0, NAN), (0, 1, 2, 3), R1, [(2, 1), (0, 0)], id="NaN is hopeless, not poison"),
        pytest.param((INF, 0.0, -INF, 1.0), (0, 1, 2, 3), R1, [(0, 1), (3, 0)], id="infinite logits stay finite"),
        pytest.param((INF, 0.0, INF, 1.0), (0, 1, 2, 3), R2, [(0, 0.5), (2, 0.5)], id="two infinite logits share"),
        pytest.param(
            (0.0,) * 4, (0, -1, -1, -1), RouterPolicy(2, slice=True), [(0, 1), (-1, 0)], id="fewer visible than top_k"
        ),
        pytest.param(
            (9.0,) * 4, (-1,) * 4, RouterPolicy(2, normalize=True, slice=True), [(-1, 0), (-1, 0)], id="nothing visible"
        ),
        pytest.param((0.0,) * 4, (-1,) * 4, R2, [(-1, 0), (-1, 0)], id="everything pruned under zero"),
        pytest.param(
            (0.0,) * 4, (-1,) * 4, RouterPolicy(2, survivors="one"), [(-1, 0), (-1, 0)], id="no survivor to rescale"
        ),
        pytest.param((1.0, 2.0, 2.0, 2.0), (3, 2, 1, 0), R2, [(2, 0.5), (1, 0.5)], id="a tie goes to the lower row"),
        pytest.param((5.0, 5.0, 0.0, 0.0), (1, 1, 0, 0), R2, [(1, 1), (-1, 0)], id="a repeat joins its first"),
        pytest.param((5.0, 5.0, 0.0, 0.0), (-2, -2, 0, 1), R2, [(-2, 1), (-1, 0)], id="a repeated constant too"),
        pytest.param(
            (0.0,) * 4, (0, 1, 2, 3), RouterPolicy(2, normalize=True, scale=2.5), [(0, 1.25), (1, 1.25)], id="scale"
        ),
        pytest.param((300.0, 299.0, 0.0, 0.0), (0, 1, 2, 3), R1, [(0, 0.7310586), (1, 0.2689414)], id="large logits"),
    ],
)
def test_degenerate_rows(
    backend: Backend,
    logits: tuple[float, ...],
    table: tuple[int, ...],
    policy: RouterPolicy,
    expected: list[tuple[int, float]],
) -> None:
    got = pairs(route_one(backend, logits, table, policy))[0]
    assert [slot for slot, _ in got] == [slot for slot, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected], abs=1e-6)


def test_padding_tokens_get_no_expert(backend: Backend) -> None:
    routing = backend.route(torch.zeros(3, 4), torch.arange(4, dtype=torch.int32)[None], R2, num_valid=2)
    assert routing.slot_TK.tolist() == [[0, 1], [0, 1], [-1, -1]]
    assert routing.weight_TK.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]


def test_each_token_reads_its_variant_of_the_table(backend: Backend) -> None:
    table_VE = torch.tensor([[0, 1, 2, 3], [3, -1, 1, 0]], dtype=torch.int32)
    routing = backend.route(torch.tensor([log(P_E)] * 2), table_VE, R1, variant_T=torch.tensor([1, 0]))
    assert routing.slot_TK.tolist() == [[3, -1], [0, 1]]


def test_a_choice_bias_moves_the_choice_but_not_the_weight(backend: Backend) -> None:
    bias_E = torch.tensor([0.0, 0.0, 0.0, 1.0])
    table_VE = torch.arange(4, dtype=torch.int32)[None]
    routing = backend.route(torch.tensor([logit(S_E)]), table_VE, R3, bias_E=bias_E)
    assert routing.slot_TK.tolist() == [[3, 0]]
    assert routing.weight_TK[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-6)


def test_no_tokens(backend: Backend) -> None:
    routing = backend.route(torch.empty(0, 4), torch.arange(4, dtype=torch.int32)[None], R2)
    assert routing.slot_TK.shape == routing.weight_TK.shape == (0, 2)


def test_impossible_requests_are_refused(backend: Backend) -> None:
    table_VE = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="top_k is 4 but the router has only 3 rows"):
        backend.route(torch.zeros(1, 3), table_VE, RouterPolicy(top_k=4))
    with pytest.raises(ValueError, match="bias_E applies to sigmoid scores only"):
        backend.route(torch.zeros(1, 3), table_VE, R1, bias_E=torch.zeros(3))


@st.composite
def routing_problems(draw: st.DrawFn) -> dict[str, Any]:
    """Any router, any table (pruned, tied and constant rows mixed), logits with ties, NaN and infinities."""
    num_rows = draw(st.sampled_from([1, 2, 3, 7, 37, 60, 64]))
    num_tokens, num_variants = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    step = draw(st.sampled_from([0.5, 4.0, 100.0]))
    logits_TE = torch.randint(-6, 7, (num_tokens, num_rows), generator=generator) * step
    spoiled_TE = torch.rand(num_tokens, num_rows, generator=generator)
    logits_TE[spoiled_TE < 0.03] = draw(st.sampled_from([NAN, INF, -INF, 0.0]))
    kind = draw(st.sampled_from(["permutation", "pruned", "mixed"]))
    if kind == "mixed":
        table_VE = torch.randint(-4, max(num_rows // 2, 1), (num_variants, num_rows), generator=generator)
    else:
        table_VE = torch.stack([torch.randperm(num_rows, generator=generator) for _ in range(num_variants)])
        if kind == "pruned":
            table_VE[torch.rand(table_VE.shape, generator=generator) < 0.4] = SKIP
    score: ScoreFunction = "sigmoid" if draw(st.booleans()) else "softmax"
    policy = RouterPolicy(
        top_k=draw(st.integers(1, min(8, num_rows))),
        score=score,
        normalize=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.5])),
        slice=draw(st.booleans()),
        survivors=draw(st.sampled_from(["keep", "keep", "old_sum", "one"])),
    )
    has_bias = score == "sigmoid" and draw(st.booleans())
    has_variants = num_variants > 1 and draw(st.booleans())
    return {
        "logits_TE": logits_TE,
        "table_VE": table_VE.to(torch.int32),
        "policy": policy,
        "variant_T": torch.randint(0, num_variants, (num_tokens,), generator=generator) if has_variants else None,
        "bias_E": torch.randn(num_rows, generator=generator) if has_bias else None,
        "num_valid": draw(st.none() | st.integers(0, num_tokens)),
    }


@settings(max_examples=300, deadline=None)
@given(problem=routing_problems())
def test_the_fast_path_equals_its_twin(problem: dict[str, Any]) -> None:
    ours, twin = cpu.route(**problem), reference.route(**problem)
    assert ours.slot_TK.dtype == twin.slot_TK.dtype == torch.int32
    assert ours.weight_TK.dtype == twin.weight_TK.dtype == torch.float32
    assert torch.equal(ours.slot_TK, twin.slot_TK)
    torch.testing.assert_close(ours.weight_TK, twin.weight_TK, rtol=0, atol=2e-6)


@settings(max_examples=200, deadline=None)
@given(problem=routing_problems())
def test_what_every_routing_promises(problem: dict[str, Any]) -> None:
    routing = cpu.route(**problem)
    assert torch.isfinite(routing.weight_TK).all()
    assert (routing.weight_TK >= 0).all()
    assert (routing.weight_TK[routing.slot_TK == SKIP] == 0).all()
    for slots in routing.slot_TK.tolist():
        live = [slot for slot in slots if slot != SKIP]
        assert len(set(live)) == len(live), "a slot stands twice in one token"
        assert all(slot >= 0 or slot <= FIRST_CONSTANT for slot in live)


def test_hiding_rows_equals_a_router_without_them() -> None:
    """slice on a masked router is the router of the kept rows alone: the same slots, the same weights."""
    logits_TE = torch.randn(50, 12)
    kept = [0, 3, 4, 7, 8, 11]
    table_E = torch.full((12,), SKIP, dtype=torch.int32)
    table_E[kept] = torch.arange(6, dtype=torch.int32)
    for normalize in (False, True):
        policy = RouterPolicy(top_k=3, normalize=normalize, slice=True)
        masked = reference.route(logits_TE, table_E[None], policy)
        small = reference.route(logits_TE[:, kept], torch.arange(6, dtype=torch.int32)[None], policy)
        assert torch.equal(masked.slot_TK, small.slot_TK)
        torch.testing.assert_close(masked.weight_TK, small.weight_TK, rtol=0, atol=1e-6)


def test_weights_are_differentiable_in_the_reference() -> None:
    """The gradient of a renormalised weight is that of a softmax over the two chosen logits."""
    logits_TE = torch.randn(5, 6, requires_grad=True)
    routing = reference.route(logits_TE, torch.arange(6, dtype=torch.int32)[None], R2)
    (ours,) = torch.autograd.grad(routing.weight_TK[:, 0].sum(), logits_TE)
    chosen_TK = logits_TE.topk(2).indices
    by_hand = torch.softmax(logits_TE.gather(1, chosen_TK), dim=-1)[:, 0].sum()
    (expected,) = torch.autograd.grad(by_hand, logits_TE)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
