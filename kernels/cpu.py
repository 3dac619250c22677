"""The inference path for CPUs: sort the (token, choice) pairs once, one pair of GEMMs per expert that has rows.

Legend: T tokens, K chosen experts per token, N = live pairs sorted by expert, E router rows, P physical experts,
D model width, F expert inner width, G = 2F. No gradients, no atomics: a token's result depends on its own row only,
up to how the GEMM library splits rows.
"""

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.routing import FIRST_CONSTANT, SKIP, ExpertWeights, RouterPolicy, Routing


def route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    policy: RouterPolicy,
    variant_T: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    num_valid: int | None = None,
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
    return reference._merge_repeats(slot_TK, weight_TK.masked_fill_(slot_TK == SKIP, 0.0))


def moe_ffn(x_TD: torch.Tensor, routing: Routing, experts: ExpertWeights) -> torch.Tensor:
    """As `reference.moe_ffn`, for inference: x_TD [T, D] -> [T, D]; experts without rows cost nothing.

    Gate and up products, the activation and the expert output are rounded to x's dtype; the weighted sum over a
    token's choices runs in float32, in choice order, and is rounded once.
    """
    num_tokens, top_k = routing.slot_TK.shape
    num_experts = experts.w_in_PGD.shape[0]
    key_M = torch.where(routing.slot_TK >= 0, routing.slot_TK, num_experts).flatten()
    order_M = torch.argsort(key_M, stable=True)
    count_P = torch.bincount(key_M, minlength=num_experts + 1)[:num_experts].tolist()
    num_live = sum(count_P)

    x_ND = x_TD.index_select(0, order_M[:num_live] // top_k)
    # One spare row of zeros at the end is what pairs without an expert read.
    y_ND = x_TD.new_zeros(num_live + 1, x_TD.shape[1]) if num_live < key_M.numel() else torch.empty_like(x_ND)
    start = 0
    for expert, count in enumerate(count_P):
        if count == 0:
            continue
        rows = slice(start, start + count)
        gate_NF, up_NF = F.linear(x_ND[rows], experts.w_in_PGD[expert]).chunk(2, dim=-1)
        torch.mm(F.silu(gate_NF).mul_(up_NF), experts.w_out_PDF[expert].t(), out=y_ND[rows])
        start += count

    position_M = torch.empty_like(order_M)
    position_M[order_M] = torch.arange(order_M.numel())
    position_TK = position_M.clamp_(max=y_ND.shape[0] - 1).view(num_tokens, top_k)
    out_TD = torch.zeros(num_tokens, x_TD.shape[1], dtype=torch.float32)
    for choice in range(top_k):
        out_TD.addcmul_(y_ND[position_TK[:, choice]], routing.weight_TK[:, choice, None])
        if experts.const_CD is not None:
            _add_constants(out_TD, routing, experts.const_CD, choice)
    return out_TD.to(x_TD.dtype)


def _add_constants(out_TD: torch.Tensor, routing: Routing, const_CD: torch.Tensor, choice: int) -> None:
    """Add weight * const to the tokens whose slot at this choice is a constant row; rows are unique, so no atomics."""
    token_N = torch.nonzero(routing.slot_TK[:, choice] <= FIRST_CONSTANT).squeeze(1)
    constant_N = FIRST_CONSTANT - routing.slot_TK[token_N, choice].long()
    out_TD[token_N] += const_CD[constant_N].float() * routing.weight_TK[token_N, choice, None]


def _table_is_injective(table_E: torch.Tensor) -> bool:
    used = [slot for slot in table_E.tolist() if slot != SKIP]
    return len(set(used)) == len(used)
