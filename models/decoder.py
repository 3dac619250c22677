"""One lean decoder for every family: packed sequences, fused projections, stacked experts, pooling before the head.

Legend: T packed tokens, B sequences, D model width, V vocabulary, C classes, E router rows, P physical experts,
F expert inner width, G = 2F, K chosen experts per token, H query heads, h head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from kernels.moe import BACKENDS, Backend
from models.attention import attend, attend_pooled, rotary_table, rotate
from models.batches import batch_of
from models.classifier import Classifier, MoELayer, Noise, Tap
from models.compressed import compressed_parameters
from models.config import ModelConfig
from models.packed import PackedBatch


class DecoderLayer(MoELayer):
    """Attention, then experts (or one dense feed-forward), each behind an RMS norm and a residual.

    Which of the tensors below exist follows from the family and the layer's shape: see `layer_parameters`. Compressed
    experts have others in place of w_in_PGD and w_out_PDF: see `models.compressed`.
    """

    attention_norm_D: torch.Tensor
    ffn_norm_D: torch.Tensor
    w_qkv: torch.Tensor
    b_qkv: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    w_o: torch.Tensor
    w_dense_in: torch.Tensor
    w_dense_out: torch.Tensor
    w_shared_in: torch.Tensor
    w_shared_out: torch.Tensor
    w_shared_gate: torch.Tensor

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(config, index, layer_parameters(config, index), dtype, device)

    def forward(
        self,
        x_TD: torch.Tensor,
        batch: PackedBatch,
        rope: tuple[torch.Tensor, torch.Tensor],
        backend: Backend,
        tap: Tap | None = None,
        pooled_only: bool = False,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [B, D] for the last token of each sequence if `pooled_only`."""
        normed_TD = self._norm(x_TD, self.attention_norm_D)
        residual = x_TD.index_select(0, batch.last_B) if pooled_only else x_TD
        mixed = self._attention(normed_TD, batch, rope, backend, pooled_only)
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
        pooled_only: bool,
    ) -> torch.Tensor:
        c, linear = self.config, backend.linear
        q_rows, kv_rows = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        bias = self.b_qkv if c.qkv_bias else None
        cos_T1h, sin_T1h = rope
        if pooled_only:
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
        mixed = (attend_pooled if pooled_only else attend)(q, k, v, batch)
        return linear(mixed.flatten(1), self.w_o)

    def _ffn(
        self, x_TD: torch.Tensor, backend: Backend, tap: Tap | None, residual_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The feed-forward branch, added to the residual if there is one: [T, D] -> [T, D]."""
        if not self.shape.num_experts:
            out_TD = gated_ffn(x_TD, self.w_dense_in, self.w_dense_out, backend)
            return out_TD if residual_TD is None else residual_TD + out_TD
        return self.run_experts(x_TD, backend, tap, residual_TD, self._shared(x_TD, backend))

    def _shared(self, x_TD: torch.Tensor, backend: Backend) -> torch.Tensor | None:
        """The gated output of the expert that every token takes, where the family has one."""
        if not self.config.shared_width:
            return None
        shared_TD = gated_ffn(x_TD, self.w_shared_in, self.w_shared_out, backend)
        return torch.sigmoid(backend.linear(x_TD, self.w_shared_gate)) * shared_TD


class MoEClassifier(Classifier):
    """A decoder with a classification head."""

    embedding_VD: torch.Tensor
    norm_D: torch.Tensor
    score_CD: torch.Tensor
    rope: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        super().__init__(config, outer_parameters(config), dtype, device, backend)
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype, device) for i in range(config.num_layers))
        rope = rotary_table(config.head_dim, config.max_tokens, config.rope_theta)
        self.register_buffer("rope", rope.to(device=device, dtype=dtype), persistent=False)

    @property
    def pools_early(self) -> bool:
        return self.config.pooling == "last"

    def pack(self, items: Sequence[Sequence[int]]) -> PackedBatch:
        return PackedBatch.pack(items, self.device)

    def hidden(
        self, batch: PackedBatch, tap: Tap | None = None, pooled_only: bool = False, noise: Noise | None = None
    ) -> torch.Tensor:
        backend = BACKENDS["reference"]() if torch.is_grad_enabled() else self.backend
        cos_T1h, sin_T1h = self.rope[:, batch.position_T].unsqueeze(2)
        x = F.embedding(batch.ids_T, self.embedding_VD)
        if noise is not None:
            x = noise.embedding(x)
        for layer in self.layers:
            is_last = layer.index == self.config.num_layers - 1
            x = layer(x, batch, (cos_T1h, sin_T1h), backend, tap, pooled_only and is_last, noise)
        return F.rms_norm(x, (self.config.width,), self.norm_D, self.config.norm_eps)

    def pooled(self, x_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        return pool(x_TD, batch, self.config.pooling)

    def head(self, x_BD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BD, self.score_CD)

    def blanks(self, tokens: int, max_items: int) -> list[list[int]]:
        return batch_of(tokens, max_items, self.config.max_tokens)


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
    sizes["w_router_ED"] = (shape.num_rows, c.width)
    if shape.compression is not None:
        sizes |= compressed_parameters(c, shape)
    else:
        sizes["w_in_PGD"] = (shape.num_experts, 2 * c.expert_width, c.width)
        sizes["w_out_PDF"] = (shape.num_experts, c.width, c.expert_width)
    if shape.num_constants:
        sizes["const_CD"] = (shape.num_constants, c.width)
    if c.shared_width:
        sizes |= {
            "w_shared_in": (2 * c.shared_width, c.width),
            "w_shared_out": (c.width, c.shared_width),
            "w_shared_gate": (1, c.width),
        }
    return sizes
