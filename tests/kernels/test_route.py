"""Routing: the worked numbers of the four semantics, degenerate rows, and the fast path against its twin.

Legend: T tokens, K chosen experts per token, E router rows, V variants.
"""

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
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


@pytest.mark.parametrize("as_tensor", [int, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int32)])
def test_padding_tokens_get_no_expert(backend: Backend, as_tensor: Callable[[int], torch.Tensor | int]) -> None:
    logits_TE, table_VE = torch.zeros(3, 4), torch.arange(4, dtype=torch.int32)[None]
    logits_TE[2] = NAN
    for num_valid in (0, 2, 3, 4):
        routing = backend.route(logits_TE, table_VE, R2, num_valid=as_tensor(num_valid))
        assert routing.slot_TK.tolist() == ([[0, 1]] * num_valid + [[-1, -1]] * 3)[:3]
        assert routing.weight_TK.tolist() == ([[0.5, 0.5]] * num_valid + [[0.0, 0.0]] * 3)[:3]


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


def assert_equals_twin(backend: Backend, *problem: Any, **options: Any) -> Routing:
    """Ids exactly, weights within a few roundings."""
    ours, twin = backend.route(*problem, **options), reference.route(*problem, **options)
    assert ours.slot_TK.dtype == twin.slot_TK.dtype == torch.int32
    assert ours.weight_TK.dtype == twin.weight_TK.dtype == torch.float32
    assert torch.equal(ours.slot_TK, twin.slot_TK)
    torch.testing.assert_close(ours.weight_TK, twin.weight_TK, rtol=0, atol=2e-6)
    return ours


def pruned_table(num_rows: int, num_variants: int = 1) -> torch.Tensor:
    """A third of the rows pruned, the others in any order."""
    table_VE = torch.stack([torch.randperm(num_rows) for _ in range(num_variants)]).to(torch.int32)
    table_VE[:, 1::3] = SKIP
    return table_VE


POLICIES = {
    "softmax": RouterPolicy(6, survivors="old_sum"),
    "renormalised": RouterPolicy(6, normalize=True, scale=2.5),
    "hidden": RouterPolicy(6, normalize=True, slice=True),
    "sigmoid": RouterPolicy(6, score="sigmoid", normalize=True, survivors="one"),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("num_rows", [1, 3, 7, 37, 60, 64, 100, 4096])
def test_any_number_of_rows(backend: Backend, num_rows: int, policy: RouterPolicy) -> None:
    """Powers of two or not; logits in steps of .25, so that ties are common."""
    logits_TE = (torch.randn(11, num_rows) * 4).round() / 4
    assert_equals_twin(backend, logits_TE, pruned_table(num_rows), replace(policy, top_k=min(6, num_rows)))


@pytest.mark.parametrize("num_rows", [5, 8, 64])
def test_as_many_choices_as_rows(backend: Backend, num_rows: int) -> None:
    logits_TE = torch.randn(9, num_rows)
    table_VE = torch.arange(num_rows, dtype=torch.int32)[None]
    routing = assert_equals_twin(backend, logits_TE, table_VE, RouterPolicy(num_rows))
    assert torch.equal(routing.slot_TK.long(), logits_TE.argsort(descending=True))
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(9))


@pytest.mark.parametrize(("survivors", "dead"), [(5, 0), (4, 0), (3, 1), (1, 3), (0, 4)])
def test_as_many_choices_as_visible_rows_and_more(backend: Backend, survivors: int, dead: int) -> None:
    table_E = torch.full((9,), SKIP, dtype=torch.int32)
    table_E[torch.randperm(9)[:survivors]] = torch.arange(survivors, dtype=torch.int32)
    routing = assert_equals_twin(backend, torch.randn(6, 9), table_E[None], RouterPolicy(4, normalize=True, slice=True))
    assert ((routing.slot_TK == SKIP).sum(-1) == dead).all()


def test_more_tokens_than_one_program_takes(backend: Backend) -> None:
    for num_tokens, num_rows in ((41, 64), (1100, 2), (5, 300)):
        logits_TE, variant_T = torch.randn(num_tokens, num_rows), torch.randint(0, 3, (num_tokens,))
        policy = RouterPolicy(2, slice=True)
        assert_equals_twin(backend, logits_TE, pruned_table(num_rows, 3), policy, variant_T, num_valid=num_tokens - 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_logits_of_any_dtype_are_read_as_float32(backend: Backend, dtype: torch.dtype) -> None:
    logits_TE, table_VE = (3 * torch.randn(7, 20)).to(dtype), pruned_table(20)
    logits_TE[1, 3], logits_TE[2, 4], logits_TE[3] = NAN, INF, -INF
    policy = RouterPolicy(4, normalize=True)
    routing = assert_equals_twin(backend, logits_TE, table_VE, policy)
    assert torch.equal(routing.slot_TK, backend.route(logits_TE.float(), table_VE, policy).slot_TK)


def test_rows_with_gaps_and_other_integers(backend: Backend) -> None:
    """Logits and tables cut out of wider ones, or transposed; int64 tables; variants of either width."""
    wide = torch.randn(20, 50)
    table_VE = pruned_table(50, 20).long()
    variant_T = torch.randint(0, 20, (20,), dtype=torch.int32)
    for logits_TE, table in ((wide[:, 3:40], table_VE[:, :37]), (wide.t()[:, :20], table_VE.t()[:20, :20])):
        policy = RouterPolicy(3, normalize=True, slice=True)
        variant = variant_T[torch.arange(len(logits_TE)) % 20]
        assert_equals_twin(backend, logits_TE, table, policy, variant)


def test_two_runs_give_the_same_bits(backend: Backend) -> None:
    problem = (torch.randn(30, 37), pruned_table(37), RouterPolicy(6, survivors="old_sum"))
    first, second = backend.route(*problem), backend.route(*problem)
    assert torch.equal(first.slot_TK, second.slot_TK)
    assert torch.equal(first.weight_TK, second.weight_TK)


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
def test_the_cpu_path_equals_its_twin(problem: dict[str, Any]) -> None:
    assert_equals_twin(BACKENDS["cpu"](), **problem)


@settings(max_examples=60, deadline=None)
@given(problem=routing_problems())
def test_the_kernel_equals_its_twin(problem: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in problem.items()}
    assert_equals_twin(BACKENDS["triton"](), **moved)


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


KERNELS = {
    "route": ["route_kernel", "remap_kernel"],
    "sort": ["sort_all_kernel", "count_blocks_kernel", "scan_blocks_kernel", "sort_blocks_kernel"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in KERNELS.items() for name in names])
def test_sizes_are_not_compiled_in(module: str, name: str) -> None:
    """Else layers with 1, 16 and 37 experts would be three compilations while serving.

    What is neither a constant nor a tensor, whose name ends in its shape, is a size.
    """
    kernel = getattr(pytest.importorskip(f"kernels.{module}"), name)
    parameters = inspect.signature(kernel.fn).parameters
    sizes = {name for name, p in parameters.items() if p.annotation is p.empty and not re.search("_[A-Z0-9]+$", name)}
    if hasattr(kernel, "params"):
        run_time = {p.name for p in kernel.params if p.do_not_specialize}
    else:  # the interpreter's stand-in keeps the decorator's arguments
        run_time = set(kernel.kwargs["do_not_specialize"])
    assert sizes
    assert sizes == run_time


FAR_APART = """
import torch
from kernels.route import route
from kernels.routing import RouterPolicy

stride = 2**30 + 64
device = "cuda" if torch.cuda.is_available() else "cpu"
logits_TE = torch.empty(4 * stride, dtype=torch.float16, device=device).as_strided((4, 8), (stride, 1))
logits_TE.copy_(torch.eye(8)[[5, 2, 7, 3]])
routing = route(logits_TE, torch.arange(8, dtype=torch.int32, device=device)[None], RouterPolicy(1))
assert routing.slot_TK.flatten().tolist() == [5, 2, 7, 3]
"""


def test_rows_further_apart_than_int32_counts() -> None:
    """Eight gigabytes, of which four rows are touched. In a process of its own: a wrapped address is a crash."""
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-c", FAR_APART], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
