"""The layer on a GPU: route, then three to seven launches that touch only the experts which tokens reached.

Legend: T tokens, K chosen experts per token, N = T * K pairs, E router rows, V variants, P physical experts, D model
width, F expert inner width, C constant rows. Everything the host decides follows from shapes, so a layer never waits
for the device and can be captured in a CUDA graph; buffers come from torch's allocator, which a graph's own pool
recycles from layer to layer. Under Triton's interpreter the same functions run on CPU tensors.
"""

from functools import cache
from typing import cast

import torch
import torch.nn.functional as F

from kernels import grouped_gemm, pair, tiles
from kernels.combine import combine
from kernels.route import remap as launch_remap
from kernels.route import route as launch_route
from kernels.routing import Activation, ExpertWeights, RouterPolicy, Routing, ScoreFunction, Survivors
from kernels.sort import sort_pairs

# Room for the intermediate rows of one call; more tokens than fit go through in chunks. Qwen3-30B-A3B needs 1.5 GB and
# OLMoE 1.6 GB for 32,768 tokens in bfloat16.
WORKSPACE_BYTES = 2 * 2**30


def linear(x: torch.Tensor, w_ND: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """`reference.linear`: dense products are left to cuBLAS."""
    return F.linear(x, w_ND, bias_N)


def route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    policy: RouterPolicy,
    variant_T: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    num_valid: torch.Tensor | int | None = None,
) -> Routing:
    """`reference.route` in one launch. torch.compile and CUDA graphs see one operator."""
    is_tensor = isinstance(num_valid, torch.Tensor)
    slot_TK, weight_TK = _route(
        logits_TE,
        table_VE,
        variant_T,
        bias_E,
        num_valid if is_tensor else None,
        None if is_tensor else num_valid,
        policy.top_k,
        policy.score,
        policy.normalize,
        policy.scale,
        policy.slice,
        policy.survivors,
    )
    return Routing(slot_TK, weight_TK)


def remap(
    row_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    table_VE: torch.Tensor,
    survivors: Survivors = "keep",
    variant_T: torch.Tensor | None = None,
) -> Routing:
    """`reference.remap` in one launch."""
    return Routing(*_remap(row_TK, weight_TK, table_VE, survivors, variant_T))


def moe_ffn(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    residual_TD: torch.Tensor | None = None,
    shared_TD: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """`reference.moe_ffn`: [T, D] in x's dtype; products accumulate in float32 and are rounded twice on the way.

    batch_invariant: one tile size for every batch, so that a token's bits do not depend on its neighbours; slower.
    Raises ValueError for a dtype other than bfloat16, float16 and float32, or for weights of another dtype.
    """
    result: torch.Tensor = _moe_ffn(
        _rows(x_TD),
        routing.slot_TK,
        routing.weight_TK,
        experts.w_in_PGD,
        experts.w_out_PDF,
        _rows(experts.const_CD),
        _rows(experts.b_in_PG),
        _rows(experts.b_out_PD),
        _rows(residual_TD),
        _rows(shared_TD),
        experts.activation,
        experts.gated,
        experts.kept_share,
        batch_invariant,
    )
    return result


@torch.library.custom_op("secateur::route", mutates_args=())
def _route(
    logits_TE: torch.Tensor,
    table_VE: torch.Tensor,
    variant_T: torch.Tensor | None,
    bias_E: torch.Tensor | None,
    num_valid: torch.Tensor | None,
    num_valid_host: int | None,
    top_k: int,
    score: str,
    normalize: bool,
    scale: float,
    slice_rows: bool,
    survivors: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    policy = RouterPolicy(top_k, cast(ScoreFunction, score), normalize, scale, slice_rows, cast(Survivors, survivors))
    valid = num_valid if num_valid is not None else num_valid_host
    routing = launch_route(logits_TE, table_VE, policy, variant_T, bias_E, valid)
    return routing.slot_TK, routing.weight_TK


@_route.register_fake
def _(logits_TE: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits_TE.shape[0], cast(int, rest[5]))
    return logits_TE.new_empty(shape, dtype=torch.int32), logits_TE.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("secateur::remap", mutates_args=())
def _remap(
    row_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    table_VE: torch.Tensor,
    survivors: str,
    variant_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    routing = launch_remap(row_TK, weight_TK, table_VE, cast(Survivors, survivors), variant_T)
    return routing.slot_TK, routing.weight_TK


@_remap.register_fake
def _(row_TK: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return row_TK.new_empty(row_TK.shape, dtype=torch.int32), row_TK.new_empty(row_TK.shape, dtype=torch.float32)


@torch.library.custom_op("secateur::moe_ffn", mutates_args=())
def _moe_ffn(
    x_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    w_in_PGD: torch.Tensor,
    w_out_PDF: torch.Tensor,
    const_CD: torch.Tensor | None,
    b_in_PG: torch.Tensor | None,
    b_out_PD: torch.Tensor | None,
    residual_TD: torch.Tensor | None,
    shared_TD: torch.Tensor | None,
    activation: str,
    gated: bool,
    kept_share: float,
    batch_invariant: bool,
) -> torch.Tensor:
    experts = ExpertWeights(
        w_in_PGD, w_out_PDF, const_CD, b_in_PG, b_out_PD, cast(Activation, activation), gated, kept_share
    )
    per_token = slot_TK.shape[1] * (w_out_PDF.shape[2] + x_TD.shape[1]) * x_TD.element_size()
    size = max(1, WORKSPACE_BYTES // per_token)
    chunks = [slice(start, start + size) for start in range(0, x_TD.shape[0], size)] or [slice(0)]
    outs = [
        _layer(
            x_TD[rows],
            Routing(slot_TK[rows], weight_TK[rows]),
            experts,
            None if residual_TD is None else residual_TD[rows],
            None if shared_TD is None else shared_TD[rows],
            batch_invariant,
        )
        for rows in chunks
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@_moe_ffn.register_fake
def _(x_TD: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(x_TD)


def _layer(
    x_TD: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    residual_TD: torch.Tensor | None,
    shared_TD: torch.Tensor | None,
    batch_invariant: bool,
) -> torch.Tensor:
    num_experts, width, inner = experts.w_out_PDF.shape
    num_tokens, top_k = routing.slot_TK.shape
    layer = tiles.Layer(
        num_tokens, top_k, num_experts, width, inner, experts.gated, x_TD.element_size(), experts.kept_share
    )
    chosen = tiles.choose(layer, limits(x_TD.device), batch_invariant)
    if chosen is None:
        h_NF = pair.pair_gate_up(x_TD, routing.slot_TK, experts)
        return pair.pair_down(h_NF, routing, experts, residual_TD, shared_TD)
    pairs = sort_pairs(routing.slot_TK, num_experts, chosen.gate_up.rows)
    h_NF = grouped_gemm.gate_up(x_TD, experts, pairs, top_k, chosen.gate_up, chosen.group)
    y_ND = grouped_gemm.down(h_NF, experts, pairs, chosen.down, chosen.group)
    return combine(y_ND, routing, experts.const_CD, residual_TD, shared_TD)


def _rows(part: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels take any distance between rows, but a row must be contiguous."""
    return part if part is None or part.stride(-1) == 1 else part.contiguous()


@cache
def limits(device: torch.device) -> tiles.Device:
    """What tile choice needs to know about a device; the interpreter pretends to be an H100."""
    if device.type != "cuda":
        return tiles.Device("hopper", 232_448, 132)
    properties = torch.cuda.get_device_properties(device)
    architecture = tiles.ARCHITECTURES[properties.major]
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub lacks it
    return tiles.Device(architecture, shared_bytes, properties.multi_processor_count)
