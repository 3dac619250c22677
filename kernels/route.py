"""The router's logits, or a foreign router's choice, become slots and weights in one launch.

Legend: T tokens, K chosen experts per token, E router rows, V variants. Inside the kernels a block has BT tokens, and
EP and KP are E and K rounded up to powers of two. A program keeps its tokens' logits in registers and takes the best
row K times: any number of experts works, power of two or not, and nothing but the result is written.
"""

import torch
import triton
import triton.language as tl

from kernels.reference import LOGIT_LIMIT
from kernels.routing import SKIP, RouterPolicy, Routing, Survivors

# Lanes of one program, over all its tokens: four for each of the 128 threads.
BLOCK_LANES = 512

_LIMIT = tl.constexpr(LOGIT_LIMIT)
_SKIP = tl.constexpr(SKIP)


def route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    policy: RouterPolicy,
    variant_T: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    num_valid: torch.Tensor | int | None = None,
) -> Routing:
    """As `reference.route`, without gradients: logits_TE float [T, E] -> slot int32 [T, K], weight float32 [T, K].

    `num_valid` in a tensor is read on the device. The launch depends on shapes alone, so it can be captured in a CUDA
    graph. Raises ValueError as the reference does.
    """
    num_tokens, num_rows = logits_TE.shape
    if policy.top_k > num_rows:
        raise ValueError(f"top_k is {policy.top_k} but the router has only {num_rows} rows")
    if bias_E is not None and policy.score != "sigmoid":
        raise ValueError("bias_E applies to sigmoid scores only")

    routing = _empty_routing(num_tokens, policy.top_k, logits_TE.device)
    if num_tokens == 0:
        return routing
    valid_on_device = isinstance(num_valid, torch.Tensor)
    logits_TE, table_VE = _dense_rows(logits_TE), _dense_rows(table_VE)
    padded_rows = triton.next_power_of_2(num_rows)
    block_tokens = max(1, BLOCK_LANES // padded_rows)
    route_kernel[(triton.cdiv(num_tokens, block_tokens),)](
        logits_TE,
        table_VE,
        variant_T,
        bias_E,
        num_valid if valid_on_device else None,
        routing.slot_TK,
        routing.weight_TK,
        num_tokens,
        num_tokens if valid_on_device or num_valid is None else num_valid,
        num_rows,
        logits_TE.stride(0),
        table_VE.stride(0),
        policy.scale,
        K=policy.top_k,
        KP=triton.next_power_of_2(policy.top_k),
        EP=padded_rows,
        BT=block_tokens,
        SCORE=policy.score,
        NORMALIZE=policy.normalize,
        SLICE=policy.slice,
        SURVIVORS=policy.survivors,
        num_warps=4,
    )
    return routing


def remap(
    row_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    table_VE: torch.Tensor,
    survivors: Survivors = "keep",
    variant_T: torch.Tensor | None = None,
) -> Routing:
    """As `reference.remap`: row_TK int [T, K], weight_TK float [T, K] -> slot int32 [T, K], weight float32 [T, K]."""
    num_tokens, top_k = row_TK.shape
    routing = _empty_routing(num_tokens, top_k, row_TK.device)
    if num_tokens == 0:
        return routing
    table_VE = _dense_rows(table_VE)
    padded_choices = triton.next_power_of_2(top_k)
    block_tokens = max(1, BLOCK_LANES // padded_choices)
    remap_kernel[(triton.cdiv(num_tokens, block_tokens),)](
        row_TK.contiguous(),
        weight_TK.contiguous(),
        table_VE,
        variant_T,
        routing.slot_TK,
        routing.weight_TK,
        num_tokens,
        table_VE.shape[1],
        table_VE.stride(0),
        K=top_k,
        KP=padded_choices,
        BT=block_tokens,
        SURVIVORS=survivors,
        num_warps=4,
    )
    return routing


def _empty_routing(num_tokens: int, top_k: int, device: torch.device) -> Routing:
    return Routing(
        slot_TK=torch.empty(num_tokens, top_k, dtype=torch.int32, device=device),
        weight_TK=torch.empty(num_tokens, top_k, dtype=torch.float32, device=device),
    )


def _dense_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The kernels take any distance between rows, but no gaps within one."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# Sizes stay run-time values: specialised, layers with 1, 16 and 37 rows would be three compilations while serving.
@triton.jit(
    do_not_specialize=["num_tokens", "num_valid", "num_rows", "logits_stride", "table_stride", "scale"],
)
def route_kernel(
    logits_TE,
    table_VE,
    variant_T,
    bias_E,
    num_valid_1,
    slot_TK,
    weight_TK,
    num_tokens,
    num_valid,
    num_rows,
    logits_stride,
    table_stride,
    scale,
    K: tl.constexpr,
    KP: tl.constexpr,
    EP: tl.constexpr,
    BT: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SLICE: tl.constexpr,
    SURVIVORS: tl.constexpr,
):
    if num_valid_1 is not None:
        num_valid = tl.load(num_valid_1)
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    row = tl.arange(0, EP)[None, :]
    column = tl.arange(0, KP)[None, :]
    # Tokens of padding see no row, so that every choice of theirs is dead.
    valid = (token < num_tokens) & (token < num_valid)
    visible = valid[:, None] & (row < num_rows)
    logits = logits_TE + token[:, None] * logits_stride
    table = _table_rows(table_VE, variant_T, token, valid, table_stride)

    logit = _read_logits(logits + row, visible)
    if SLICE:
        visible = visible & (tl.load(table + row, mask=visible, other=_SKIP) != _SKIP)
    choice = logit
    if bias_E is not None:
        bias = tl.load(bias_E + row, mask=row < num_rows, other=0.0).to(tl.float32)
        choice = _bounded(_sigmoid(logit) + bias)
    # Logits are bounded, so from here on minus infinity means: hidden, absent or taken.
    choice = tl.where(visible, choice, float("-inf"))

    left = choice
    chosen = tl.full([BT, KP], -1, tl.int32)
    for k in range(K):
        best, winner = tl.max(left, axis=1, return_indices=True, return_indices_tie_break_left=True, keep_dims=True)
        chosen = tl.where((column == k) & (best > float("-inf")), winner, chosen)
        left = tl.where(row == winner, float("-inf"), left)

    # What belongs to the chosen rows is fetched for all choices at once: a read in each round would wait K times.
    alive = chosen >= 0
    logit = _read_logits(logits + chosen, alive)
    slot = tl.load(table + chosen, mask=alive, other=_SKIP).to(tl.int32)
    if SCORE == "softmax":
        top = tl.max(choice, axis=1, keep_dims=True)
        top = tl.where(top > float("-inf"), top, 0.0)
        weight = tl.where(alive, tl.exp(tl.minimum(logit - top, 0.0)), 0.0)  # dead: logit is 0, top may be -1e30
        if not NORMALIZE:  # dividing by the sum of the chosen cancels the sum of all
            weight /= _one_if_zero(tl.sum(tl.exp(choice - top), axis=1, keep_dims=True))
    else:
        weight = tl.where(alive, _sigmoid(logit), 0.0)
    if NORMALIZE:
        weight /= _one_if_zero(tl.sum(weight, axis=1, keep_dims=True))
    _settle(slot_TK, weight_TK, slot, weight * scale, token, num_tokens, K, KP, SURVIVORS)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "table_stride"])
def remap_kernel(
    row_TK,
    given_TK,
    table_VE,
    variant_T,
    slot_TK,
    weight_TK,
    num_tokens,
    num_rows,
    table_stride,
    K: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr,
    SURVIVORS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.arange(0, KP)[None, :]
    valid = token < num_tokens
    pair = token[:, None] * K + column
    exists = valid[:, None] & (column < K)
    row = tl.load(row_TK + pair, mask=exists, other=-1)
    weight = tl.load(given_TK + pair, mask=exists, other=0.0).to(tl.float32)
    table = _table_rows(table_VE, variant_T, token, valid, table_stride)
    slot = tl.load(table + row, mask=(row >= 0) & (row < num_rows), other=_SKIP).to(tl.int32)
    _settle(slot_TK, weight_TK, slot, weight, token, num_tokens, K, KP, SURVIVORS)


@triton.jit
def _settle(
    slot_TK, weight_TK, slot, weight, token, num_tokens, K: tl.constexpr, KP: tl.constexpr, SURVIVORS: tl.constexpr
):
    """What `reference._settle` does to a block of tokens, [BT, KP] of slots and weights, and the write of both."""
    column = tl.arange(0, KP)[None, :]
    old_sum = tl.sum(weight, axis=1, keep_dims=True)
    weight = tl.where(slot == _SKIP, 0.0, weight)
    if SURVIVORS != "keep":
        weight /= _one_if_zero(tl.sum(weight, axis=1, keep_dims=True))
        if SURVIVORS == "old_sum":
            weight *= old_sum
    # One column after the other: a [BT, KP, KP] block of comparisons would not fit in registers at K = 64.
    for k in range(K):
        mine = column == k
        first = tl.sum(tl.where(mine, slot, 0), axis=1, keep_dims=True)
        repeated = (slot == first) & (slot != _SKIP) & (column > k)
        added = tl.sum(tl.where(repeated, weight, 0.0), axis=1, keep_dims=True)
        weight = tl.where(repeated, 0.0, tl.where(mine, weight + added, weight))
        slot = tl.where(repeated, _SKIP, slot)
    pair = token[:, None] * K + column
    exists = (token < num_tokens)[:, None] & (column < K)
    tl.store(slot_TK + pair, slot, mask=exists)
    tl.store(weight_TK + pair, weight, mask=exists)


@triton.jit
def _table_rows(table_VE, variant_T, token, valid, table_stride):
    """Where each token's row of the table starts: [BT, 1]."""
    if variant_T is None:
        variant = tl.zeros_like(token)
    else:
        variant = tl.load(variant_T + token, mask=valid, other=0).to(tl.int64)
    return table_VE + (variant * table_stride)[:, None]


@triton.jit
def _read_logits(pointers, mask):
    return _bounded(tl.load(pointers, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def _bounded(value):
    """Infinities become finite and NaN hopeless: of NaN and a number, tl.maximum returns the number."""
    return tl.minimum(tl.maximum(value, -_LIMIT), _LIMIT)


@triton.jit
def _sigmoid(value):
    """Zero below -88.72, as in torch: there exp(-value) leaves float32."""
    return tl.where(value < -88.72, 0.0, 1.0 / (1.0 + tl.exp(-tl.maximum(value, -88.72))))


@triton.jit
def _one_if_zero(total):
    return tl.where(total == 0.0, 1.0, total)
