"""Plain-torch twins of every operation: the oracle of the tests and the differentiable path for training.

Legend: T tokens, K chosen experts per token, E router rows, V variants, P physical experts, D model width,
F expert inner width, G = 2F, C constant rows. Written to be obviously right, on any device.
"""

import torch
import torch.nn.functional as F

from kernels.routing import FIRST_CONSTANT, SKIP, ExpertWeights, RouterPolicy, Routing

# Larger than any sane logit, small enough that x - max stays finite in float32 (FLT_MAX would overflow).
LOGIT_LIMIT = 1e30


def route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    policy: RouterPolicy,
    variant_T: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    num_valid: int | None = None,
) -> Routing:
    """Choose experts, weigh them, and translate router rows into slots.

    logits_TE: float [T, E]; NaN counts as hopeless (-1e30). table_VE: int [V, E], the slot that router row e means for
    variant v. variant_T: int [T] row of the table per token, default row 0. bias_E: float [E], added to sigmoid
    scores for the choice only. num_valid: tokens from this index on are padding and get slot -1.
    Ties go to the lower row. A slot repeated within a token is merged into its first occurrence (weights add).
    Every weight is finite. Raises ValueError if top_k exceeds E or a bias comes with softmax scores.
    """
    num_tokens, num_rows = logits_TE.shape
    if policy.top_k > num_rows:
        raise ValueError(f"top_k is {policy.top_k} but the router has only {num_rows} rows")
    if bias_E is not None and policy.score != "sigmoid":
        raise ValueError("bias_E applies to sigmoid scores only")

    logits_TE = torch.nan_to_num(logits_TE.float(), nan=-LOGIT_LIMIT).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    table_TE = table_VE[0].expand(num_tokens, num_rows) if variant_T is None else table_VE[variant_T.long()]
    hidden_TE = (table_TE == SKIP) & policy.slice

    if policy.score == "softmax":
        choice_TE = logits_TE.masked_fill(hidden_TE, -torch.inf)
        # A token that can see no row at all must not turn into 0/0.
        score_TE = torch.softmax(choice_TE.masked_fill(hidden_TE.all(-1, keepdim=True), 0.0), dim=-1)
    else:
        score_TE = torch.sigmoid(logits_TE)
        choice_TE = (score_TE if bias_E is None else score_TE + bias_E.float()).masked_fill(hidden_TE, -torch.inf)

    row_TK = torch.argsort(choice_TE.detach(), dim=-1, descending=True, stable=True)[:, : policy.top_k]
    dead_TK = hidden_TE.gather(1, row_TK)
    if num_valid is not None:
        dead_TK = dead_TK | (torch.arange(num_tokens, device=logits_TE.device) >= num_valid).unsqueeze(1)
    weight_TK = score_TE.gather(1, row_TK).masked_fill(dead_TK, 0.0)
    slot_TK = table_TE.gather(1, row_TK).masked_fill(dead_TK, SKIP)

    if policy.normalize:
        weight_TK = weight_TK / _sum_or_one(weight_TK)
    weight_TK = weight_TK * policy.scale
    pruned_TK = slot_TK == SKIP
    old_sum_T1 = weight_TK.sum(-1, keepdim=True)
    weight_TK = weight_TK.masked_fill(pruned_TK, 0.0)
    if policy.survivors != "keep":
        target_T1 = old_sum_T1 if policy.survivors == "old_sum" else torch.ones_like(old_sum_T1)
        weight_TK = weight_TK / _sum_or_one(weight_TK) * target_T1

    return merge_repeats(slot_TK, weight_TK)


def moe_ffn(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    accumulate: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs, weighted: out[t] = sum_j weight[t, j] * expert[slot[t, j]](x[t]).

    x_TD: float [T, D]. Returns [T, D] in x's dtype; a token whose slots are all -1 gets exactly 0. Everything is
    computed in `accumulate` (default: x's dtype); the oracle passes float64.
    """
    dtype = accumulate or x_TD.dtype
    x_TD_acc = x_TD.to(dtype)
    out_TD = torch.zeros_like(x_TD_acc)
    # unbind, not indexing: the gradient of P slices of a stack is then one stack instead of P zero-filled ones.
    for expert, (w_in_GD, w_out_DF) in enumerate(
        zip(experts.w_in_PGD.unbind(), experts.w_out_PDF.unbind(), strict=True)
    ):
        token_N, choice_N = torch.nonzero(routing.slot_TK == expert, as_tuple=True)
        if token_N.numel() == 0:
            continue
        y_ND = expert_ffn(x_TD_acc[token_N], w_in_GD, w_out_DF)
        out_TD = out_TD.index_add(0, token_N, y_ND * routing.weight_TK[token_N, choice_N].to(dtype).unsqueeze(1))
    if experts.const_CD is not None:
        token_N, choice_N = torch.nonzero(routing.slot_TK <= FIRST_CONSTANT, as_tuple=True)
        constant_N = FIRST_CONSTANT - routing.slot_TK[token_N, choice_N].long()
        y_ND = experts.const_CD[constant_N].to(dtype)
        out_TD = out_TD.index_add(0, token_N, y_ND * routing.weight_TK[token_N, choice_N].to(dtype).unsqueeze(1))
    return out_TD.to(x_TD.dtype)


def linear(x: torch.Tensor, w_ND: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., D] times a weight matrix w_ND [N, D] plus bias_N [N]: [..., N], in x's dtype."""
    return F.linear(x, w_ND, bias_N)


def expert_ffn(x_ND: torch.Tensor, w_in_GD: torch.Tensor, w_out_DF: torch.Tensor) -> torch.Tensor:
    """One expert on all rows, before any gate: x_ND [N, D] -> [N, D], in x's dtype."""
    gate_NF, up_NF = F.linear(x_ND, w_in_GD.to(x_ND.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate_NF) * up_NF, w_out_DF.to(x_ND.dtype))


def _sum_or_one(weight_TK: torch.Tensor) -> torch.Tensor:
    total_T1 = weight_TK.sum(-1, keepdim=True)
    return torch.where(total_T1 == 0, torch.ones_like(total_T1), total_T1)


def merge_repeats(slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> Routing:
    """Let the first pair of a slot carry the summed weight; later ones become -1."""
    same_TKK = (slot_TK.unsqueeze(2) == slot_TK.unsqueeze(1)) & (slot_TK != SKIP).unsqueeze(2)
    earlier_KK = torch.ones(same_TKK.shape[1:], dtype=torch.bool, device=slot_TK.device).tril(-1)
    repeated_TK = (same_TKK & earlier_KK).any(-1)
    summed_TK = (same_TKK.to(weight_TK.dtype) * weight_TK.unsqueeze(1)).sum(-1)
    return Routing(
        slot_TK=slot_TK.masked_fill(repeated_TK, SKIP).to(torch.int32),
        weight_TK=torch.where(repeated_TK, torch.zeros_like(summed_TK), summed_TK),
    )
