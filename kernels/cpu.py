"""The inference path for CPUs: sort the (token, choice) pairs once, one pair of products per expert that has rows.

Legend: T tokens, K chosen experts per token, M = T * K pairs, N live pairs sorted by expert, R rows given to experts
(N, plus what evens out a block), E router rows, P physical experts, D model width, F expert inner width, G = 2F. No
gradients, no atomics: a token's result depends on its own row only, up to how the GEMM library splits rows.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.routing import FIRST_CONSTANT, SKIP, ExpertWeights, RouterPolicy, Routing

logger = logging.getLogger("secateur.kernels")

# Experts with few rows are bound by reading their weights, which one batched product does faster than one product
# each. 512 x 512 matrices from main memory, one thread / two threads, per expert: bfloat16 at 8 rows 36 / 29 us batched
# against 49 / 46 us, at 16 rows 44 / 36 against 55 / 51. Beyond 16 rows, evening out a block costs what batching gains:
# 64 tokens through 8 layers of 32 experts, top 4, take 27.0 ms with a limit of 16, 26.9-29.2 with 32, 28.9 with 0. In
# float32 the batched product goes to MKL and loses (41 ms with 0, 55 with 16; see `linear`).
BATCHED_ROWS = {torch.bfloat16: 16}


def linear(x: torch.Tensor, w_ND: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """As `reference.linear`, for inference, through oneDNN where it gives the right answer.

    torch sends float32 products to MKL, which leaves most of a non-Intel CPU unused, and spends 15 us per bfloat16
    call beside the product. One 512 x 512 matrix, one thread of an AMD CPU with AVX-512, torch 2.13: float32 at
    8 / 64 / 256 rows 105 / 370 / 1309 us against 56 / 172 / 621 us here; bfloat16 at 8 rows 50 against 31 us.
    """
    if x.dtype in _onednn_dtypes() and x.numel() and not torch.is_grad_enabled():
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, w_ND, bias_N, "none", [], "")
        return result
    return F.linear(x, w_ND, bias_N)


@cache
def _onednn_dtypes() -> frozenset[torch.dtype]:
    """The dtypes for which torch's private oneDNN operator exists on this machine and agrees with the public one."""
    good = set()
    for dtype in (torch.float32, torch.bfloat16):
        x_TD, w_ND, bias_N = (torch.linspace(-1, 1, n).to(dtype) for n in (48, 80, 5))
        x_TD, w_ND = x_TD.view(3, 16), w_ND.view(5, 16)
        expected = F.linear(x_TD, w_ND, bias_N)
        try:
            result = torch.ops.mkldnn._linear_pointwise(x_TD, w_ND, bias_N, "none", [], "")
        except (AttributeError, RuntimeError, TypeError) as error:
            logger.warning("no oneDNN products in %s, torch's own are used: %s", dtype, error)
            continue
        if torch.allclose(result, expected, rtol=2e-2, atol=1e-5):
            good.add(dtype)
        else:
            logger.warning("oneDNN products in %s differ from torch's, which are used instead", dtype)
    return frozenset(good)


def route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    policy: RouterPolicy,
    variant_T: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    num_valid: torch.Tensor | int | None = None,
) -> Routing:
    """As `reference.route`, with two short cuts for the common case (softmax, one variant, nothing hidden, no padding).

    The choice is K rounds of max, which returns the first of equal values, instead of a full stable sort; and repeats
    are merged only where the table can produce them.
    """
    plain = policy.score == "softmax" and not policy.slice and policy.survivors == "keep"
    if not plain or variant_T is not None or num_valid is not None or bias_E is not None:
        return reference.route(logits_TE, table_VE, policy, variant_T, bias_E, num_valid)
    if policy.top_k > logits_TE.shape[1]:
        raise ValueError(f"top_k is {policy.top_k} but the router has only {logits_TE.shape[1]} rows")

    limit = reference.LOGIT_LIMIT
    logits_TE = torch.nan_to_num(logits_TE.float(), nan=-limit).clamp_(-limit, limit)
    left_TE = logits_TE.clone()
    rows, values = [], []
    for _ in range(policy.top_k):
        value_T1, row_T1 = left_TE.max(dim=-1, keepdim=True)
        left_TE.scatter_(1, row_T1, -torch.inf)
        rows.append(row_T1)
        values.append(value_T1)
    row_TK, top_TK = torch.cat(rows, dim=1), torch.cat(values, dim=1)
    if policy.normalize:  # softmax over the chosen logits is softmax over all, divided by the sum of the chosen
        weight_TK = torch.softmax(top_TK, dim=-1)
    else:
        weight_TK = torch.softmax(logits_TE, dim=-1).gather(1, row_TK)
    if policy.scale != 1.0:
        weight_TK = weight_TK * policy.scale
    slot_TK = table_VE[0][row_TK]
    if _table_is_injective(table_VE[0]):
        return Routing(slot_TK.to(torch.int32), weight_TK.masked_fill_(slot_TK == SKIP, 0.0))
    return reference.merge_repeats(slot_TK, weight_TK.masked_fill_(slot_TK == SKIP, 0.0))


def moe_ffn(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.moe_ffn`, for inference: x_TD [T, D] -> [T, D]; experts without rows cost nothing.

    Gate and up products, the activation and the expert output are rounded to x's dtype; the weighted sum over a
    token's choices runs in float32, in choice order, then residual and shared expert join, and it is rounded once.
    """
    num_tokens, top_k = routing.slot_TK.shape
    num_experts = experts.w_in_PGD.shape[0]
    key_M = torch.where(routing.slot_TK >= 0, routing.slot_TK, num_experts).flatten()
    order_M = torch.argsort(key_M, stable=True)
    count_P = torch.bincount(key_M, minlength=num_experts + 1)[:num_experts].tolist()
    blocks = _blocks(count_P, BATCHED_ROWS.get(x_TD.dtype, 0))
    shift_P, num_live, num_rows = [0] * num_experts, 0, 0
    for first, end, height in blocks:
        for expert in range(first, end):
            shift_P[expert] = num_rows - num_live
            num_live += count_P[expert]
            num_rows += height

    order_N = order_M[:num_live]
    position_N = torch.arange(num_live) + torch.tensor(shift_P)[key_M[order_N]]
    token_R = torch.zeros(num_rows, dtype=torch.int64)  # rows of a block that nobody needs repeat token 0
    token_R[position_N] = order_N // top_k
    x_RD = x_TD.index_select(0, token_R)
    # One spare row of zeros at the end is what pairs without an expert read.
    y_RD = torch.empty(num_rows + 1, x_TD.shape[1], dtype=x_TD.dtype)
    y_RD[num_rows] = 0
    start = 0
    for first, end, height in blocks:
        rows = slice(start, start + (end - first) * height)
        y_RD[rows] = _run_block(x_RD[rows], experts, first, end)
        start = rows.stop

    position_M = torch.full_like(order_M, num_rows)
    position_M[order_N] = position_N
    position_TK = position_M.view(num_tokens, top_k)
    out_TD = _combine(y_RD, position_TK, routing.weight_TK)
    if experts.const_CD is not None:
        for choice in range(top_k):
            _add_constants(out_TD, routing, experts.const_CD, choice)
    for added_TD in (residual_TD, shared_TD):
        if added_TD is not None:
            out_TD += added_TD
    return out_TD.to(x_TD.dtype)


def _blocks(count_P: list[int], limit: int) -> list[tuple[int, int, int]]:
    """(first, end, height): neighbouring experts of at most `limit` rows each form a block, others stand alone.

    Every expert of a block is given as many rows as its fullest; experts without rows are in no block.
    """
    blocks: list[tuple[int, int, int]] = []
    for expert, count in enumerate(count_P):
        if count == 0:
            continue
        if blocks and blocks[-1][1] == expert and max(count, blocks[-1][2]) <= limit:
            first, _, height = blocks.pop()
            blocks.append((first, expert + 1, max(height, count)))
        else:
            blocks.append((expert, expert + 1, count))
    return blocks


def _run_block(x_RD: torch.Tensor, experts: ExpertWeights, first: int, end: int) -> torch.Tensor:
    """The experts [first, end) on their equal shares of the rows: [R, D] -> [R, D]."""
    e, count = experts, end - first
    if count == 1:
        b_in_G = None if e.b_in_PG is None else e.b_in_PG[first]
        b_out_D = None if e.b_out_PD is None else e.b_out_PD[first]
        return linear(_activated(linear(x_RD, e.w_in_PGD[first], b_in_G), e), e.w_out_PDF[first], b_out_D)
    b_in_PG = None if e.b_in_PG is None else e.b_in_PG[first:end]
    b_out_PD = None if e.b_out_PD is None else e.b_out_PD[first:end]
    h_PRF = _activated(_batched(x_RD.view(count, -1, x_RD.shape[1]), e.w_in_PGD[first:end], b_in_PG), e)
    return _batched(h_PRF, e.w_out_PDF[first:end], b_out_PD).flatten(0, 1)


def _batched(x_PRD: torch.Tensor, w_PND: torch.Tensor, bias_PN: torch.Tensor | None) -> torch.Tensor:
    """One product per expert: [P, R, D] -> [P, R, N]."""
    if bias_PN is None:
        return torch.bmm(x_PRD, w_PND.transpose(1, 2))
    return torch.baddbmm(bias_PN.unsqueeze(1), x_PRD, w_PND.transpose(1, 2))


def _activated(inner: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """From the first product to the input of the second: [..., G] -> [..., F]."""
    if not experts.gated:
        return reference.activate(inner, experts.activation)
    gate, up = inner.chunk(2, dim=-1)
    return reference.activate(gate, experts.activation).mul_(up)


def _combine(y_RD: torch.Tensor, position_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Each token's weighted rows of y, summed in float32 in choice order: [T, D]."""
    if y_RD.dtype == torch.float32:
        # Sums rows where they lie: 4 ms against 15 ms for the loop below at 8,192 rows of 512 on one thread.
        return F.embedding_bag(position_TK, y_RD, per_sample_weights=weight_TK, mode="sum")
    out_TD = torch.zeros(position_TK.shape[0], y_RD.shape[1], dtype=torch.float32)
    for choice in range(position_TK.shape[1]):
        out_TD.addcmul_(y_RD.index_select(0, position_TK[:, choice]), weight_TK[:, choice, None])
    return out_TD


def _add_constants(out_TD: torch.Tensor, routing: Routing, const_CD: torch.Tensor, choice: int) -> None:
    """Add weight * const to the tokens whose slot at this choice is a constant row; rows are unique, so no atomics."""
    token_N = torch.nonzero(routing.slot_TK[:, choice] <= FIRST_CONSTANT).squeeze(1)
    constant_N = FIRST_CONSTANT - routing.slot_TK[token_N, choice].long()
    out_TD[token_N] += const_CD[constant_N].float() * routing.weight_TK[token_N, choice, None]


def _table_is_injective(table_E: torch.Tensor) -> bool:
    used = [slot for slot in table_E.tolist() if slot != SKIP]
    return len(set(used)) == len(used)
