"""Each token's weighted sum of what its experts answered, in one pass and one fixed order.

Legend: T tokens, K chosen experts per token, N = T * K pairs, D model width, C constant rows.
"""

import torch
import triton
import triton.language as tl

from kernels.routing import Routing

COLUMNS = 1024


@triton.jit
def start_sum(t, d_B, inside_B, residual_ptr, shared_ptr, r_stride, s_stride, R: tl.constexpr, S: tl.constexpr):
    """float32 residual + shared expert of token t, or zeros."""
    acc_B = tl.zeros_like(d_B).to(tl.float32)
    if R:
        acc_B += tl.load(residual_ptr + t * r_stride + d_B, mask=inside_B, other=0.0).to(tl.float32)
    if S:
        acc_B += tl.load(shared_ptr + t * s_stride + d_B, mask=inside_B, other=0.0).to(tl.float32)
    return acc_B


@triton.jit
def add_constant(acc_B, slot, weight, const_ptr, c_stride, d_B, inside_B):
    """Adds weight * const_CD[-2 - slot] if the slot is a constant's."""
    row = tl.maximum(-2 - slot, 0).to(tl.int64)
    value_B = tl.load(const_ptr + row * c_stride + d_B, mask=tl.where(slot <= -2, inside_B, False), other=0.0)
    return acc_B + weight * value_B.to(tl.float32)


@triton.jit
def combine_kernel(
    y_ptr,
    slot_ptr,
    weight_ptr,
    const_ptr,
    residual_ptr,
    shared_ptr,
    out_ptr,
    width,
    y_stride,
    c_stride,
    r_stride,
    s_stride,
    out_stride,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_CONST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d_B = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_B = d_B < width
    acc_B = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = t * TOP_K + j
        slot = tl.load(slot_ptr + pair)
        weight = tl.load(weight_ptr + pair)
        # The row of a pair without an expert was never written: it must not be read, since 0 * NaN is NaN.
        y_B = tl.load(y_ptr + pair * y_stride + d_B, mask=tl.where(slot >= 0, inside_B, False), other=0.0)
        acc_B += weight * y_B.to(tl.float32)
        if HAS_CONST:
            acc_B = add_constant(acc_B, slot, weight, const_ptr, c_stride, d_B, inside_B)
    acc_B += start_sum(t, d_B, inside_B, residual_ptr, shared_ptr, r_stride, s_stride, HAS_RESIDUAL, HAS_SHARED)
    tl.store(out_ptr + t * out_stride + d_B, acc_B.to(out_ptr.dtype.element_ty), mask=inside_B)


def combine(
    y_ND: torch.Tensor,
    routing: Routing,
    const_CD: torch.Tensor | None = None,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.combine`: [T, D] in y's dtype, summed in float32 in choice order; no atomics."""
    num_tokens, top_k = routing.slot_TK.shape
    width = y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out_TD
    combine_kernel[(num_tokens, triton.cdiv(width, COLUMNS))](
        y_ND,
        routing.slot_TK,
        routing.weight_TK,
        *(y_ND if part is None else part for part in (const_CD, residual_TD, shared_TD)),
        out_TD,
        width,
        y_ND.stride(0),
        *(0 if part is None else part.stride(0) for part in (const_CD, residual_TD, shared_TD)),
        out_TD.stride(0),
        TOP_K=top_k,
        COLUMNS=COLUMNS,
        HAS_CONST=const_CD is not None,
        HAS_RESIDUAL=residual_TD is not None,
        HAS_SHARED=shared_TD is not None,
        num_warps=4,
    )
    return out_TD
