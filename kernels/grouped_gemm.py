"""The two products of the experts, over tiles of pairs that share an expert.

Legend: T tokens, K chosen experts per token, N = T * K pairs, P physical experts, D model width, F expert inner width,
G = 2F (F if not gated), BM x BN x BK the tile. Weights are read in checkpoint layout: gate and up are two accumulators
that share the tile of x, so no [N, 2F] intermediate exists. Every element of a result has one writer.
"""

import torch
import triton
import triton.language as tl

from kernels.routing import ExpertWeights, SortedPairs
from kernels.tiles import Tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`reference.activate` on float32."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "gelu_erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps NaN
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        return tl.where(x < 0, 0.0, x * x)


@triton.jit
def sigmoid(x):
    """Below -80 the result is 0 beside any float16 or bfloat16 value; the bound keeps exp from overflowing."""
    return 1.0 / (1.0 + tl.exp(-tl.maximum(x, -80.0)))


@triton.jit
def _locate(num_tiles, columns, BN: tl.constexpr, GROUP: tl.constexpr):
    """(tile, first column) of this program. GROUP tiles take turns over the columns, so that an expert with several
    tiles finds its weights in the L2 cache; live programs come first."""
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(columns, BN)
    per_group = GROUP * num_blocks
    first = pid // per_group * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    inside = pid % per_group
    return first + inside % size, inside // size * BN


@triton.jit
def _rows(tile, tile_row, tile_rows, BM: tl.constexpr):
    """Sorted rows of a tile and which of them exist; the missing ones repeat the last, so that loads need no mask."""
    m = tl.arange(0, BM)
    count = tl.load(tile_rows + tile)
    return tl.load(tile_row + tile) + tl.minimum(m, count - 1), m < count


@triton.jit
def _product(acc, rows, weights, SWAP: tl.constexpr):
    """acc + rows [BM, BK] @ weights [BN, BK]^T, as [BM, BN], or transposed if SWAP."""
    if SWAP:
        return tl.dot(weights, tl.trans(rows), acc, input_precision="ieee")
    else:
        return tl.dot(rows, tl.trans(weights), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["width", "inner"])
def gate_up_kernel(
    x_ptr,
    w_ptr,  # or the descriptor of w_in_PGD if TMA
    b_ptr,
    h_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    num_tiles_ptr,
    width,
    inner,
    x_stride_t,
    w_stride_p,
    w_stride_g,
    b_stride_p,
    h_stride_n,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
):
    num_tiles = tl.load(num_tiles_ptr)
    if tl.program_id(0) >= num_tiles * tl.cdiv(inner, BN):
        return
    tile, n0 = _locate(num_tiles, inner, BN, GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    row_M, live_M = _rows(tile, tile_row_ptr, tile_rows_ptr, BM)
    token_M = tl.load(order_ptr + row_M) // TOP_K
    n_N = n0 + tl.arange(0, BN)
    k_K = tl.arange(0, BK)
    x_ptrs = x_ptr + token_M.to(tl.int64)[:, None] * x_stride_t + k_K[None, :]
    # Columns past F repeat the last one: harmless, they are masked where the result is written.
    column_N = tl.minimum(n_N, inner - 1)
    if TMA:
        gate_ptrs = x_ptrs
        up_ptrs = x_ptrs
    else:
        w_base = w_ptr + expert.to(tl.int64) * w_stride_p
        gate_ptrs = w_base + column_N.to(tl.int64)[:, None] * w_stride_g + k_K[None, :]
        up_ptrs = w_base + (column_N + inner).to(tl.int64)[:, None] * w_stride_g + k_K[None, :]

    if SWAP:
        gate = tl.zeros((BN, BM), tl.float32)
    else:
        gate = tl.zeros((BM, BN), tl.float32)
    up = gate
    for k0 in range(0, width, BK):
        if WHOLE_K:
            x = tl.load(x_ptrs + k0)
        else:
            x = tl.load(x_ptrs + k0, mask=(k0 + k_K < width)[None, :], other=0.0)
        if TMA:
            w = w_ptr.load([expert, n0, k0]).reshape(BN, BK)
        elif WHOLE_K:
            w = tl.load(gate_ptrs + k0)
        else:
            w = tl.load(gate_ptrs + k0, mask=(k0 + k_K < width)[None, :], other=0.0)
        gate = _product(gate, x, w, SWAP)
        if GATED:
            if TMA:
                w = w_ptr.load([expert, inner + n0, k0]).reshape(BN, BK)
            elif WHOLE_K:
                w = tl.load(up_ptrs + k0)
            else:
                w = tl.load(up_ptrs + k0, mask=(k0 + k_K < width)[None, :], other=0.0)
            up = _product(up, x, w, SWAP)

    if HAS_BIAS:
        b_base = b_ptr + expert.to(tl.int64) * b_stride_p
        bias_N = tl.load(b_base + column_N).to(tl.float32)
        gate += bias_N[:, None] if SWAP else bias_N[None, :]
    h = activate(gate, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            bias_N = tl.load(b_base + inner + column_N).to(tl.float32)
            up += bias_N[:, None] if SWAP else bias_N[None, :]
        h *= up
    if SWAP:
        h = tl.trans(h)
    h_ptrs = h_ptr + row_M.to(tl.int64)[:, None] * h_stride_n + n_N[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=live_M[:, None] & (n_N < inner)[None, :])


@triton.jit(do_not_specialize=["width", "inner"])
def down_kernel(
    h_ptr,  # or its descriptor if TMA
    w_ptr,  # or the descriptor of w_out_PDF if TMA
    b_ptr,
    y_ptr,
    order_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_rows_ptr,
    num_tiles_ptr,
    width,
    inner,
    h_stride_n,
    w_stride_p,
    w_stride_d,
    b_stride_p,
    y_stride_n,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
):
    num_tiles = tl.load(num_tiles_ptr)
    if tl.program_id(0) >= num_tiles * tl.cdiv(width, BN):
        return
    tile, n0 = _locate(num_tiles, width, BN, GROUP)
    expert = tl.load(tile_expert_ptr + tile)
    first_row = tl.load(tile_row_ptr + tile)
    row_M, live_M = _rows(tile, tile_row_ptr, tile_rows_ptr, BM)
    n_N = n0 + tl.arange(0, BN)
    k_K = tl.arange(0, BK)
    column_N = tl.minimum(n_N, width - 1)
    if not TMA:
        h_ptrs = h_ptr + row_M.to(tl.int64)[:, None] * h_stride_n + k_K[None, :]
        w_ptrs = w_ptr + expert.to(tl.int64) * w_stride_p + column_N.to(tl.int64)[:, None] * w_stride_d + k_K[None, :]

    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, inner, BK):
        if TMA:
            # Rows past the tile belong to another expert or to nobody: each result row depends on its own row only.
            h = h_ptr.load([first_row, k0])
            w = w_ptr.load([expert, n0, k0]).reshape(BN, BK)
        elif WHOLE_K:
            h = tl.load(h_ptrs + k0)
            w = tl.load(w_ptrs + k0)
        else:
            inside = (k0 + k_K < inner)[None, :]
            h = tl.load(h_ptrs + k0, mask=inside, other=0.0)
            w = tl.load(w_ptrs + k0, mask=inside, other=0.0)
        acc = _product(acc, h, w, SWAP)

    if HAS_BIAS:
        bias_N = tl.load(b_ptr + expert.to(tl.int64) * b_stride_p + column_N).to(tl.float32)
        acc += bias_N[:, None] if SWAP else bias_N[None, :]
    if SWAP:
        acc = tl.trans(acc)
    pair_M = tl.load(order_ptr + row_M)
    y_ptrs = y_ptr + pair_M.to(tl.int64)[:, None] * y_stride_n + n_N[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=live_M[:, None] & (n_N < width)[None, :])


def gate_up(
    x_TD: torch.Tensor, experts: ExpertWeights, pairs: SortedPairs, top_k: int, tile: Tile, group: int = 1
) -> torch.Tensor:
    """`reference.gate_up`: [N, F] in sorted order, in x's dtype; rows of no tile are not written.

    x_TD and the weights: bfloat16, float16 or float32, the last dimension contiguous. tile.rows must be
    pairs.block_rows.
    """
    num_pairs, inner = pairs.order_N.shape[0], experts.w_out_PDF.shape[2]
    h_NF = x_TD.new_empty(num_pairs, inner)
    w_in, bias = experts.w_in_PGD, experts.b_in_PG
    if num_pairs == 0:
        return h_NF
    _check(tile, pairs, x_TD, w_in)
    grid = (pairs.tile_expert_M.shape[0] * triton.cdiv(inner, tile.columns),)
    gate_up_kernel[grid](
        x_TD,
        _descriptor(w_in, [1, tile.columns, tile.depth]) if tile.tma else w_in,
        bias if bias is not None else w_in,
        h_NF,
        *_walk(pairs),
        x_TD.shape[1],
        inner,
        x_TD.stride(0),
        w_in.stride(0),
        w_in.stride(1),
        bias.stride(0) if bias is not None else 0,
        h_NF.stride(0),
        TOP_K=top_k,
        **_options(tile, group, x_TD.shape[1]),
        GATED=experts.gated,
        ACTIVATION=experts.activation,
        HAS_BIAS=bias is not None,
    )
    return h_NF


def down(h_NF: torch.Tensor, experts: ExpertWeights, pairs: SortedPairs, tile: Tile, group: int = 1) -> torch.Tensor:
    """`reference.down`: unweighted [N, D] in pair order, in h's dtype; rows of pairs without an expert are not written.

    Dtypes, layout and tile as in `gate_up`.
    """
    num_pairs, width = h_NF.shape[0], experts.w_out_PDF.shape[1]
    y_ND = h_NF.new_empty(num_pairs, width)
    w_out, bias = experts.w_out_PDF, experts.b_out_PD
    if num_pairs == 0:
        return y_ND
    _check(tile, pairs, h_NF, w_out)
    grid = (pairs.tile_expert_M.shape[0] * triton.cdiv(width, tile.columns),)
    down_kernel[grid](
        _descriptor(h_NF, [tile.rows, tile.depth]) if tile.tma else h_NF,
        _descriptor(w_out, [1, tile.columns, tile.depth]) if tile.tma else w_out,
        bias if bias is not None else w_out,
        y_ND,
        *_walk(pairs),
        width,
        h_NF.shape[1],
        h_NF.stride(0),
        w_out.stride(0),
        w_out.stride(1),
        bias.stride(0) if bias is not None else 0,
        y_ND.stride(0),
        **_options(tile, group, h_NF.shape[1]),
        HAS_BIAS=bias is not None,
    )
    return y_ND


def _walk(pairs: SortedPairs) -> tuple[torch.Tensor, ...]:
    return pairs.order_N, pairs.tile_expert_M, pairs.tile_row_M, pairs.tile_rows_M, pairs.num_tiles_1


def _options(tile: Tile, group: int, depth: int) -> dict[str, int | bool]:
    """What both kernels are compiled for; depth is the length of the summed dimension."""
    return {
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "GROUP": group,
        "WHOLE_K": depth % tile.depth == 0,
        "SWAP": tile.swap,
        "TMA": tile.tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _descriptor(tensor: torch.Tensor, block: list[int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _check(tile: Tile, pairs: SortedPairs, rows: torch.Tensor, weights: torch.Tensor) -> None:
    """What the kernels rely on and a caller could get wrong."""
    if tile.rows != pairs.block_rows:
        raise ValueError(f"the tile has {tile.rows} rows but the pairs were cut into tiles of {pairs.block_rows}")
    if rows.dtype != weights.dtype or rows.dtype not in DTYPES:
        raise ValueError(f"rows are {rows.dtype} and weights {weights.dtype}; both must be one of {DTYPES}")
    if rows.stride(-1) != 1 or weights.stride(-1) != 1:
        raise ValueError("rows and weights must be contiguous in their last dimension")
    if tile.tma and weights.shape[2] % tile.depth:
        raise ValueError(f"a tile read by the bulk copy engine needs a depth that divides {weights.shape[2]}")
