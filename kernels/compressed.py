"""Experts that stay compressed in memory while they run: matrices with a bit mask for what is zero, or as U V + S.

Legend: T tokens, K chosen experts per token, N = T * K pairs, R rows given to one expert, P physical experts, D model
width, F expert inner width. Of one matrix: Y rows and X columns, M values kept per row, B = ceil(X / 8) bytes of mask,
L rank, Q lines of the residual.
A masked matrix is unpacked into a scratch buffer, one expert's at a time, so that what is resident is the compressed
form and one matrix. That saves memory and costs time. Low-rank products are never expanded and save time where
matrices are large. 8 experts, top 2, 8 / 512 tokens, float32, one thread of an AMD CPU, in ms, dense
(kernels/cpu.py), masked 2:4 and rank 32 with a tenth of the rows: D 128, F 208: 0.4 / 1.7, 2.9 / 4.5, 1.3 / 2.6; D
512, F 512: 1.8 / 9.2, 23 / 47, 1.7 / 6.6; D 768, F 3072: 29 / 154, 432 / 419, 4.4 / 42. On a GPU the same torch
operations run, or, for 2:4 in half precision, sparse products (kernels/sparse.py); nobody has measured either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.routing import Activation, ExpertWeights, Routing
from kernels.sparse import SparseProducts

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
class Sparse:
    """2:4 matrices that are never unpacked: packed_PYZ [P, ...] holds what `products` made of each. size: Y, X."""

    packed_PYZ: torch.Tensor
    size: tuple[int, int]
    products: SparseProducts

    def matrix(self, expert: int) -> torch.Tensor:
        unit_XX = torch.eye(self.size[1], dtype=self.packed_PYZ.dtype, device=self.packed_PYZ.device)
        return self.product(unit_XX, expert).T

    def product(self, x_RX: torch.Tensor, expert: int, linear: Linear = reference.linear) -> torch.Tensor:
        x_RX_packed = x_RX.to(self.packed_PYZ.dtype)
        return self.products.linear(x_RX_packed, self.packed_PYZ[expert], self.size).to(x_RX.dtype)


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


Stack = Dense | Masked | Sparse | Factored


@dataclass(frozen=True)
class CompressedExperts:
    """The experts of one layer, as `kernels.routing.ExpertWeights` has them, each matrix in a form of its own.

    gate and up are [P, F, D], gate is None where experts are not gated; down is [P, D, F]. num_experts: P.
    """

    gate: Stack | None
    up: Stack
    down: Stack
    num_experts: int
    const_CD: torch.Tensor | None = None
    b_in_PG: torch.Tensor | None = None
    b_out_PD: torch.Tensor | None = None
    activation: Activation = "silu"

    @property
    def gated(self) -> bool:
        return self.gate is not None

    def run(self, x_RD: torch.Tensor, expert: int, linear: Linear) -> torch.Tensor:
        """One expert on its rows: [R, D] -> [R, D]."""
        up_RF = _plus(self.up.product(x_RD, expert, linear), self.b_in_PG, expert, last=True)
        if self.gate is None:
            h_RF = reference.activate(up_RF, self.activation)
        else:
            gate_RF = _plus(self.gate.product(x_RD, expert, linear), self.b_in_PG, expert)
            h_RF = reference.activate(gate_RF, self.activation) * up_RF
        return _plus(self.down.product(h_RF, expert, linear), self.b_out_PD, expert)

    def dense(self) -> ExpertWeights:
        """The same experts with every zero written out."""
        inner = [stack for stack in (self.gate, self.up) if stack is not None]
        w_in = [torch.cat([stack.matrix(p) for stack in inner]) for p in range(self.num_experts)]
        w_out = [self.down.matrix(p) for p in range(self.num_experts)]
        return ExpertWeights(
            torch.stack(w_in),
            torch.stack(w_out),
            self.const_CD,
            self.b_in_PG,
            self.b_out_PD,
            self.activation,
            gated=self.gate is not None,
        )


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


def _plus(y_RY: torch.Tensor, bias_PZ: torch.Tensor | None, expert: int, last: bool = False) -> torch.Tensor:
    """y plus the first, or the last, Y entries of the expert's bias."""
    if bias_PZ is None:
        return y_RY
    height = y_RY.shape[1]
    bias_Z = bias_PZ[expert].to(y_RY.dtype)
    return y_RY + (bias_Z[-height:] if last else bias_Z[:height])


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
    return (torch.unflatten(padded, -1, (-1, 8)) * _bits(kept.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., B] -> bool [..., X]."""
    bits = torch.bitwise_and(mask.unsqueeze(-1), _bits(mask.device)).bool().flatten(-2)
    return bits[..., :width]


def _bits(device: torch.device) -> torch.Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
