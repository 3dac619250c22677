"""The path for a handful of tokens: no sort, no tiles, each pair multiplies its own row.

Legend: T tokens, K chosen experts per token, N = T * K pairs, D model width, F expert inner width, G = 2F (F if not
gated), C constant rows. One or two operations per weight read leave nothing for tensor cores to do; what counts is that
many programs stream weights at once. Results are rounded where the tiled path rounds.
"""

import torch
import triton
import triton.language as tl

from kernels.combine import add_constant, start_sum
from kernels.grouped_gemm import activate
from kernels.routing import ExpertWeights, Routing
from kernels.tiles import PAIR_TILES


@triton.jit
def _dot_rows(w_ptrs, x_ptr, length, BN: tl.constexpr, BK: tl.constexpr, WHOLE_K: tl.constexpr):
    """float32 [BN]: the products of BN weight rows, whose first BK values w_ptrs points at, with the row at x_ptr."""
    k_K = tl.arange(0, BK)
    acc = tl.zeros((BN, BK), tl.float32)
    for k0 in range(0, length, BK):
        if WHOLE_K:
            x_K = tl.load(x_ptr + k0 + k_K)
            w = tl.load(w_ptrs + k0)
        else:
            inside_K = k0 + k_K < length
            x_K = tl.load(x_ptr + k0 + k_K, mask=inside_K, other=0.0)
            w = tl.load(w_ptrs + k0, mask=inside_K[None, :], other=0.0)
        acc += w.to(tl.float32) * x_K.to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=["width", "inner"])
def pair_gate_up_kernel(
    x_ptr,
    slot_ptr,
    w_ptr,
    b_ptr,
    h_ptr,
    width,
    inner,
    x_stride_t,
    w_stride_p,
    w_stride_g,
    b_stride_p,
    h_stride_n,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + pair)
    if slot < 0:
        return
    n_N = tl.program_id(0) * BN + tl.arange(0, BN)
    column_N = tl.minimum(n_N, inner - 1).to(tl.int64)  # columns past F are masked where the result is written
    x_row = x_ptr + pair // TOP_K * x_stride_t
    w_ptrs = w_ptr + slot.to(tl.int64) * w_stride_p + column_N[:, None] * w_stride_g + tl.arange(0, BK)[None, :]
    gate_N = _dot_rows(w_ptrs, x_row, width, BN, BK, WHOLE_K)
    b_ptrs = b_ptr + slot.to(tl.int64) * b_stride_p + column_N
    if HAS_BIAS:
        gate_N += tl.load(b_ptrs).to(tl.float32)
    h_N = activate(gate_N, ACTIVATION)
    if GATED:
        up_N = _dot_rows(w_ptrs + inner.to(tl.int64) * w_stride_g, x_row, width, BN, BK, WHOLE_K)
        if HAS_BIAS:
            up_N += tl.load(b_ptrs + inner).to(tl.float32)
        h_N *= up_N
    tl.store(h_ptr + pair * h_stride_n + n_N, h_N.to(h_ptr.dtype.element_ty), mask=n_N < inner)


@triton.jit(do_not_specialize=["width", "inner"])
def pair_down_kernel(
    h_ptr,
    slot_ptr,
    weight_ptr,
    w_ptr,
    b_ptr,
    const_ptr,
    residual_ptr,
    shared_ptr,
    out_ptr,
    width,
    inner,
    h_stride_n,
    w_stride_p,
    w_stride_d,
    b_stride_p,
    c_stride,
    r_stride,
    s_stride,
    out_stride,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CONST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64)
    n_N = tl.program_id(0) * BN + tl.arange(0, BN)
    inside_N = n_N < width
    column_N = tl.minimum(n_N, width - 1).to(tl.int64)
    acc_N = tl.zeros((BN,), tl.float32)
    for j in range(TOP_K):
        pair = t * TOP_K + j
        slot = tl.load(slot_ptr + pair)
        weight = tl.load(weight_ptr + pair)
        if slot >= 0:
            w_ptrs = w_ptr + slot.to(tl.int64) * w_stride_p + column_N[:, None] * w_stride_d + tl.arange(0, BK)[None, :]
            y_N = _dot_rows(w_ptrs, h_ptr + pair * h_stride_n, inner, BN, BK, WHOLE_K)
            if HAS_BIAS:
                y_N += tl.load(b_ptr + slot.to(tl.int64) * b_stride_p + column_N).to(tl.float32)
            acc_N += weight * y_N.to(out_ptr.dtype.element_ty).to(tl.float32)
        if HAS_CONST:
            acc_N = add_constant(acc_N, slot, weight, const_ptr, c_stride, n_N, inside_N)
    acc_N += start_sum(t, n_N, inside_N, residual_ptr, shared_ptr, r_stride, s_stride, HAS_RESIDUAL, HAS_SHARED)
    tl.store(out_ptr + t * out_stride + n_N, acc_N.to(out_ptr.dtype.element_ty), mask=inside_N)


def pair_gate_up(x_TD: torch.Tensor, slot_TK: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """First half of every live pair's expert: [N, F] in pair order, in x's dtype; other rows are not written."""
    num_tokens, top_k = slot_TK.shape
    inner = experts.w_out_PDF.shape[2]
    h_NF = x_TD.new_empty(num_tokens * top_k, inner)
    w_in, bias = experts.w_in_PGD, experts.b_in_PG
    tile = PAIR_TILES["gate_up"]
    if num_tokens == 0:
        return h_NF
    pair_gate_up_kernel[(triton.cdiv(inner, tile.columns), num_tokens * top_k)](
        x_TD,
        slot_TK,
        w_in,
        w_in if bias is None else bias,
        h_NF,
        x_TD.shape[1],
        inner,
        x_TD.stride(0),
        w_in.stride(0),
        w_in.stride(1),
        0 if bias is None else bias.stride(0),
        h_NF.stride(0),
        TOP_K=top_k,
        BN=tile.columns,
        BK=tile.depth,
        GATED=experts.gated,
        ACTIVATION=experts.activation,
        HAS_BIAS=bias is not None,
        WHOLE_K=x_TD.shape[1] % tile.depth == 0,
        num_warps=tile.warps,
    )
    return h_NF


def pair_down(
    h_NF: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Second half and weighted sum at once: h_NF in pair order -> [T, D] in h's dtype.

    A program owns some columns of one token and walks its experts in choice order: no buffer between, no atomics.
    """
    num_tokens, top_k = routing.slot_TK.shape
    width, inner = experts.w_out_PDF.shape[1:]
    out_TD = h_NF.new_empty(num_tokens, width)
    w_out, bias = experts.w_out_PDF, experts.b_out_PD
    added = (experts.const_CD, residual_TD, shared_TD)
    tile = PAIR_TILES["down"]
    if num_tokens == 0:
        return out_TD
    pair_down_kernel[(triton.cdiv(width, tile.columns), num_tokens)](
        h_NF,
        routing.slot_TK,
        routing.weight_TK,
        w_out,
        w_out if bias is None else bias,
        *(h_NF if part is None else part for part in added),
        out_TD,
        width,
        inner,
        h_NF.stride(0),
        w_out.stride(0),
        w_out.stride(1),
        0 if bias is None else bias.stride(0),
        *(0 if part is None else part.stride(0) for part in added),
        out_TD.stride(0),
        TOP_K=top_k,
        BN=tile.columns,
        BK=tile.depth,
        HAS_BIAS=bias is not None,
        HAS_CONST=experts.const_CD is not None,
        HAS_RESIDUAL=residual_TD is not None,
        HAS_SHARED=shared_TD is not None,
        WHOLE_K=inner % tile.depth == 0,
        num_warps=tile.warps,
    )
    return out_TD
