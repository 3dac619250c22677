"""V-MoE: a vision transformer whose chosen blocks hold experts (arXiv 2106.05974), experts that choose included.

Legend: T = B * L packed tokens, B images, L tokens of an image, D model width, H heads, h head width, C classes,
E router rows, P physical experts, F expert inner width, K chosen experts per token, c channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.moe import BACKENDS, Backend
from kernels.routing import ExpertWeights, Routing
from models.classifier import Classifier, Experts, MoELayer, Noise, Tap
from models.compressed import compressed_parameters
from models.config import ModelConfig, Vision
from models.images import Pixels

# What flax's `gelu`, and so google-research/vmoe, computes.
ACTIVATION = "tanh"


@dataclass(frozen=True)
class ImageBatch:
    """pixels_BHWc: uint8 [B, height, width, channels]. lengths: tokens of each image, all alike."""

    pixels_BHWc: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.pixels_BHWc.device


class EncoderLayer(MoELayer):
    """Attention over the whole image, then experts or one dense feed-forward, each behind a layer norm and a residual.

    Which of the tensors below exist follows from the layer's shape: see `layer_parameters`.
    """

    attention_norm_D: torch.Tensor
    b_attention_norm_D: torch.Tensor
    w_qkv: torch.Tensor
    b_qkv: torch.Tensor
    w_o: torch.Tensor
    b_o: torch.Tensor
    ffn_norm_D: torch.Tensor
    b_ffn_norm_D: torch.Tensor
    w_dense_in: torch.Tensor
    b_dense_in: torch.Tensor
    w_dense_out: torch.Tensor
    b_dense_out: torch.Tensor
    b_in_PG: torch.Tensor
    b_out_PD: torch.Tensor

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(config, index, layer_parameters(config, index), dtype, device)

    def forward(
        self,
        x_TD: torch.Tensor,
        backend: Backend,
        tap: Tap | None = None,
        pooled_only: bool = False,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [B, D] for the class token of each image if `pooled_only`."""
        length = self.config.max_tokens
        mixed = self._attention(self._norm(x_TD, "attention_norm_D"), backend, pooled_only)
        residual = x_TD[::length] if pooled_only else x_TD
        x = residual + (mixed if noise is None else noise.branch(mixed))
        normed = self._norm(x, "ffn_norm_D")
        if noise is None:
            return self._ffn(normed, backend, tap, x)
        return x + noise.branch(self._ffn(normed, backend, tap))

    def route(self, logits_TE: torch.Tensor, backend: Backend) -> Routing:
        vision = self.config.vision
        assert vision is not None
        if not vision.capacity:
            return super().route(logits_TE, backend)
        row_TE, gate_TE = expert_choice(logits_TE, self.config.max_tokens, vision.capacity)
        return backend.remap(row_TE, gate_TE, self.table_VE)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight_D, bias_D = getattr(self, name), getattr(self, f"b_{name}")
        return F.layer_norm(x, weight_D.shape, weight_D, bias_D, self.config.norm_eps)

    def _attention(self, x_TD: torch.Tensor, backend: Backend, pooled_only: bool) -> torch.Tensor:
        c, linear = self.config, backend.linear
        if pooled_only:
            w_q, w_kv = self.w_qkv.tensor_split([c.width])
            b_q, b_kv = self.b_qkv.tensor_split([c.width])
            q, (k, v) = linear(x_TD[:: c.max_tokens], w_q, b_q), linear(x_TD, w_kv, b_kv).chunk(2, dim=-1)
        else:
            q, k, v = linear(x_TD, self.w_qkv, self.b_qkv).chunk(3, dim=-1)
        num_images = x_TD.shape[0] // c.max_tokens
        q, k, v = (y.reshape(num_images, -1, c.num_heads, c.head_dim).transpose(1, 2) for y in (q, k, v))
        mixed_BHLh = F.scaled_dot_product_attention(q, k, v)
        return linear(mixed_BHLh.transpose(1, 2).reshape(-1, c.width), self.w_o, self.b_o)

    def _ffn(
        self, x_TD: torch.Tensor, backend: Backend, tap: Tap | None, residual_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The feed-forward branch, added to the residual if there is one: [T, D] -> [T, D]."""
        if self.shape.num_experts:
            return self.run_experts(x_TD, backend, tap, residual_TD)
        h_TF = F.gelu(backend.linear(x_TD, self.w_dense_in, self.b_dense_in), approximate=ACTIVATION)
        out_TD = backend.linear(h_TF, self.w_dense_out, self.b_dense_out)
        return out_TD if residual_TD is None else residual_TD + out_TD

    @property
    def experts(self) -> Experts:
        if self.shape.compression is not None:
            return self.compressed("gelu_tanh")
        return ExpertWeights(
            self.w_in_PGD,
            self.w_out_PDF,
            self.constants,
            self.b_in_PG,
            self.b_out_PD,
            activation="gelu_tanh",
            gated=False,
            kept_share=self.kept_share,
        )


class VisionMoEClassifier(Classifier):
    """A vision transformer with a classification head, which reads the class token or the mean over all patches."""

    w_patch: torch.Tensor
    b_patch_D: torch.Tensor
    class_1D: torch.Tensor
    position_LD: torch.Tensor
    norm_D: torch.Tensor
    b_norm_D: torch.Tensor
    score_CD: torch.Tensor
    b_score_C: torch.Tensor
    scale_c: torch.Tensor
    shift_c: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        super().__init__(config, outer_parameters(config), dtype, device, backend)
        self.layers = nn.ModuleList(EncoderLayer(config, i, dtype, device) for i in range(config.num_layers))
        self.vision = _vision(config)
        mean_c, std_c = torch.tensor(self.vision.mean), torch.tensor(self.vision.std)
        self.register_buffer("scale_c", (1 / (255 * std_c)).to(device), persistent=False)
        self.register_buffer("shift_c", (-mean_c / std_c).to(device), persistent=False)

    @property
    def pools_early(self) -> bool:
        """Not where experts choose: whether one takes the class token depends on the other tokens."""
        return self.config.pooling == "first" and not self.vision.capacity

    def pack(self, items: Sequence[Pixels]) -> ImageBatch:
        if not items:
            raise ValueError("a batch needs at least one image")
        pixels_BHWc = torch.stack([torch.from_numpy(item.value_HWc) for item in items])
        return ImageBatch(pixels_BHWc.to(self.device), (self.config.max_tokens,) * len(items))

    def hidden(
        self, batch: ImageBatch, tap: Tap | None = None, pooled_only: bool = False, noise: Noise | None = None
    ) -> torch.Tensor:
        backend = BACKENDS["reference"]() if torch.is_grad_enabled() else self.backend
        x = self._embed(batch, backend)
        if noise is not None:
            x = noise.embedding(x)
        for layer in self.layers:
            is_last = layer.index == self.config.num_layers - 1
            x = layer(x, backend, tap, pooled_only and is_last, noise)
        return F.layer_norm(x, (self.config.width,), self.norm_D, self.b_norm_D, self.config.norm_eps)

    def _embed(self, batch: ImageBatch, backend: Backend) -> torch.Tensor:
        """Each patch's pixels through one matrix, the class token before them, positions added: [T, D]."""
        v, num_images = self.vision, len(batch.lengths)
        x_BHWc = (batch.pixels_BHWc * self.scale_c + self.shift_c).to(self.dtype)
        grid = x_BHWc.view(num_images, v.height // v.patch, v.patch, v.width // v.patch, v.patch, v.channels)
        patches = grid.permute(0, 1, 3, 5, 2, 4).reshape(num_images * v.num_patches, -1)
        x_BLD = backend.linear(patches, self.w_patch.flatten(1), self.b_patch_D).view(num_images, v.num_patches, -1)
        if self.config.pooling == "first":
            x_BLD = torch.cat((self.class_1D.expand(num_images, 1, -1), x_BLD), dim=1)
        return (x_BLD + self.position_LD).flatten(0, 1)

    def pooled(self, x_TD: torch.Tensor, batch: ImageBatch) -> torch.Tensor:
        x_BLD = x_TD.view(len(batch.lengths), -1, x_TD.shape[1])
        return x_BLD[:, 0] if self.config.pooling == "first" else x_BLD.mean(1)

    def head(self, x_BD: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BD, self.score_CD, self.b_score_C)

    def blanks(self, tokens: int, max_items: int) -> list[Pixels]:
        return [Pixels.blank(self.vision, self.config.max_tokens)] * max(1, tokens // self.config.max_tokens)


def expert_choice(logits_TE: torch.Tensor, length: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert takes its `capacity` best tokens of every image (arXiv 2202.09368): rows [T, E], gates [T, E].

    The gate is the softmax over experts, as in google-research/vmoe, and images do not meet: what a batch holds beside
    an image changes nothing. A token's row e is e where expert e took it, else -1. Ties go to the earlier token.
    """
    gate_TE = torch.softmax(logits_TE.float(), dim=-1)
    gate_BLE = gate_TE.view(-1, length, gate_TE.shape[1])
    taken_BCE = torch.argsort(gate_BLE.detach(), dim=1, descending=True, stable=True)[:, :capacity]
    row_BLE = torch.full(gate_BLE.shape, -1, dtype=torch.int32, device=logits_TE.device)
    expert_E = torch.arange(gate_TE.shape[1], dtype=torch.int32, device=logits_TE.device)
    row_BLE.scatter_(1, taken_BCE, expert_E.expand_as(taken_BCE).contiguous())
    return row_BLE.view_as(gate_TE), gate_TE


def outer_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters outside the layers; w_patch: [D, c, rows, columns]."""
    v, width = _vision(config), config.width
    sizes: dict[str, tuple[int, ...]] = {
        "w_patch": (width, v.channels, v.patch, v.patch),
        "b_patch_D": (width,),
        "position_LD": (config.max_tokens, width),
        "norm_D": (width,),
        "b_norm_D": (width,),
        "score_CD": (config.num_labels, width),
        "b_score_C": (config.num_labels,),
    }
    return sizes | ({"class_1D": (1, width)} if config.pooling == "first" else {})


def layer_parameters(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's parameters; which exist follows from the layer's shape."""
    c, shape = config, config.layers[index]
    sizes: dict[str, tuple[int, ...]] = {
        "attention_norm_D": (c.width,),
        "b_attention_norm_D": (c.width,),
        "w_qkv": (3 * c.width, c.width),
        "b_qkv": (3 * c.width,),
        "w_o": (c.width, c.width),
        "b_o": (c.width,),
        "ffn_norm_D": (c.width,),
        "b_ffn_norm_D": (c.width,),
    }
    if not shape.num_experts:
        return sizes | {
            "w_dense_in": (c.dense_width, c.width),
            "b_dense_in": (c.dense_width,),
            "w_dense_out": (c.width, c.dense_width),
            "b_dense_out": (c.width,),
        }
    sizes |= {
        "w_router_ED": (shape.num_rows, c.width),
        "b_in_PG": (shape.num_experts, c.expert_width),
        "b_out_PD": (shape.num_experts, c.width),
    }
    if shape.compression is not None:
        sizes |= compressed_parameters(c, shape)
    else:
        sizes["w_in_PGD"] = (shape.num_experts, c.expert_width, c.width)
        sizes["w_out_PDF"] = (shape.num_experts, c.width, c.expert_width)
    return sizes | ({"const_CD": (shape.num_constants, c.width)} if shape.num_constants else {})


def _vision(config: ModelConfig) -> Vision:
    if config.vision is None:
        raise ValueError(f"{config.family} reads no images")
    return config.vision
