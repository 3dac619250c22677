"""Plain-torch twins of every operation: the oracle of the tests and the differentiable path for training.

Legend: T tokens, K chosen experts per token, N = T * K pairs, E router rows, V variants, P physical experts, M tiles,
D model width, F expert inner width, G = 2F (F if not gated), C constant rows. Written to be obviously right, on any
device. `route` and `moe_ffn` are the whole layer; the other functions are the steps that the GPU kernels take.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from kernels.routing import (
    FIRST_CONSTANT,
    SKIP,
    Activation,
    ExpertWeights,
    RouterPolicy,
    Routing,
    SortedPairs,
    Survivors,
    max_tiles,
)

# Larger than any sane logit, small enough that x - max stays finite in float32 (FLT_MAX would overflow).
LOGIT_LIMIT = 1e30


def route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    policy: RouterPolicy,
    variant_T: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    num_valid: torch.Tensor | int | None = None,
) -> Routing:
    """Choose experts, weigh them, and translate router rows into slots.

    logits_TE: float [T, E]; NaN counts as hopeless (-1e30). table_VE: int [V, E], the slot that router row e means for
    variant v. variant_T: int [T] row of the table per token, default row 0. bias_E: float [E], added to sigmoid
    scores for the choice only. num_valid: tokens from this index on are padding and get slot -1; an int32 tensor of one
    element lets a captured CUDA graph read it anew at every replay.
    The choice is made on raw logits, which a sigmoid without bias does not reorder, or on score + bias.
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
        choice_TE = (logits_TE if bias_E is None else score_TE + bias_E.float()).masked_fill(hidden_TE, -torch.inf)

    row_TK = torch.argsort(choice_TE.detach(), dim=-1, descending=True, stable=True)[:, : policy.top_k]
    dead_TK = hidden_TE.gather(1, row_TK)
    if num_valid is not None:
        dead_TK = dead_TK | (torch.arange(num_tokens, device=logits_TE.device) >= num_valid).unsqueeze(1)
    weight_TK = score_TE.gather(1, row_TK).masked_fill(dead_TK, 0.0)
    slot_TK = table_TE.gather(1, row_TK).masked_fill(dead_TK, SKIP)

    if policy.normalize:
        weight_TK = weight_TK / _sum_or_one(weight_TK)
    weight_TK = weight_TK * policy.scale
    return _settle(slot_TK, weight_TK, policy.survivors)


def remap(
    row_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    table_VE: torch.Tensor,
    survivors: Survivors = "keep",
    variant_T: torch.Tensor | None = None,
) -> Routing:
    """Translate a foreign router's choice into slots, by the same rules as `route`.

    row_TK: int [T, K], router rows; whatever lies outside [0, E) is skipped. weight_TK: float [T, K].
    table_VE, variant_T: as in `route`.
    """
    num_rows = table_VE.shape[1]
    table_TE = table_VE[:1].expand(len(row_TK), -1) if variant_T is None else table_VE[variant_T.long()]
    foreign_TK = (row_TK < 0) | (row_TK >= num_rows)
    slot_TK = table_TE.gather(1, row_TK.long().masked_fill(foreign_TK, 0)).masked_fill(foreign_TK, SKIP)
    return _settle(slot_TK, weight_TK.float(), survivors)


def _settle(slot_TK: torch.Tensor, weight_TK: torch.Tensor, survivors: Survivors) -> Routing:
    """Take the weight from skipped pairs, rescale the survivors as asked, and merge repeated slots."""
    old_sum_T1 = weight_TK.sum(-1, keepdim=True)
    weight_TK = weight_TK.masked_fill(slot_TK == SKIP, 0.0)
    if survivors != "keep":
        target_T1 = old_sum_T1 if survivors == "old_sum" else torch.ones_like(old_sum_T1)
        weight_TK = weight_TK / _sum_or_one(weight_TK) * target_T1
    return merge_repeats(slot_TK, weight_TK)


def moe_ffn(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
    accumulate: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs, weighted: out[t] = sum_j weight[t, j] * expert[slot[t, j]](x[t]).

    x_TD: float [T, D]. Returns [T, D] in x's dtype. residual_TD and shared_TD (the shared expert's output) are added
    to the sum before it is rounded; a token whose slots are all -1 gets exactly their sum, or 0. Everything is
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
        h_NF = expert_in(x_TD_acc[token_N], w_in_GD, _row(experts.b_in_PG, expert), experts.activation, experts.gated)
        y_ND = expert_out(h_NF, w_out_DF, _row(experts.b_out_PD, expert))
        out_TD = out_TD.index_add(0, token_N, y_ND * routing.weight_TK[token_N, choice_N].to(dtype).unsqueeze(1))
    if experts.const_CD is not None:
        token_N, choice_N = torch.nonzero(routing.slot_TK <= FIRST_CONSTANT, as_tuple=True)
        constant_N = FIRST_CONSTANT - routing.slot_TK[token_N, choice_N].long()
        y_ND = experts.const_CD[constant_N].to(dtype)
        out_TD = out_TD.index_add(0, token_N, y_ND * routing.weight_TK[token_N, choice_N].to(dtype).unsqueeze(1))
    for added_TD in (residual_TD, shared_TD):
        if added_TD is not None:
            out_TD = out_TD + added_TD.to(dtype)
    return out_TD.to(x_TD.dtype)


def linear(x: torch.Tensor, w_ND: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., D] times a weight matrix w_ND [N, D] plus bias_N [N]: [..., N], in x's dtype."""
    return F.linear(x, w_ND, bias_N)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The expert's nonlinearity, elementwise; the two GELUs are the exact one and its tanh approximation."""
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu_erf":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu_squared":
            return F.relu(x).square()


def expert_in(
    x_ND: torch.Tensor,
    w_in_GD: torch.Tensor,
    b_in_G: torch.Tensor | None = None,
    activation: Activation = "silu",
    gated: bool = True,
) -> torch.Tensor:
    """One expert's first half on all rows: x_ND [N, D] -> [N, F], in x's dtype."""
    inner_NG = F.linear(x_ND, w_in_GD.to(x_ND.dtype), None if b_in_G is None else b_in_G.to(x_ND.dtype))
    if not gated:
        return activate(inner_NG, activation)
    gate_NF, up_NF = inner_NG.chunk(2, dim=-1)
    return activate(gate_NF, activation) * up_NF


def expert_out(h_NF: torch.Tensor, w_out_DF: torch.Tensor, b_out_D: torch.Tensor | None = None) -> torch.Tensor:
    """One expert's second half, before any gate: h_NF [N, F] -> [N, D], in h's dtype."""
    return F.linear(h_NF, w_out_DF.to(h_NF.dtype), None if b_out_D is None else b_out_D.to(h_NF.dtype))


def sort_pairs(slot_TK: torch.Tensor, num_experts: int, block_rows: int) -> SortedPairs:
    """Sort the live pairs by expert and cut them into tiles of at most `block_rows` rows.

    slot_TK: int32 [T, K], slots below `num_experts`; pairs with a negative slot appear nowhere.
    """
    slots = slot_TK.flatten().tolist()
    live = sorted((n for n, slot in enumerate(slots) if slot >= 0), key=lambda n: slots[n])  # sorted() is stable
    offsets, tiles = [0], []
    for expert in range(num_experts):
        end = offsets[-1] + slots.count(expert)
        tiles += [(expert, row, min(block_rows, end - row)) for row in range(offsets[-1], end, block_rows)]
        offsets.append(end)
    unused = [(0, 0, 0)] * (max_tiles(len(slots), num_experts, block_rows) - len(tiles))
    tile_expert, tile_row, tile_rows = zip(*(tiles + unused), strict=True) if tiles + unused else ((), (), ())

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=slot_TK.device)

    return SortedPairs(
        order_N=ints(live + [0] * (len(slots) - len(live))),
        offset_Q=ints(offsets),
        tile_expert_M=ints(tile_expert),
        tile_row_M=ints(tile_row),
        tile_rows_M=ints(tile_rows),
        num_tiles_1=ints([len(tiles)]),
        block_rows=block_rows,
    )


def gate_up(
    x_TD: torch.Tensor,
    experts: ExpertWeights,
    pairs: SortedPairs,
    top_k: int,
    accumulate: torch.dtype | None = None,
) -> torch.Tensor:
    """First half of every live pair's expert: [N, F], rows in sorted order; rows past the live ones are undefined."""
    h_NF = torch.zeros(pairs.order_N.shape[0], experts.w_out_PDF.shape[2], dtype=x_TD.dtype, device=x_TD.device)
    for expert, rows in _segments(pairs):
        x_RD = x_TD[pairs.order_N[rows].long() // top_k].to(accumulate or x_TD.dtype)
        bias_G = _row(experts.b_in_PG, expert)
        h_NF[rows] = expert_in(x_RD, experts.w_in_PGD[expert], bias_G, experts.activation, experts.gated).to(h_NF.dtype)
    return h_NF


def down(
    h_NF: torch.Tensor,
    experts: ExpertWeights,
    pairs: SortedPairs,
    accumulate: torch.dtype | None = None,
) -> torch.Tensor:
    """Second half of every live pair's expert, unweighted: h_NF in sorted order -> [N, D] in pair order.

    Rows of pairs that run no expert are undefined.
    """
    y_ND = torch.zeros(h_NF.shape[0], experts.w_out_PDF.shape[1], dtype=h_NF.dtype, device=h_NF.device)
    for expert, rows in _segments(pairs):
        h_RF = h_NF[rows].to(accumulate or h_NF.dtype)
        y_RD = expert_out(h_RF, experts.w_out_PDF[expert], _row(experts.b_out_PD, expert))
        y_ND[pairs.order_N[rows].long()] = y_RD.to(y_ND.dtype)
    return y_ND


def combine(
    y_ND: torch.Tensor,
    routing: Routing,
    const_CD: torch.Tensor | None = None,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Each token's weighted sum, in choice order: y_ND in pair order -> [T, D] in y's dtype, rounded once.

    Rows of pairs that run no expert are not read. Constants, residual and shared expert are added as in `moe_ffn`.
    """
    num_tokens, top_k = routing.slot_TK.shape
    y_TKD = y_ND.view(num_tokens, top_k, y_ND.shape[1]).to(accumulate)
    out_TD = torch.zeros(num_tokens, y_ND.shape[1], dtype=accumulate, device=y_ND.device)
    for choice in range(top_k):
        slot_T1 = routing.slot_TK[:, choice, None]
        term_TD = y_TKD[:, choice].masked_fill(slot_T1 < 0, 0.0)
        if const_CD is not None:
            row_T = (FIRST_CONSTANT - slot_T1[:, 0].long()).clamp(min=0)
            term_TD = torch.where(slot_T1 <= FIRST_CONSTANT, const_CD[row_T].to(accumulate), term_TD)
        out_TD += routing.weight_TK[:, choice, None].to(accumulate) * term_TD
    for added_TD in (residual_TD, shared_TD):
        if added_TD is not None:
            out_TD = out_TD + added_TD.to(accumulate)
    return out_TD.to(y_ND.dtype)


def _segments(pairs: SortedPairs) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and its rows in sorted order."""
    offsets = pairs.offset_Q.tolist()
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            yield expert, slice(start, end)


def _row(stack: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if stack is None else stack[index]


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
