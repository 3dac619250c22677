"""One lean decoder for every family: packed sequences, fused projections, stacked experts, pooling before the head.

Legend: T packed tokens, B sequences, D model width, V vocabulary, C classes, E router rows, P physical experts,
F expert inner width, G = 2F, K chosen experts per token, H query heads, h head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from kernels.moe import BACKENDS, Backend, select_backend
from kernels.routing import ExpertWeights, RouterPolicy, Routing
from models.attention import attend, attend_pooled, rotary_table, rotate
from models.config import LayerShape, ModelConfig
from models.packed import PackedBatch


class Noise(Protocol):
    """What training does to embeddings, and to every branch's output before it joins the residual; shapes are kept."""

    def embedding(self, x_TD: torch.Tensor) -> torch.Tensor: ...

    def branch(self, x_TD: torch.Tensor) -> torch.Tensor: ...


class Tap(Protocol):
    """What calibration, training and metrics may look at in each MoE layer; never changes the result."""

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: ExpertWeights
    ) -> None: ...


@dataclass(frozen=True)
class Output:
    """logits_BC: float32 [B, C] on the CPU. routed_slots: (token, choice) pairs routed in all layers; dropped_slots:
    those among them whose expert was pruned."""

    logits_BC: torch.Tensor
    routed_slots: int
    dropped_slots: int


class DecoderLayer(nn.Module):
    """Attention, then experts (or one dense feed-forward), each behind an RMS norm and a residual.

    Which of the tensors below exist follows from the family and the layer's shape: see `layer_parameters`.
    """

    attention_norm_D: torch.Tensor
    ffn_norm_D: torch.Tensor
    w_qkv: torch.Tensor
    b_qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    w_o: torch.Tensor
    w_router_ED: torch.Tensor
    w_in_PGD: torch.Tensor
    w_out_PDF: torch.Tensor
    const_CD: torch.Tensor
    w_dense_in: torch.Tensor
    w_dense_out: torch.Tensor
    w_shared_in: torch.Tensor
    w_shared_out: torch.Tensor
    w_shared_gate: torch.Tensor
    table_VE: torch.Tensor

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.shape: LayerShape = config.layers[index]
        self.policy = RouterPolicy(top_k=config.top_k, normalize=config.normalize_top_k)
        self.kept_share = sum(slot >= 0 for slot in self.shape.route_E) / max(self.shape.num_rows, 1)
        for name, size in layer_parameters(config, index).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))
        table_VE = torch.tensor([self.shape.route_E], dtype=torch.int32, device=device)
        self.register_buffer("table_VE", table_VE, persistent=False)

    def forward(
        self,
        x_TD: torch.Tensor,
        batch: PackedBatch,
        rope: tuple[torch.Tensor, torch.Tensor],
        backend: Backend,
        tap: Tap | None = None,
        last_only: bool = False,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [B, D] for the last token of each sequence if `last_only`."""
        normed_TD = self._norm(x_TD, self.attention_norm_D)
        residual = x_TD.index_select(0, batch.last_B) if last_only else x_TD
        mixed = self._attention(normed_TD, batch, rope, backend, last_only)
        x = residual + (mixed if noise is None else noise.branch(mixed))
        normed = self._norm(x, self.ffn_norm_D)
        if noise is None:
            return self._ffn(normed, backend, tap, x)
        return x + noise.branch(self._ffn(normed, backend, tap))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (weight.shape[0],), weight, self.config.norm_eps)

    def _attention(
        self,
        x_TD: torch.Tensor,
        batch: PackedBatch,
        rope: tuple[torch.Tensor, torch.Tensor],
        backend: Backend,
        last_only: bool,
    ) -> torch.Tensor:
        c, linear = self.config, backend.linear
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        bias = self.b_qkv if c.qkv_bias else None
        cos_T1h, sin_T1h = rope
        if last_only:
            w_q, w_kv = self.w_qkv.tensor_split([q_rows])
            b_q, b_kv = (None, None) if bias is None else bias.tensor_split([q_rows])
            q = linear(x_TD.index_select(0, batch.last_B), w_q, b_q)
            k, v = linear(x_TD, w_kv, b_kv).chunk(2, dim=-1)
            q_rope = (cos_T1h.index_select(0, batch.last_B), sin_T1h.index_select(0, batch.last_B))
        else:
            q, k, v = linear(x_TD, self.w_qkv, bias).tensor_split([q_rows, q_rows + kv_rows], dim=-1)
            q_rope = rope
        if c.qk_norm == "full":
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        q, k, v = (x.view(x.shape[0], -1, c.head_dim) for x in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._norm(q, self.q_norm), self._norm(k, self.k_norm)
        q, k = rotate(q, *q_rope), rotate(k, cos_T1h, sin_T1h)
        mixed = (attend_pooled if last_only else attend)(q, k, v, batch)
        return linear(mixed.flatten(1), self.w_o)

    def _ffn(
        self, x_TD: torch.Tensor, backend: Backend, tap: Tap | None, residual_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The feed-forward branch, added to the residual if there is one: [T, D] -> [T, D]."""
        if not self.shape.num_experts:
            out_TD = gated_ffn(x_TD, self.w_dense_in, self.w_dense_out, backend)
            return out_TD if residual_TD is None else residual_TD + out_TD
        logits_TE = backend.linear(x_TD, self.w_router_ED)
        routing = backend.route(logits_TE, self.table_VE, self.policy)
        experts = self.experts
        if tap is not None:
            tap(self.index, x_TD, logits_TE, routing, experts)
        return backend.moe_ffn(x_TD, routing, experts, residual_TD, self._shared(x_TD, backend))

    def _shared(self, x_TD: torch.Tensor, backend: Backend) -> torch.Tensor | None:
        """The gated output of the expert that every token takes, where the family has one."""
        if not self.config.shared_width:
            return None
        shared_TD = gated_ffn(x_TD, self.w_shared_in, self.w_shared_out, backend)
        return torch.sigmoid(backend.linear(x_TD, self.w_shared_gate)) * shared_TD

    @property
    def experts(self) -> ExpertWeights:
        const_CD = self.const_CD if self.shape.num_constants else None
        return ExpertWeights(self.w_in_PGD, self.w_out_PDF, const_CD, kept_share=self.kept_share)


class MoEClassifier(nn.Module):
    """A decoder with a classification head. Parameters are uninitialised: a checkpoint or a trainer fills them."""

    embedding_VD: torch.Tensor
    norm_D: torch.Tensor
    score_CD: torch.Tensor
    rope: torch.Tensor
    layers: nn.ModuleList

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = select_backend(torch.device(device), backend)
        for name, size in outer_parameters(config).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype, device) for i in range(config.num_layers))
        rope = rotary_table(config.head_dim, config.max_tokens, config.rope_theta)
        self.register_buffer("rope", rope.to(device=device, dtype=dtype), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype

    def hidden(
        self, batch: PackedBatch, tap: Tap | None = None, last_only: bool = False, noise: Noise | None = None
    ) -> torch.Tensor:
        """Final hidden states after the last norm: [T, D], or [B, D] if only each last token is wanted.

        With `last_only`, the last layer computes queries and experts for one token per sequence. While gradients are
        on, the differentiable reference runs whatever the backend is.
        """
        backend = BACKENDS["reference"]() if torch.is_grad_enabled() else self.backend
        cos_T1h, sin_T1h = self.rope[:, batch.position_T].unsqueeze(2)
        x = F.embedding(batch.ids_T, self.embedding_VD)
        if noise is not None:
            x = noise.embedding(x)
        for layer in self.layers:
            is_last = layer.index == self.config.num_layers - 1
            x = layer(x, batch, (cos_T1h, sin_T1h), backend, tap, last_only and is_last, noise)
        return F.rms_norm(x, (self.config.width,), self.norm_D, self.config.norm_eps)

    def forward(self, batch: PackedBatch, tap: Tap | None = None) -> torch.Tensor:
        """Class logits [B, C] in the model's dtype, pooled as the checkpoint says (last token, mean, first token)."""
        last_only = self.config.pooling == "last"
        x = self.hidden(batch, tap, last_only)
        return F.linear(x if last_only else pool(x, batch, self.config.pooling), self.score_CD)

    @torch.inference_mode()
    def classify(self, sequences: Sequence[Sequence[int]]) -> Output:
        """One packed forward pass; the order of the sequences is kept. Raises ValueError on an empty sequence."""
        tally = SlotTally(self.config)
        logits_BC = self(PackedBatch.pack(sequences, self.device), tally)
        return Output(logits_BC.float().cpu(), tally.routed, int(tally.dropped))


class SlotTally:
    """A tap that counts routed pairs and, in layers that have lost experts, the pairs that met a lost one."""

    def __init__(self, config: ModelConfig) -> None:
        self.has_pruned = tuple(any(slot < 0 for slot in layer.route_E) for layer in config.layers)
        self.routed = 0
        self.dropped: int | torch.Tensor = 0

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: ExpertWeights
    ) -> None:
        self.routed += routing.slot_TK.numel()
        if self.has_pruned[layer]:
            self.dropped = self.dropped + (routing.slot_TK < 0).sum()


def pool(x_TD: torch.Tensor, batch: PackedBatch, pooling: str) -> torch.Tensor:
    """[T, D] -> [B, D]: the mean over a sequence's tokens, its first token or its last."""
    if pooling == "last":
        return x_TD.index_select(0, batch.last_B)
    length_B = torch.tensor(batch.lengths, device=x_TD.device)
    if pooling == "first":
        return x_TD.index_select(0, batch.last_B - length_B + 1)
    return torch.segment_reduce(x_TD, "mean", lengths=length_B, axis=0)


def gated_ffn(x_TD: torch.Tensor, w_in_GD: torch.Tensor, w_out_DF: torch.Tensor, backend: Backend) -> torch.Tensor:
    gate_TF, up_TF = backend.linear(x_TD, w_in_GD).chunk(2, dim=-1)
    return backend.linear(F.silu(gate_TF) * up_TF, w_out_DF)


def outer_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters outside the layers."""
    return {
        "embedding_VD": (config.vocab_size, config.width),
        "norm_D": (config.width,),
        "score_CD": (config.num_labels, config.width),
    }


def layer_parameters(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's parameters; which exist follows from the family and the layer's shape."""
    c, shape = config, config.layers[index]
    q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "attention_norm_D": (c.width,),
        "ffn_norm_D": (c.width,),
        "w_qkv": (q_rows + 2 * kv_rows, c.width),
        "w_o": (c.width, q_rows),
    }
    if c.qkv_bias:
        sizes["b_qkv"] = (q_rows + 2 * kv_rows,)
    if c.qk_norm == "head":
        sizes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    if c.qk_norm == "full":
        sizes |= {"q_norm": (q_rows,), "k_norm": (kv_rows,)}
    if not shape.num_experts:
        return sizes | {"w_dense_in": (2 * c.dense_width, c.width), "w_dense_out": (c.width, c.dense_width)}
    sizes |= {
        "w_router_ED": (shape.num_rows, c.width),
        "w_in_PGD": (shape.num_experts, 2 * c.expert_width, c.width),
        "w_out_PDF": (shape.num_experts, c.width, c.expert_width),
    }
    if shape.num_constants:
        sizes["const_CD"] = (shape.num_constants, c.width)
    if c.shared_width:
        sizes |= {
            "w_shared_in": (2 * c.shared_width, c.width),
            "w_shared_out": (c.width, c.shared_width),
            "w_shared_gate": (1, c.width),
        }
    return sizes
