"""Compressed experts: their bits, their bytes, and the same answers as the dense experts that they stand for.

Legend: T tokens, P physical experts, D model width, F expert inner width. Of one matrix: Y rows, X columns, M values
kept per row, B bytes of mask, L rank, Q lines of the residual.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from kernels import cpu, reference
from kernels.compressed import CompressedExperts, Dense, Factored, Masked, Stack, moe_ffn, pack, pack_bits, unpack_bits
from kernels.routing import ExpertWeights, Routing
from tests.kernels.test_moe_ffn import Shape, added, error, oracle, random_routing, weights

# ||out - ref|| / ||ref|| against float64 on the same rounded parts. The worst of five draws of all shapes: 3e-7 and
# 6.4e-3 where zeros are left out, 7e-7 and 9.8e-3 for factors, which round more often than one dense product.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
LINEAR = {"reference": reference.linear, "cpu": cpu.linear}
FORMS = ("dense", "2:4", "4:8", "half", "low rank", "rows", "columns")


def stack(w_PYX: torch.Tensor, form: str) -> tuple[Stack, torch.Tensor]:
    """The matrices in this form, and the dense ones that they stand for, put together by numpy."""
    num_experts, height, width = w_PYX.shape
    if form == "dense":
        return Dense(w_PYX), w_PYX.double()
    if form in ("2:4", "4:8", "half"):
        group = {"2:4": 4, "4:8": 8, "half": width}[form]
        kept = {"2:4": 2, "4:8": 4, "half": width // 2}[form]
        score = torch.rand(num_experts, height, width // group, group)
        kept_PYX = (score.argsort(-1).argsort(-1) < kept).view_as(w_PYX)
        return pack(w_PYX, kept_PYX), w_PYX.double() * kept_PYX
    u_PYL, v_PLX = torch.randn(num_experts, height, 3).to(w_PYX) / 2, torch.randn(num_experts, 3, width).to(w_PYX) / 2
    dense = u_PYL.double() @ v_PLX.double()
    if form == "low rank":
        return Factored(u_PYL, v_PLX), dense
    axis = 1 if form == "rows" else 2
    lines = [torch.randperm(w_PYX.shape[axis])[:5].sort().values for _ in range(num_experts)]
    lines_of = [w_YX.index_select(axis - 1, index) for w_YX, index in zip(w_PYX, lines, strict=True)]
    for expert, index in enumerate(lines):
        where = (expert, index) if form == "rows" else (expert, slice(None), index)
        dense[where] += lines_of[expert].double()
    index_PQ = torch.stack(lines).to(torch.int32)
    named = {"rows_PQX" if form == "rows" else "cols_PYQ": torch.stack(lines_of)}
    return Factored(u_PYL, v_PLX, **named, index_PQ=index_PQ), dense


def compress(dense: ExpertWeights, form: str) -> tuple[CompressedExperts, ExpertWeights]:
    """Every matrix in this form, and dense experts in float64 that must give the same answers."""
    inner = torch.split(dense.w_in_PGD, dense.w_out_PDF.shape[2], dim=1)
    parts = [stack(w_PYX, form) for w_PYX in (*inner, dense.w_out_PDF)]
    gate, (up, _), (down, _) = (parts[0][0] if dense.gated else None), parts[-2], parts[-1]
    rest = (dense.const_CD, dense.b_in_PG, dense.b_out_PD, dense.activation)
    compressed = CompressedExperts(gate, up, down, dense.w_out_PDF.shape[0], *rest)
    w_in = torch.cat([part[1] for part in parts[:-1]], dim=1)
    return compressed, replace(dense, w_in_PGD=w_in, w_out_PDF=parts[-1][1])


SHAPES = {
    "plain": Shape(24, 2, 8, 64, 32),
    "one token": Shape(1, 2, 4, 64, 32),
    "fewer tokens than experts, so some get none": Shape(3, 2, 20, 32, 16),
    "constants, a residual and a shared expert": Shape(24, 4, 6, 48, 40, constants=3, residual=True, shared=True),
    "no gate, biases": Shape(24, 3, 5, 40, 48, activation="gelu_tanh", gated=False, biases=True),
    "a gate, biases": Shape(24, 3, 5, 40, 48, biases=True),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_those_of_the_dense_experts(name: str, form: str, linear: str, dtype: torch.dtype) -> None:
    torch.manual_seed(len(name) + len(form))
    shape = SHAPES[name]
    experts, dense = compress(weights(shape, dtype), form)
    x_TD, routing = torch.randn(shape.tokens, shape.width).to(dtype), random_routing(shape)
    residual_TD, shared_TD = added(shape, dtype)
    with torch.no_grad():
        out_TD = moe_ffn(x_TD, routing, experts, residual_TD, shared_TD, linear=LINEAR[linear])
    assert out_TD.dtype == dtype
    assert error(out_TD, oracle(x_TD, routing, dense, residual_TD, shared_TD)) < BOUNDS[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_accumulating_in_float64_leaves_the_rounding_of_the_result_only(form: str) -> None:
    torch.manual_seed(0)
    shape = SHAPES["plain"]
    experts, dense = compress(weights(shape, torch.bfloat16), form)
    x_TD, routing = torch.randn(shape.tokens, shape.width), random_routing(shape)
    out_TD = moe_ffn(x_TD, routing, experts, accumulate=torch.float64)
    assert error(out_TD, oracle(x_TD, routing, dense)) < 1e-7
    written_out = experts.dense()
    if form not in ("low rank", "rows", "columns"):  # whose product is rounded to bfloat16 when it is written out
        assert torch.equal(written_out.w_in_PGD.double(), dense.w_in_PGD)
    assert written_out.gated


def test_a_tokens_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(1)
    experts, _ = compress(weights(Shape(16, 2, 4, 32, 16)), "rows")
    x_TD, routing = torch.randn(16, 32), random_routing(Shape(16, 2, 4, 32, 16))
    together = moe_ffn(x_TD, routing, experts)
    for t in range(16):
        alone = moe_ffn(x_TD[t : t + 1], Routing(routing.slot_TK[t : t + 1], routing.weight_TK[t : t + 1]), experts)
        torch.testing.assert_close(alone[0], together[t], rtol=1e-5, atol=1e-6)


def test_no_token_and_no_live_pair() -> None:
    experts, _ = compress(weights(Shape(4, 2, 4, 32, 16)), "2:4")
    nothing = Routing(torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2))
    assert moe_ffn(torch.zeros(0, 32), nothing, experts).shape == (0, 32)
    skipped = Routing(torch.full((3, 2), -1, dtype=torch.int32), torch.zeros(3, 2))
    assert torch.equal(moe_ffn(torch.randn(3, 32), skipped, experts), torch.zeros(3, 32))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 29])
def test_bits_are_numpys(width: int) -> None:
    kept = torch.rand(3, 5, width) < 0.5
    packed = pack_bits(kept)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack_bits(packed, width), kept)


def test_two_of_four_by_hand() -> None:
    """Columns 0 and 3, then 5 and 6, are bits 0, 3, 5 and 6: 1 + 8 + 32 + 64."""
    w_PYX = torch.tensor([[[1.0, 0, 0, 2, 0, 3, 4, 0]]])
    packed = pack(w_PYX, w_PYX != 0)
    assert packed.value_PYM.tolist() == [[[1, 2, 3, 4]]]
    assert packed.mask_PYB.tolist() == [[[105]]]
    assert torch.equal(packed.matrix(0), w_PYX[0])


@pytest.mark.parametrize(("form", "share"), [("2:4", 0.5625), ("4:8", 0.5625), ("half", 0.5625)])
def test_bytes_in_bfloat16(form: str, share: float) -> None:
    """Half the values of 2 bytes, and a bit for each column."""
    packed, _ = stack(torch.randn(3, 16, 64, dtype=torch.bfloat16), form)
    assert isinstance(packed, Masked)
    stored = sum(t.untyped_storage().nbytes() for t in (packed.value_PYM, packed.mask_PYB))
    assert stored == share * 3 * 16 * 64 * 2


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="unequal"):
        pack(torch.ones(1, 2, 4), torch.tensor([[[True, True, False, False], [True, False, False, False]]]))


@pytest.mark.parametrize("form", ["half", "rows", "columns"])
def test_gradients_are_those_of_the_dense_experts(form: str) -> None:
    """What recovery trains: kept values, factors and lines; what is zero stays zero."""
    torch.manual_seed(2)
    shape = Shape(12, 2, 3, 32, 16)
    experts, _ = compress(weights(shape), form)
    trained: list[torch.Tensor] = []
    for part in (experts.gate, experts.up, experts.down):
        trained += [t.requires_grad_() for t in vars(part).values() if _is_float(t)]
    x_TD, routing = torch.randn(12, 32), random_routing(shape)
    target = torch.randn(12, 32)
    run = partial(torch.autograd.grad, inputs=trained)
    found = run((moe_ffn(x_TD, routing, experts) * target).sum())
    dense = experts.dense()
    expected = run((reference.moe_ffn(x_TD, routing, dense) * target).sum())
    for got, want in zip(found, expected, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
