"""The two products over tiles, the pair path and the sum, each against its twin in float64.

Legend: T tokens, K chosen experts per token, N = T * K pairs, P physical experts, D model width, F expert inner width.
On a machine with a GPU these tests run there, in bfloat16 and float32; elsewhere in the interpreter, in float16.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch

from kernels import combine, grouped_gemm, pair, reference
from kernels.routing import SKIP, Activation, ExpertWeights, Routing
from kernels.tiles import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
# ||out - ref|| / ||ref|| against float64 on the same rounded inputs, one rounding. Measured: 6e-8, 2.1e-4, 1.7e-3.
BOUNDS = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
TILES = {
    "plain": Tile(16, 32, 32, 4, 2),
    "swapped": Tile(16, 64, 32, 4, 2, swap=True),
    "copy engine": Tile(16, 32, 16, 4, 2, tma=True),
    "more rows than columns": Tile(32, 16, 16, 4, 2),
}


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@dataclass(frozen=True)
class Shape:
    tokens: int
    top_k: int
    experts: int
    width: int
    inner: int


SHAPES = {
    "whole tiles": Shape(24, 2, 4, 64, 32),
    "no multiple of any tile": Shape(33, 3, 7, 97, 47),
    "more experts than pairs": Shape(3, 2, 37, 32, 48),
    "one expert, several tiles": Shape(40, 1, 1, 16, 80),
    "one token": Shape(1, 4, 8, 48, 64),
}


def make_experts(
    shape: Shape,
    dtype: torch.dtype,
    gated: bool = True,
    bias: bool = False,
    activation: Activation = "silu",
    constants: int = 0,
) -> ExpertWeights:
    p, d, f = shape.experts, shape.width, shape.inner
    g = 2 * f if gated else f
    return ExpertWeights(
        (torch.randn(p, g, d) / math.sqrt(d)).to(dtype),
        (torch.randn(p, d, f) / math.sqrt(f)).to(dtype),
        torch.randn(constants, d).to(dtype) if constants else None,
        torch.randn(p, g).to(dtype) if bias else None,
        torch.randn(p, d).to(dtype) if bias else None,
        activation,
        gated,
    )


def make_routing(shape: Shape, skipped: float = 0.25, constants: int = 0) -> Routing:
    """Distinct slots per token; some skipped, some constants; the first token of several runs nothing."""
    ids = [*range(shape.experts), *(-2 - j for j in range(constants))]
    slot_TK = torch.stack([torch.tensor(ids)[torch.randperm(len(ids))[: shape.top_k]] for _ in range(shape.tokens)])
    slot_TK = slot_TK.masked_fill(torch.rand(slot_TK.shape) < skipped, SKIP).int()
    if shape.tokens > 1:
        slot_TK[0] = SKIP
    return Routing(slot_TK, torch.rand(slot_TK.shape).masked_fill(slot_TK == SKIP, 0.0))


def in_float64(experts: ExpertWeights) -> ExpertWeights:
    parts = {name: getattr(experts, name) for name in ("w_in_PGD", "w_out_PDF", "const_CD", "b_in_PG", "b_out_PD")}
    return replace(experts, **{name: part.double() for name, part in parts.items() if part is not None})


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def usable(tile: Tile, shape: Shape) -> bool:
    return not tile.tma or (shape.width % tile.depth == 0 and shape.inner % tile.depth == 0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("tile", TILES.values(), ids=list(TILES))
@pytest.mark.parametrize("name", SHAPES)
def test_both_products_match_their_twins_and_write_live_rows_only(name: str, tile: Tile, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    if not usable(tile, shape):
        tile = replace(tile, tma=False)
    experts, routing = make_experts(shape, dtype), make_routing(shape)
    x_TD = torch.randn(shape.tokens, shape.width).to(dtype)
    pairs = reference.sort_pairs(routing.slot_TK, shape.experts, tile.rows)
    num_live = int(pairs.offset_Q[-1])

    h_NF = grouped_gemm.gate_up(x_TD, experts, pairs, shape.top_k, tile)
    expected = reference.gate_up(x_TD.double(), in_float64(experts), pairs, shape.top_k)
    assert h_NF.dtype == dtype
    assert error(h_NF[:num_live], expected[:num_live]) < BOUNDS[dtype]
    assert h_NF[num_live:].isnan().all()  # still poisoned

    y_ND = grouped_gemm.down(h_NF, experts, pairs, tile)
    live_N = routing.slot_TK.flatten() >= 0
    expected = reference.down(h_NF.double(), in_float64(experts), pairs)
    assert y_ND.dtype == dtype
    assert error(y_ND[live_N], expected[live_N]) < BOUNDS[dtype]
    assert y_ND[~live_N].isnan().all()

    again = grouped_gemm.down(grouped_gemm.gate_up(x_TD, experts, pairs, shape.top_k, tile), experts, pairs, tile)
    assert torch.equal(y_ND[live_N], again[live_N])


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_each_activation_in_each_path(activation: Activation, gated: bool, bias: bool) -> None:
    shape = Shape(6, 2, 3, 32, 24)
    experts = make_experts(shape, torch.float32, gated, bias, activation, constants=2)
    routing = make_routing(shape, constants=2)
    x_TD, residual_TD, shared_TD = (torch.randn(shape.tokens, shape.width) for _ in range(3))
    expected = reference.moe_ffn(x_TD, routing, experts, residual_TD, shared_TD, accumulate=torch.float64)
    for swap in (False, True):
        tile = Tile(16, 16, 32, 4, 2, swap=swap)
        pairs = reference.sort_pairs(routing.slot_TK, shape.experts, tile.rows)
        y_ND = grouped_gemm.down(grouped_gemm.gate_up(x_TD, experts, pairs, 2, tile), experts, pairs, tile)
        out_TD = combine.combine(y_ND, routing, experts.const_CD, residual_TD, shared_TD)
        assert error(out_TD, expected) < BOUNDS[torch.float32]
    h_NF = pair.pair_gate_up(x_TD, routing.slot_TK, experts)
    assert error(pair.pair_down(h_NF, routing, experts, residual_TD, shared_TD), expected) < BOUNDS[torch.float32]


@pytest.mark.parametrize("group", [1, 2, 8])
def test_the_order_of_programs_changes_no_bit(group: int) -> None:
    """Tiles of two experts, one of them with several, over three blocks of columns."""
    shape = Shape(40, 1, 2, 32, 40)
    experts, routing = make_experts(shape, torch.float32), make_routing(shape, skipped=0.0)
    x_TD, tile = torch.randn(shape.tokens, shape.width), Tile(16, 16, 32, 4, 2)
    pairs = reference.sort_pairs(routing.slot_TK, shape.experts, tile.rows)
    num_live = int(pairs.offset_Q[-1])
    h_NF = grouped_gemm.gate_up(x_TD, experts, pairs, 1, tile, group)
    expected = reference.gate_up(x_TD.double(), in_float64(experts), pairs, 1)
    assert error(h_NF[:num_live], expected[:num_live]) < BOUNDS[torch.float32]


def test_silu_of_gate_times_up_by_hand() -> None:
    """x = (1, 0), gate ln 3, up 4: silu(ln 3) = 3/4 ln 3, times 4."""
    experts = ExpertWeights(torch.tensor([[[math.log(3), 9.0], [4.0, 9.0]]]), torch.zeros(1, 2, 1))
    slot_TK, x_TD = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([[1.0, 0.0]])
    pairs = reference.sort_pairs(slot_TK, 1, 16)
    h_NF = grouped_gemm.gate_up(x_TD, experts, pairs, 1, Tile(16, 16, 16, 4, 2))
    assert h_NF.item() == pytest.approx(3 * math.log(3), abs=1e-5)
    assert pair.pair_gate_up(x_TD, slot_TK, experts).item() == pytest.approx(3 * math.log(3), abs=1e-5)


@pytest.mark.parametrize(
    ("slots", "expected"), [((3, -1), (1.0, 2.0)), ((3, 0), (3.5, 7.0)), ((3, -2), (3.0, 4.0)), ((-1, -1), (0.0, 0.0))]
)
def test_the_sum_by_hand(slots: tuple[int, int], expected: tuple[float, float]) -> None:
    """Rows (2, 4) and (10, 20), weights 1/2 and 1/4, constant (8, 8); the row of a pair that ran nothing is poison."""
    slot_TK = torch.tensor([slots], dtype=torch.int32)
    y_ND = torch.tensor([[2.0, 4.0], [10.0, 20.0]]).masked_fill(slot_TK.view(2, 1) < 0, math.nan)
    routing = Routing(slot_TK, torch.tensor([[0.5, 0.25]]).masked_fill(slot_TK == SKIP, 0.0))
    const_CD = torch.tensor([[8.0, 8.0]])
    assert combine.combine(y_ND, routing, const_CD).tolist() == [list(expected)]
    shifted = combine.combine(y_ND, routing, const_CD, torch.full((1, 2), 1.0), torch.full((1, 2), 0.5))
    assert shifted.tolist() == [[value + 1.5 for value in expected]]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("width", [1, 97, 1024, 1500])
def test_the_sum_matches_its_twin(width: int, dtype: torch.dtype) -> None:
    shape = Shape(5, 3, 6, width, 1)
    routing = make_routing(shape, constants=2)
    const_CD = torch.randn(2, width).to(dtype)
    y_ND = torch.randn(15, width).to(dtype).masked_fill(routing.slot_TK.view(-1, 1) < 0, math.nan)
    residual_TD = torch.randn(5, 2 * width).to(dtype)[:, :width]  # a stride of its own
    out_TD = combine.combine(y_ND, routing, const_CD, residual_TD)
    assert out_TD.dtype == dtype
    expected = reference.combine(y_ND.double(), routing, const_CD, residual_TD, accumulate=torch.float64)
    assert error(out_TD, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("name", ["no multiple of any tile", "more experts than pairs", "one token"])
def test_the_pair_path_matches_its_twins(name: str, dtype: torch.dtype) -> None:
    shape = replace(SHAPES[name], tokens=min(SHAPES[name].tokens, 4))
    experts, routing = make_experts(shape, dtype, constants=2), make_routing(shape, constants=2)
    x_TD = torch.randn(shape.tokens, shape.width).to(dtype)
    h_NF = pair.pair_gate_up(x_TD, routing.slot_TK, experts)
    assert h_NF[routing.slot_TK.flatten() < 0].isnan().all()
    out_TD = pair.pair_down(h_NF, routing, experts)
    assert out_TD.dtype == dtype
    expected = reference.moe_ffn(x_TD, routing, experts, accumulate=torch.float64)
    assert error(out_TD, expected) < 2.5 * BOUNDS[dtype]  # h, y and the result are rounded
    assert torch.equal(out_TD, pair.pair_down(h_NF, routing, experts))


def surrounded(part: torch.Tensor) -> torch.Tensor:
    """The same numbers as a view into a larger tensor that is NaN everywhere else."""
    larger = torch.full([size + 9 for size in part.shape], math.nan, dtype=part.dtype)
    view = larger[tuple(slice(4, 4 + size) for size in part.shape)]
    view.copy_(part)
    return view


@pytest.mark.parametrize("depth", [16, 32])
def test_rows_of_views_are_read_where_they_lie_and_nothing_beside_them(depth: int) -> None:
    """Row and expert strides of their own; a depth of 32 has to mask the second half of each row."""
    shape = Shape(9, 2, 3, 16, 24)
    experts, routing = make_experts(shape, torch.float32), make_routing(shape)
    x_TD = surrounded(torch.randn(9, 16))
    expected = reference.moe_ffn(x_TD, routing, experts, accumulate=torch.float64)
    views = ExpertWeights(surrounded(experts.w_in_PGD), surrounded(experts.w_out_PDF))
    tile = Tile(16, 16, depth, 4, 2)
    pairs = reference.sort_pairs(routing.slot_TK, 3, tile.rows)
    y_ND = grouped_gemm.down(grouped_gemm.gate_up(x_TD, views, pairs, 2, tile), views, pairs, tile)
    assert error(combine.combine(y_ND, routing), expected) < BOUNDS[torch.float32]
    h_NF = pair.pair_gate_up(x_TD, routing.slot_TK, views)
    assert error(pair.pair_down(h_NF, routing, views), expected) < BOUNDS[torch.float32]


# Four experts far apart in 8 GB of memory that nobody touches (most of it stays virtual): an index that is multiplied
# before it is widened wraps around and reads outside the tensor. The stride just below 2^31 fits 32 bits, its products
# do not.
FAR_APART = """
import torch
from kernels import grouped_gemm, pair, reference
from kernels.routing import ExpertWeights, Routing
from kernels.tiles import Tile

stride = {stride}
memory = torch.empty(3 * stride + 64, dtype=torch.float16)
w_in_PGD = memory.as_strided((4, 4, 16), (stride, 16, 1))
w_out_PDF = torch.empty(3 * stride + 64, dtype=torch.float16).as_strided((4, 16, 2), (stride, 2, 1))
w_in_PGD[3], w_out_PDF[3] = 0.25, 0.5
experts = ExpertWeights(w_in_PGD, w_out_PDF)
slot_TK = torch.tensor([[3]], dtype=torch.int32)
x_TD = torch.empty(2**20 * 3 + 16, dtype=torch.float16).as_strided((4, 16), (2**20, 1))[3:]
x_TD[:] = 1.0
pairs, tile = reference.sort_pairs(slot_TK, 4, 16), Tile(16, 16, 16, 4, 2)
y_ND = grouped_gemm.down(grouped_gemm.gate_up(x_TD, experts, pairs, 1, tile), experts, pairs, tile)
out_TD = pair.pair_down(pair.pair_gate_up(x_TD, slot_TK, experts), Routing(slot_TK, torch.ones(1, 1)), experts)
print(y_ND[0, 0].item(), out_TD[0, 0].item())  # 4 * 4 / (1 + exp(-4)) = 15.71, twice, halved
"""


@pytest.mark.parametrize("stride", [2**30 + 64, 2**31 - 16])
def test_weights_beyond_two_to_the_31_elements(stride: int) -> None:
    if DEVICE == "cuda":
        pytest.skip("the memory would not be virtual")
    done = subprocess.run(
        [sys.executable, "-c", FAR_APART.format(stride=stride)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [float(value) for value in done.stdout.split()] == pytest.approx([15.71, 15.71], abs=0.02)


def test_what_a_caller_could_get_wrong_is_refused() -> None:
    shape = Shape(4, 1, 2, 48, 16)
    experts, routing, x_TD = make_experts(shape, torch.float32), make_routing(shape), torch.randn(4, 48)
    pairs = reference.sort_pairs(routing.slot_TK, 2, 16)
    with pytest.raises(ValueError, match="32 rows but the pairs were cut into tiles of 16"):
        grouped_gemm.gate_up(x_TD, experts, pairs, 1, Tile(32, 16, 16, 4, 2))
    with pytest.raises(ValueError, match=r"torch.float64.*must be one of"):
        grouped_gemm.gate_up(x_TD.double(), in_float64(experts), pairs, 1, TILES["plain"])
    with pytest.raises(ValueError, match=r"rows are torch.float16 and weights torch.float32"):
        grouped_gemm.gate_up(x_TD.half(), experts, pairs, 1, TILES["plain"])
    with pytest.raises(ValueError, match="contiguous in their last dimension"):
        grouped_gemm.gate_up(x_TD.t().contiguous().t(), experts, pairs, 1, TILES["plain"])
    with pytest.raises(ValueError, match="a depth that divides 48"):
        grouped_gemm.gate_up(x_TD, experts, pairs, 1, Tile(16, 16, 32, 4, 2, tma=True))
