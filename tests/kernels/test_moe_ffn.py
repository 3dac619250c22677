"""The experts' feed-forward: invariants a person can check, parity with float64, and what runs without rows.

Legend: T tokens, K chosen experts per token, P physical experts, D model width, F expert inner width, C constant rows.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from kernels import cpu, reference
from kernels.moe import Backend
from kernels.routing import FIRST_CONSTANT, SKIP, Activation, ExpertWeights, RouterPolicy, Routing

# ||out - ref|| / ||ref|| against float64 on the same rounded inputs. The worst of five draws of all shapes below, met
# by a single short row: reference and CPU 3e-7, 9e-4, 5.9e-3; Triton, one draw in the interpreter, 2e-7 and 4.2e-4.
BOUNDS = {
    "reference": {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    "cpu": {torch.float32: 5e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3},
    "triton": {torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3},
}
# The interpreter cannot multiply bfloat16.
RUNS = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, bounds in BOUNDS.items()
    for dtype in bounds
    if name != "triton" or dtype != torch.bfloat16 or torch.cuda.is_available()
]
every_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), RUNS, indirect=["backend"])


@dataclass(frozen=True)
class Shape:
    tokens: int
    top_k: int
    experts: int
    width: int
    inner: int
    constants: int = 0
    activation: Activation = "silu"
    gated: bool = True
    biases: bool = False
    residual: bool = False
    shared: bool = False


SHAPES = {
    "plain": Shape(24, 2, 8, 64, 32),
    "one token": Shape(1, 4, 8, 64, 32),
    "one token of one expert": Shape(1, 1, 1, 16, 16),
    "one choice": Shape(24, 1, 8, 64, 32),
    "as many choices as experts": Shape(24, 4, 4, 64, 32),
    "one expert left, others pruned": Shape(24, 2, 1, 64, 32),
    "an expert count that is no power of two": Shape(12, 8, 37, 32, 16),
    "fewer tokens than experts, so some get none": Shape(3, 2, 60, 32, 16),
    "odd widths, no multiple of any tile": Shape(33, 3, 7, 97, 47),
    "constants beside experts": Shape(24, 4, 6, 64, 32, constants=3),
    "more inner than outer width": Shape(9, 2, 4, 16, 80),
    "many rows per expert": Shape(70, 2, 3, 32, 32),
    "a residual": Shape(24, 2, 8, 64, 32, residual=True),
    "a shared expert": Shape(24, 2, 8, 64, 32, shared=True),
    "biases, many rows per expert": Shape(40, 2, 3, 32, 32, biases=True),
    "no gate": Shape(24, 2, 8, 64, 32, gated=False),
    "no gate, biases, odd widths": Shape(33, 3, 7, 41, 47, gated=False, biases=True),
    "everything at once": Shape(24, 4, 6, 48, 40, 3, "gelu_tanh", biases=True, residual=True, shared=True),
    "everything at once, one token": Shape(1, 4, 6, 48, 40, 3, "gelu_erf", biases=True, residual=True, shared=True),
    "exact GELU": Shape(24, 2, 8, 64, 32, activation="gelu_erf"),
    "GELU by tanh": Shape(24, 2, 8, 64, 32, activation="gelu_tanh"),
    "ReLU": Shape(24, 2, 8, 64, 32, activation="relu"),
    "squared ReLU without a gate": Shape(24, 2, 8, 64, 32, activation="relu_squared", gated=False),
}


# Each activation at 2, and so that of the exact GELU is 2 * Phi(2).
HAND = [("silu", 1.7615942), ("gelu_erf", 1.9544997), ("gelu_tanh", 1.9545977), ("relu", 2.0), ("relu_squared", 4.0)]


def weights(shape: Shape, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """N(0, 1) / sqrt(fan-in): never zeros, so that every term of a product is seen. Biases and constants N(0, 1)."""
    rows = 2 * shape.inner if shape.gated else shape.inner
    w_in = torch.randn(shape.experts, rows, shape.width) / math.sqrt(shape.width)
    w_out = torch.randn(shape.experts, shape.width, shape.inner) / math.sqrt(shape.inner)
    return ExpertWeights(
        w_in.to(dtype),
        w_out.to(dtype),
        torch.randn(shape.constants, shape.width).to(dtype) if shape.constants else None,
        torch.randn(shape.experts, rows).to(dtype) if shape.biases else None,
        torch.randn(shape.experts, shape.width).to(dtype) if shape.biases else None,
        shape.activation,
        shape.gated,
    )


def random_routing(shape: Shape, pruned: float = 0.25) -> Routing:
    """Distinct slots per token, a share of them -1, and constants if the shape has any."""
    ids = torch.arange(-1 - shape.constants, shape.experts)
    ids = torch.cat((ids[ids != SKIP], torch.full((max(shape.top_k - shape.experts, 0),), SKIP)))
    slot_TK = torch.stack([ids[torch.randperm(len(ids))[: shape.top_k]] for _ in range(shape.tokens)])
    if shape.tokens > 1:
        slot_TK[torch.rand(slot_TK.shape) < pruned] = SKIP
    weight_TK = torch.rand(slot_TK.shape).masked_fill(slot_TK == SKIP, 0.0)
    return Routing(slot_TK.to(torch.int32), weight_TK)


def added(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The residual and the shared expert's output, for shapes that have them."""
    residual_TD, shared_TD = torch.randn(2, shape.tokens, shape.width).to(dtype)
    return residual_TD if shape.residual else None, shared_TD if shape.shared else None


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def activated(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The textbook formulas."""
    return {
        "silu": x / (1 + torch.exp(-x)),
        "gelu_erf": x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": x * (x > 0),
        "relu_squared": x**2 * (x > 0),
    }[activation]


def expert_answer(experts: ExpertWeights, slot: int, x_D: torch.Tensor) -> torch.Tensor:
    inner_G = experts.w_in_PGD[slot].double() @ x_D
    if experts.b_in_PG is not None:
        inner_G += experts.b_in_PG[slot].double()
    inner = experts.w_out_PDF.shape[2]
    h_F = activated(inner_G[:inner], experts.activation)
    if experts.gated:
        h_F = h_F * inner_G[inner:]
    y_D = experts.w_out_PDF[slot].double() @ h_F
    return y_D if experts.b_out_PD is None else y_D + experts.b_out_PD[slot].double()


def oracle(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Token by token, choice by choice, in float64: shares no line with what it judges."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for token, (slots, gates) in enumerate(zip(routing.slot_TK.tolist(), routing.weight_TK.tolist(), strict=True)):
        for slot, gate in zip(slots, gates, strict=True):
            if slot >= 0:
                out_TD[token] += gate * expert_answer(experts, slot, x_TD[token].double())
            elif slot <= FIRST_CONSTANT:
                assert experts.const_CD is not None
                out_TD[token] += gate * experts.const_CD[FIRST_CONSTANT - slot].double()
        if residual_TD is not None:
            out_TD[token] += residual_TD[token].double()
        if shared_TD is not None:
            out_TD[token] += shared_TD[token].double()
    return out_TD


@every_backend_and_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_parity_with_float64(name: str, backend: Backend, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    experts, routing, terms = weights(shape, dtype), random_routing(shape), added(shape, dtype)
    x_TD = torch.randn(shape.tokens, shape.width).to(dtype)
    result = backend.moe_ffn(x_TD, routing, experts, *terms)
    assert result.dtype == dtype
    assert result.shape == x_TD.shape
    assert error(result, oracle(x_TD, routing, experts, *terms)) < BOUNDS[backend.name][dtype]


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_in_float64_is_the_oracle(name: str) -> None:
    shape = SHAPES[name]
    experts, routing, terms = weights(shape), random_routing(shape), added(shape)
    x_TD = torch.randn(shape.tokens, shape.width)
    result = reference.moe_ffn(x_TD.double(), routing, experts, *terms, accumulate=torch.float64)
    assert error(result, oracle(x_TD, routing, experts, *terms)) < 1e-12


@every_backend_and_dtype
def test_one_expert_takes_all(backend: Backend, dtype: torch.dtype) -> None:
    shape = SHAPES["plain"]
    experts = weights(shape, dtype)
    x_TD = torch.randn(shape.tokens, shape.width).to(dtype)
    routing = Routing(torch.tensor([[5, SKIP]] * shape.tokens, dtype=torch.int32), torch.tensor([[1.0, 0.0]] * 24))
    result = backend.moe_ffn(x_TD, routing, experts)
    assert error(result, oracle(x_TD, routing, experts)) < BOUNDS[backend.name][dtype]


def test_no_tokens(backend: Backend) -> None:
    routing = Routing(torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2))
    assert backend.moe_ffn(torch.empty(0, 64), routing, weights(SHAPES["plain"])).shape == (0, 64)


@every_backend_and_dtype
def test_a_token_without_experts_gets_exactly_zero_or_what_is_added(backend: Backend, dtype: torch.dtype) -> None:
    shape = replace(SHAPES["plain"], biases=True, residual=True, shared=True)
    experts, (residual_TD, shared_TD) = weights(shape, dtype), added(shape, dtype)
    assert residual_TD is not None
    assert shared_TD is not None
    slot_TK = torch.full((shape.tokens, 2), SKIP, dtype=torch.int32)
    x_TD = torch.randn(shape.tokens, shape.width).to(dtype)
    for live in (0, 1):  # all tokens dead; all but one dead
        slot_TK[:live, 0] = 3
        routing = Routing(slot_TK, (slot_TK >= 0).float())
        result = backend.moe_ffn(x_TD, routing, experts)
        assert (result[live:] == 0).all()
        assert result[:live].abs().sum() > 0 or live == 0
        assert torch.equal(backend.moe_ffn(x_TD, routing, experts, residual_TD)[live:], residual_TD[live:])
        both = backend.moe_ffn(x_TD, routing, experts, residual_TD, shared_TD)
        assert torch.equal(both[live:], (residual_TD.float() + shared_TD.float()).to(dtype)[live:])


@pytest.mark.parametrize(("activation", "expected"), HAND)
def test_each_activation_at_two(backend: Backend, activation: Activation, expected: float) -> None:
    """One expert of width 1 without a gate: w_out * act(w_in x + b_in) + b_out, then times the gate of the routing."""
    one = torch.ones(1, 1, 1)
    routing = Routing(torch.zeros(2, 1, dtype=torch.int32), torch.tensor([[1.0], [0.5]]))
    x_TD = torch.tensor([[2.0], [-2.0]])
    plain = ExpertWeights(one, one, activation=activation, gated=False)
    negative = 0.0 if activation.startswith("relu") else (expected - 2.0) / 2  # silu and gelu: f(-x) = f(x) - x
    assert backend.moe_ffn(x_TD, routing, plain).flatten().tolist() == pytest.approx([expected, negative], abs=1e-6)
    # The same 2 from 3 * 1 - 1, the answer doubled, 10 added: the output's bias is weighted as its expert is.
    biased = replace(plain, w_in_PGD=3 * one, w_out_PDF=2 * one, b_in_PG=-one[0], b_out_PD=10 * one[0])
    result = backend.moe_ffn(torch.ones(2, 1), routing, biased)
    assert result.flatten().tolist() == pytest.approx([2 * expected + 10, expected + 5], abs=1e-5)


def test_what_is_added_is_rounded_once_with_the_sum(backend: Backend) -> None:
    """2048 + .75 + .75 in float16, whose values are 2 apart there: one by one nothing happens, together it is 2050."""
    one = torch.ones(1, 1).half()
    experts = ExpertWeights(one[None], one[None], activation="relu", gated=False)
    routing = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[0.75]]))
    moe_ffn = backend.moe_ffn
    if backend.name == "reference":  # which computes in x's dtype unless told otherwise
        moe_ffn = partial(moe_ffn, accumulate=torch.float32)
    assert moe_ffn(one, routing, experts, 2048 * one).item() == 2048
    assert moe_ffn(one, routing, experts, 2048 * one, 0.75 * one).item() == 2050


def test_doubling_and_tripling_experts(backend: Backend) -> None:
    """Experts that give 2x and 3x at x = 4, gates .25 and .5: 2 + 6 = 8; without the second 2; without both 0."""
    silu_4 = 4 / (1 + math.exp(-4))
    w_in_PGD = torch.tensor([[1.0], [1 / silu_4]]).repeat(2, 1, 1)
    experts = ExpertWeights(w_in_PGD, torch.tensor([2.0, 3.0]).view(2, 1, 1))
    slot_TK = torch.tensor([[0, 1], [0, SKIP], [SKIP, SKIP]], dtype=torch.int32)
    weight_TK = torch.tensor([[0.25, 0.5], [0.25, 0.0], [0.0, 0.0]])
    result = backend.moe_ffn(torch.full((3, 1), 4.0), Routing(slot_TK, weight_TK), experts)
    assert result.flatten().tolist() == pytest.approx([8.0, 2.0, 0.0], abs=1e-5)


def test_swiglu_of_a_gate_of_ln_3_and_an_up_of_4(backend: Backend) -> None:
    """silu(ln 3) * 4 = ln 3 * 3/4 * 4 = 3 ln 3: catches gate and up in the wrong order (4 * sigmoid(4) * ln 3)."""
    experts = ExpertWeights(torch.tensor([[[math.log(3), 0.0], [4.0, 0.0]]]), torch.tensor([[[1.0], [0.0]]]))
    routing = Routing(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    result = backend.moe_ffn(torch.tensor([[1.0, 0.0]]), routing, experts)
    assert result[0].tolist() == pytest.approx([3 * math.log(3), 0.0], abs=1e-6)


def test_constants_add_their_row_times_the_gate(backend: Backend) -> None:
    """y = 2 * 0 + .25 * (8, 8) = (2, 2), and two different rows in one token add up."""
    experts = ExpertWeights(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1), torch.tensor([[8.0, 8.0], [4.0, 0.0]]))
    slot_TK = torch.tensor([[0, -2], [-3, -2], [-3, SKIP]], dtype=torch.int32)
    weight_TK = torch.tensor([[2.0, 0.25], [1.0, 0.5], [0.5, 0.0]])
    result = backend.moe_ffn(torch.ones(3, 2), Routing(slot_TK, weight_TK), experts)
    assert result.tolist() == [[2.0, 2.0], [8.0, 4.0], [2.0, 0.0]]


def test_dropping_equals_a_constant_of_zeros(backend: Backend) -> None:
    shape = SHAPES["plain"]
    experts, routing = weights(shape), random_routing(shape)
    x_TD = torch.randn(shape.tokens, shape.width)
    with_zeros = ExpertWeights(experts.w_in_PGD, experts.w_out_PDF, torch.zeros(1, shape.width))
    as_constant = Routing(
        routing.slot_TK.masked_fill(routing.slot_TK == SKIP, FIRST_CONSTANT),
        routing.weight_TK.masked_fill(routing.slot_TK == SKIP, 0.7),
    )
    dropped = backend.moe_ffn(x_TD, routing, experts)
    torch.testing.assert_close(backend.moe_ffn(x_TD, as_constant, with_zeros), dropped, rtol=1e-6, atol=1e-6)


def test_permuting_experts_with_their_slots_changes_nothing(backend: Backend) -> None:
    shape = SHAPES["an expert count that is no power of two"]
    experts, routing = weights(shape), random_routing(shape)
    x_TD = torch.randn(shape.tokens, shape.width)
    order_P = torch.randperm(shape.experts)
    new_slot_P = torch.argsort(order_P).to(torch.int32)
    live_TK = routing.slot_TK >= 0
    slot_TK = torch.where(live_TK, new_slot_P[routing.slot_TK.clamp(min=0).long()], routing.slot_TK)
    permuted = ExpertWeights(experts.w_in_PGD[order_P], experts.w_out_PDF[order_P])
    before = backend.moe_ffn(x_TD, routing, experts)
    after = backend.moe_ffn(x_TD, Routing(slot_TK, routing.weight_TK), permuted)
    assert error(after, before) < 1e-6


@pytest.mark.parametrize("normalize", [False, True])
def test_merging_equal_experts_under_tie_changes_nothing(backend: Backend, normalize: bool) -> None:
    """Experts 1 and 3 are equal; holding one of them behind both router rows gives the same outputs."""
    shape = Shape(40, 3, 5, 32, 16)
    experts = weights(shape)
    experts.w_in_PGD[3], experts.w_out_PDF[3] = experts.w_in_PGD[1], experts.w_out_PDF[1]
    kept = [0, 1, 2, 4]
    merged = ExpertWeights(experts.w_in_PGD[kept], experts.w_out_PDF[kept])
    x_TD, logits_TE = torch.randn(40, 32), torch.randn(40, 5)
    policy = RouterPolicy(top_k=3, normalize=normalize)
    full = backend.route(logits_TE, torch.arange(5, dtype=torch.int32)[None], policy)
    tied = backend.route(logits_TE, torch.tensor([[0, 1, 2, 1, 3]], dtype=torch.int32), policy)
    assert (tied.slot_TK == SKIP).any(), "no token chose both, so the test shows nothing"
    assert error(backend.moe_ffn(x_TD, tied, merged), backend.moe_ffn(x_TD, full, experts)) < 1e-6


def test_a_token_alone_equals_the_token_in_a_batch(backend: Backend) -> None:
    shape = SHAPES["plain"]
    experts, routing = weights(shape), random_routing(shape)
    x_TD = torch.randn(shape.tokens, shape.width)
    together = backend.moe_ffn(x_TD, routing, experts)
    alone = torch.cat(
        [
            backend.moe_ffn(x_TD[t : t + 1], Routing(routing.slot_TK[t : t + 1], routing.weight_TK[t : t + 1]), experts)
            for t in range(shape.tokens)
        ]
    )
    assert error(alone, together) < 1e-6


def test_twice_the_same_gives_the_same_bits() -> None:
    shape = SHAPES["many rows per expert"]
    experts, routing = weights(shape, torch.bfloat16), random_routing(shape)
    x_TD = torch.randn(shape.tokens, shape.width).to(torch.bfloat16)
    assert torch.equal(cpu.moe_ffn(x_TD, routing, experts), cpu.moe_ffn(x_TD, routing, experts))


def test_inputs_are_left_alone(backend: Backend) -> None:
    shape = SHAPES["constants beside experts"]
    experts, routing = weights(shape), random_routing(shape)
    assert experts.const_CD is not None
    x_TD = torch.randn(shape.tokens, shape.width)
    tensors = (x_TD, routing.slot_TK, routing.weight_TK, experts.w_in_PGD, experts.w_out_PDF, experts.const_CD)
    before = [tensor.clone() for tensor in tensors]
    backend.moe_ffn(x_TD, routing, experts)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu_erf", "gelu_tanh", "relu_squared"])
def test_gradients_of_the_reference(activation: Activation) -> None:
    """Through x, the gates, every tensor of the experts and what is added, against finite differences."""
    shape = Shape(3, 3, 2, 4, 3, constants=1, biases=True, residual=True, shared=True)
    e, terms = weights(shape, torch.float64), added(shape, torch.float64)
    slot_TK = torch.tensor([[0, 1, -2], [1, SKIP, -2], [SKIP, 0, SKIP]], dtype=torch.int32)
    parts = (torch.randn(3, 4), torch.rand(3, 3) + 0.1, e.w_in_PGD, e.w_out_PDF, e.const_CD, e.b_in_PG, e.b_out_PD)
    leaves = [leaf.double().detach().requires_grad_() for leaf in (*parts, *terms) if leaf is not None]

    def run(x: torch.Tensor, gate: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        w_in, w_out, const, b_in, b_out, residual, shared = rest
        experts = ExpertWeights(w_in, w_out, const, b_in, b_out, activation)
        return reference.moe_ffn(x, Routing(slot_TK, gate), experts, residual, shared)

    assert torch.autograd.gradcheck(run, leaves)
