"""Experts that stay compressed in memory while they run: matrices with a bit mask for what is zero, or as U V + S.

Legend: T tokens, K chosen experts per token, N = T * K pairs, R rows given to one expert, P physical experts, D model
width, F expert inner width. Of one matrix: Y rows and X columns, M values kept per row, B = ceil(X / 8) bytes of mask,
L rank, Q lines of the residual.
One expert's matrix at a time is unpacked into a scratch buffer, so that what is resident is the compressed form and one
matrix. That saves memory and no time: on one thread of an AMD CPU, unpacking 512 x 512 half of which is zero takes
1.0 ms, the product with 16 rows 0.1 ms. Low-rank products are never expanded and save time as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.routing import ExpertWeights, Routing

Linear = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Dense:
    """Matrices that were left as they are: w_PYX [P, Y, X]."""

    w_PYX: torch.Tensor

    def matrix(self, expert: int) -> torch.Tensor:
        return self.w_PYX[expert]

    def product(self, x_RX: torch.Tensor, expert: int, linear: Linear) -> torch.Tensor:
        return linear(x_RX, self.w_PYX[expert].to(x_RX.dtype))


@dataclass(frozen=True)
class Masked:
    """Matrices without their zeros; all rows keep equally many values.

    value_PYM  what is kept, in the order of columns.
    mask_PYB   uint8: bit i of byte b says whether column 8 b + i is kept; bits past `width` columns mean nothing.
    2:4 needs two bits for the place of each kept value elsewhere, which is one bit per column as here.
    """

    value_PYM: torch.Tensor
    mask_PYB: torch.Tensor
    width: int

    def matrix(self, expert: int) -> torch.Tensor:
        value_YM = self.value_PYM[expert]
        kept_YX = unpack_bits(self.mask_PYB[expert], self.width)
        return value_YM.new_zeros(kept_YX.shape).masked_scatter(kept_YX, value_YM)

    def product(self, x_RX: torch.Tensor, expert: int, linear: Linear) -> torch.Tensor:
        return linear(x_RX, self.matrix(expert).to(x_RX.dtype))


@dataclass(frozen=True)
class Factored:
    """W = U V + S, where S has whole rows, or whole columns, and zeros elsewhere.

    u_PYL, v_PLX. rows_PQX: the rows of S, or cols_PYQ: its columns; index_PQ int32: which they are. None without S.
    """

    u_PYL: torch.Tensor
    v_PLX: torch.Tensor
    rows_PQX: torch.Tensor | None = None
    cols_PYQ: torch.Tensor | None = None
    index_PQ: torch.Tensor | None = None

    def matrix(self, expert: int) -> torch.Tensor:
        w_YX = self.u_PYL[expert] @ self.v_PLX[expert]
        if self.index_PQ is None:
            return w_YX
        if self.rows_PQX is not None:
            return w_YX.index_add(0, self.index_PQ[expert], self.rows_PQX[expert])
        assert self.cols_PYQ is not None
        return w_YX.index_add(1, self.index_PQ[expert], self.cols_PYQ[expert])

    def product(self, x_RX: torch.Tensor, expert: int, linear: Linear) -> torch.Tensor:
        dtype = x_RX.dtype
        y_RY = linear(linear(x_RX, self.v_PLX[expert].to(dtype)), self.u_PYL[expert].to(dtype))
        if self.index_PQ is None:
            return y_RY
        index_Q = self.index_PQ[expert]
        if self.rows_PQX is not None:
            return y_RY.index_add(1, index_Q, linear(x_RX, self.rows_PQX[expert].to(dtype)))
        assert self.cols_PYQ is not None
        return y_RY + linear(x_RX.index_select(1, index_Q), self.cols_PYQ[expert].to(dtype))


Stack = Dense | Masked | Factored


@dataclass(frozen=True)
class CompressedExperts:
    """The experts of one layer: down @ (silu(gate @ x) * up @ x). gate and up are [P, F, D], down is [P, D, F]; each
    keeps its own form. const_CD: as in `kernels.routing.ExpertWeights`. num_experts: P."""

    gate: Stack
    up: Stack
    down: Stack
    num_experts: int
    const_CD: torch.Tensor | None = None

    def run(self, x_RD: torch.Tensor, expert: int, linear: Linear) -> torch.Tensor:
        """One expert on its rows: [R, D] -> [R, D]."""
        h_RF = F.silu(self.gate.product(x_RD, expert, linear)) * self.up.product(x_RD, expert, linear)
        return self.down.product(h_RF, expert, linear)

    def dense(self) -> ExpertWeights:
        """The same experts with every zero written out, computed in float64."""
        experts = range(self.num_experts)
        w_in = [torch.cat((self.gate.matrix(p).double(), self.up.matrix(p).double())) for p in experts]
        w_out = [self.down.matrix(p).double() for p in experts]
        return ExpertWeights(torch.stack(w_in), torch.stack(w_out), self.const_CD)


def moe_ffn(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: CompressedExperts,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
    accumulate: torch.dtype | None = None,
    linear: Linear = reference.linear,
) -> torch.Tensor:
    """As `reference.moe_ffn`, for compressed experts, on any device, with gradients where they are asked for.

    Pairs are sorted by expert once; experts without rows cost nothing. Products are rounded to `accumulate` (default:
    x's dtype), the weighted sum over a token's choices runs in float32 at least. linear: the backend's product.
    On a GPU, each layer waits for the counts of rows, which rules out CUDA graphs.
    """
    dtype = accumulate or x_TD.dtype
    top_k = routing.slot_TK.shape[1]
    slot_N = torch.where(routing.slot_TK >= 0, routing.slot_TK, experts.num_experts).flatten()
    order_N = torch.argsort(slot_N, stable=True)
    count_P = torch.bincount(slot_N, minlength=experts.num_experts + 1)[:-1].tolist()
    y_ND = torch.zeros(slot_N.numel(), x_TD.shape[1], dtype=dtype, device=x_TD.device)
    start = 0
    for expert, count in enumerate(count_P):
        if count:
            pair_R = order_N[start : start + count]
            x_RD = x_TD.index_select(0, pair_R // top_k).to(dtype)
            y_ND[pair_R] = experts.run(x_RD, expert, linear)
            start += count
    sum_dtype = torch.promote_types(dtype, torch.float32)
    out_TD = reference.combine(y_ND, routing, experts.const_CD, residual_TD, shared_TD, accumulate=sum_dtype)
    return out_TD.to(x_TD.dtype)


def pack(w_PYX: torch.Tensor, kept_PYX: torch.Tensor) -> Masked:
    """The kept values and their mask. kept_PYX: bool. Raises ValueError unless all rows keep equally many."""
    num_experts, height, width = w_PYX.shape
    count_PY = kept_PYX.sum(-1)
    kept = int(count_PY.max())
    if not bool((count_PY == kept).all()):
        raise ValueError("rows keep unequal numbers of values")
    return Masked(w_PYX[kept_PYX].view(num_experts, height, kept), pack_bits(kept_PYX), width)


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """bool [..., X] -> uint8 [..., B], column 8 b + i in bit i of byte b."""
    padded = F.pad(kept.to(torch.uint8), (0, -kept.shape[-1] % 8))
    return (padded.unflatten(-1, (-1, 8)) * _bits(kept.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., B] -> bool [..., X]."""
    bits = torch.bitwise_and(mask.unsqueeze(-1), _bits(mask.device)).bool().flatten(-2)
    return bits[..., :width]


def _bits(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
