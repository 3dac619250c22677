"""The columns of the kernel benchmark: each computes one layer call from router logits to the layer's output.

Legend: T tokens, K chosen experts per token, N = T * K pairs, R sorted rows, P physical experts, D model width,
F expert inner width, S width of all shared experts together. Every column does its own routing, as it would in its
library, and runs shared experts as the same dense products; none runs the router's own product.

transformers drops a pair by giving it the id P, one past the last expert, and weight 0. Its grouped_mm does no work for
such pairs (since 5.23 only for modules marked as expert-parallel, so we mark them), batched_mm multiplies them by the
last expert, and eager is given the pair as expert 0 with weight 0, which is also what vLLM's substitution does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_cases import Case, Step
from kernels import reference
from kernels.moe import select_backend
from kernels.tiles import Layer

# What batched_mm may copy: it gathers the weights of every pair.
COPY_LIMIT_BYTES = 40e9
# Relative L2 error against float64. Ours rounds h, y and the output. A shared expert, which everybody runs as dense
# products, rounds its gate and up products too; the others do that everywhere and keep pairs' weights in the layer's
# dtype.
OUR_BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 5e-6}
OUR_SHARED_BOUND = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 5e-6}
RIVAL_BOUND = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-4}

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class System:
    """prepare gives the call that is timed; graphed: it can be captured, so it never waits for the device."""

    name: str
    prepare: Callable[[Step], Run]
    graphed: bool = True
    ours: bool = False

    def bound(self, step: Step) -> float:
        bounds = RIVAL_BOUND if not self.ours else OUR_BOUND if step.w_shared_GD is None else OUR_SHARED_BOUND
        return bounds[step.x_TD.dtype]


def systems(case: Case) -> tuple[list[System], dict[str, str]]:
    """The columns that run for a case, and why the others do not."""
    chosen, skipped = [System("ours", ours, ours=True)], {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        name = f"transformers {implementation}"
        if implementation == "batched_mm" and copied_bytes(case) > COPY_LIMIT_BYTES:
            skipped[name] = f"copies {copied_bytes(case) / 1e9:.0f} GB of weights"
            continue
        chosen.append(System(name, _transformers(implementation), graphed=implementation != "eager"))
    chosen.append(System("torch grouped_mm", grouped))
    return chosen, skipped


def copied_bytes(case: Case) -> int:
    return case.tokens * case.model.top_k * case.model.size.expert_bytes


def oracle(step: Step) -> torch.Tensor:
    """The layer's output in float64 [T, D], from the same rounded inputs."""
    routing = reference.route(step.logits_TE, step.table_VE, step.policy)
    x_TD = step.x_TD.double()
    shared_TD = None
    if step.w_shared_GD is not None and step.w_shared_DS is not None:
        h_TS = reference.expert_in(x_TD, step.w_shared_GD)
        shared_TD = reference.expert_out(h_TS, step.w_shared_DS)
    return reference.moe_ffn(x_TD, routing, step.experts, shared_TD=shared_TD)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN anywhere gives NaN, which no bound admits."""
    return float((result.double() - expected).norm() / expected.norm())


def shared_output(step: Step) -> torch.Tensor | None:
    """The shared experts as any library runs them: two dense products. [T, D] or None."""
    if step.w_shared_GD is None or step.w_shared_DS is None:
        return None
    gate_TS, up_TS = F.linear(step.x_TD, step.w_shared_GD).chunk(2, dim=-1)
    return F.linear(F.silu(gate_TS) * up_TS, step.w_shared_DS)


def tile_layer(step: Step) -> Layer:
    """What the choice of tiles goes by."""
    num_experts, width, inner = step.experts.w_out_PDF.shape
    return Layer(
        step.x_TD.shape[0],
        step.policy.top_k,
        num_experts,
        width,
        inner,
        step.experts.gated,
        step.x_TD.element_size(),
        step.experts.kept_share,
    )


def ours(step: Step) -> Run:
    backend = select_backend(step.x_TD.device, "triton")

    def run() -> torch.Tensor:
        routing = backend.route(step.logits_TE, step.table_VE, step.policy)
        return backend.moe_ffn(step.x_TD, routing, step.experts, shared_TD=shared_output(step))

    return run


def grouped(step: Step) -> Run:
    """torch's grouped products between our router, sort and combine: what the two GEMM kernels are worth."""
    from kernels.combine import combine
    from kernels.sort import sort_pairs

    backend, experts, top_k = select_backend(step.x_TD.device, "triton"), step.experts, step.policy.top_k
    num_experts, num_pairs = experts.w_in_PGD.shape[0], step.x_TD.shape[0] * top_k
    position_N = torch.arange(num_pairs, device=step.x_TD.device)
    drops = bool((step.table_VE < 0).any())

    def run() -> torch.Tensor:
        routing = backend.route(step.logits_TE, step.table_VE, step.policy)
        pairs = sort_pairs(routing.slot_TK, num_experts, 16)
        order_R, end_P = pairs.order_N.long(), pairs.offset_Q[1:]
        if drops:  # the order is undefined past the last live pair; a spare row takes what is computed there
            order_R = torch.where(position_N < end_P[-1], order_R, num_pairs)
        row_R = order_R.clamp(max=num_pairs - 1) if drops else order_R
        slot_R = routing.slot_TK.flatten()[row_R].clamp(min=0) if experts.b_in_PG is not None else None
        inner_RG = F.grouped_mm(step.x_TD[row_R // top_k], experts.w_in_PGD.transpose(1, 2), offs=end_P)
        if experts.b_in_PG is not None:
            inner_RG = inner_RG + experts.b_in_PG[slot_R]
        if experts.gated:
            gate_RF, up_RF = inner_RG.chunk(2, dim=-1)
            h_RF = reference.activate(gate_RF, experts.activation) * up_RF
        else:
            h_RF = reference.activate(inner_RG, experts.activation)
        y_RD = F.grouped_mm(h_RF, experts.w_out_PDF.transpose(1, 2), offs=end_P)
        if experts.b_out_PD is not None:
            y_RD = y_RD + experts.b_out_PD[slot_R]
        y_ND = torch.empty(num_pairs + 1, y_RD.shape[1], dtype=y_RD.dtype, device=y_RD.device)
        y_ND[order_R] = y_RD
        return combine(y_ND[:num_pairs], routing, shared_TD=shared_output(step))

    return run


def _transformers(implementation: str) -> Callable[[Step], Run]:
    def prepare(step: Step) -> Run:
        module = experts_module(step, implementation)
        num_experts = step.experts.w_in_PGD.shape[0]
        missing = 0 if implementation == "eager" else num_experts
        slot_E = step.table_VE[0].long()
        drops = bool((slot_E < 0).any())
        slot_E = slot_E.masked_fill(slot_E < 0, missing)
        kept_E = (step.table_VE[0] >= 0).to(step.x_TD.dtype)

        def run() -> torch.Tensor:
            score_TE = torch.softmax(step.logits_TE, dim=-1, dtype=torch.float32)
            weight_TK, row_TK = torch.topk(score_TE, step.policy.top_k, dim=-1)
            if step.policy.normalize:
                weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
            weight_TK = weight_TK.to(step.x_TD.dtype)
            if drops:
                weight_TK, row_TK = weight_TK * kept_E[row_TK], slot_E[row_TK]
            result: torch.Tensor = module(step.x_TD, row_TK, weight_TK)
            shared_TD = shared_output(step)
            return result if shared_TD is None else result + shared_TD

        return run

    return prepare


def experts_module(step: Step, implementation: str) -> Any:
    """transformers' own experts module over views of our weights: nothing is copied."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts = step.experts
    num_experts, width, inner = experts.w_out_PDF.shape
    config = SimpleNamespace(
        num_experts=num_experts,
        hidden_size=width,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config) if experts.gated else ungated_experts()(config)
    tensors = {"gate_up_proj" if experts.gated else "up_proj": experts.w_in_PGD, "down_proj": experts.w_out_PDF}
    if experts.b_in_PG is not None and experts.b_out_PD is not None:
        tensors |= {"up_proj_bias": experts.b_in_PG, "down_proj_bias": experts.b_out_PD}
    for name, tensor in tensors.items():
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    module._is_expert_parallel = True
    return module


@cache
def ungated_experts() -> Any:
    """An experts class for transformers' registry with biases and no gate, which it has none of; eager is its loop."""
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_bias=True)
    class UngatedExperts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = config.num_experts
            self.act_fn = F.gelu
            self.up_proj: torch.nn.Parameter
            self.up_proj_bias: torch.nn.Parameter
            self.down_proj: torch.nn.Parameter
            self.down_proj_bias: torch.nn.Parameter

        def forward(self, x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
            out_TD = torch.zeros_like(x_TD)
            hit_PKT = F.one_hot(slot_TK, num_classes=self.num_experts).permute(2, 1, 0)
            for expert in hit_PKT.sum(dim=(1, 2)).nonzero()[:, 0]:
                choice_R, token_R = torch.where(hit_PKT[expert])
                h_RF = self.act_fn(F.linear(x_TD[token_R], self.up_proj[expert], self.up_proj_bias[expert]))
                y_RD = F.linear(h_RF, self.down_proj[expert], self.down_proj_bias[expert])
                out_TD.index_add_(0, token_R, y_RD * weight_TK[token_R, choice_R, None])
            return out_TD

    return UngatedExperts
