"""What every model is to the rest of the house, whatever it reads: items in, logits out, layers with experts between.

Legend: T tokens of a batch, B items, D model width, C classes, E router rows, P physical experts, F expert inner width,
G = 2F (F if not gated), K chosen experts per token, V variants.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from kernels.compressed import CompressedExperts
from kernels.compressed import moe_ffn as compressed_ffn
from kernels.moe import Backend, select_backend
from kernels.routing import Activation, ExpertWeights, RouterPolicy, Routing
from kernels.sparse import SparseProducts
from models.compressed import compressed_buffers, experts_of
from models.config import LayerShape, ModelConfig

Experts = ExpertWeights | CompressedExperts


class Noise(Protocol):
    """What training does to embeddings, and to every branch's output before it joins the residual; shapes are kept."""

    def embedding(self, x_TD: torch.Tensor) -> torch.Tensor: ...

    def branch(self, x_TD: torch.Tensor) -> torch.Tensor: ...


class Tap(Protocol):
    """What calibration, training and metrics may look at in each MoE layer; never changes the result."""

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None: ...


class Batch(Protocol):
    """Items laid end to end. lengths: the tokens of each."""

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Output:
    """logits_BC: float32 [B, C] on the CPU. routed_slots: (token, choice) pairs routed in all layers; dropped_slots:
    those among them whose expert was pruned."""

    logits_BC: torch.Tensor
    routed_slots: int
    dropped_slots: int


class MoELayer(nn.Module):
    """The half of a layer that holds experts: parameters by name, what router rows mean, and the products.

    Which of the tensors below exist follows from the family and the layer's shape; compressed experts have others in
    place of w_in_PGD and w_out_PDF (models.compressed).
    """

    w_router_ED: torch.Tensor
    w_in_PGD: torch.Tensor
    w_out_PDF: torch.Tensor
    const_CD: torch.Tensor
    table_VE: torch.Tensor
    products: SparseProducts | None = None  # what packed the experts' 2:4 matrices, if anything did (models.sparse)

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        sizes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.shape: LayerShape = config.layers[index]
        self.policy = RouterPolicy(top_k=config.top_k, normalize=config.normalize_top_k)
        self.kept_share = sum(slot >= 0 for slot in self.shape.route_E) / max(self.shape.num_rows, 1)
        register(self, sizes, dtype, device)
        for name, (size, kind) in compressed_buffers(config, self.shape).items():
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        table_VE = torch.tensor([self.shape.route_E], dtype=torch.int32, device=device)
        self.register_buffer("table_VE", table_VE, persistent=False)

    def route(self, logits_TE: torch.Tensor, backend: Backend) -> Routing:
        """Which experts each token goes to; by token here, a family may let experts choose."""
        return backend.route(logits_TE, self.table_VE, self.policy)

    def run_experts(
        self,
        x_TD: torch.Tensor,
        backend: Backend,
        tap: Tap | None,
        residual_TD: torch.Tensor | None = None,
        shared_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The chosen experts' weighted sum, plus the residual and the shared expert's output: [T, D] -> [T, D]."""
        logits_TE = backend.linear(x_TD, self.w_router_ED)
        routing = self.route(logits_TE, backend)
        experts = self.experts
        if tap is not None:
            tap(self.index, x_TD, logits_TE, routing, experts)
        if isinstance(experts, CompressedExperts):
            return compressed_ffn(x_TD, routing, experts, residual_TD, shared_TD, linear=backend.linear)
        return backend.moe_ffn(x_TD, routing, experts, residual_TD, shared_TD)

    @property
    def experts(self) -> Experts:
        if self.shape.compression is not None:
            return self.compressed()
        return ExpertWeights(self.w_in_PGD, self.w_out_PDF, self.constants, kept_share=self.kept_share)

    def compressed(self, activation: Activation = "silu") -> CompressedExperts:
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        return experts_of(self.config, self.shape, tensors, self.constants, activation, self.products)

    @property
    def constants(self) -> torch.Tensor | None:
        return self.const_CD if self.shape.num_constants else None


class Classifier(nn.Module, ABC):
    """Parameters are uninitialised: a checkpoint or a trainer fills them.

    An item is what the encoder made of one input, a sequence of token ids or an image; its length is its number of
    tokens.
    """

    layers: nn.ModuleList

    def __init__(
        self,
        config: ModelConfig,
        sizes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = select_backend(torch.device(device), backend)
        register(self, sizes, dtype, device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    @abstractmethod
    def pools_early(self) -> bool:
        """Whether the head reads one token, so that the last layer need not compute the others."""

    @abstractmethod
    def pack(self, items: Sequence[Any]) -> Any:
        """A batch of these items on the model's device. Raises ValueError if there is none or one is empty."""

    @abstractmethod
    def hidden(
        self, batch: Any, tap: Tap | None = None, pooled_only: bool = False, noise: Noise | None = None
    ) -> torch.Tensor:
        """Final hidden states after the last norm: [T, D], or [B, D] if only the token that the head reads is wanted.

        With `pooled_only`, the last layer computes queries and experts for one token per item. While gradients are
        on, the differentiable reference runs whatever the backend is.
        """

    @abstractmethod
    def pooled(self, x_TD: torch.Tensor, batch: Any) -> torch.Tensor:
        """What the head reads of the final states: [T, D] -> [B, D]."""

    @abstractmethod
    def head(self, x_BD: torch.Tensor) -> torch.Tensor:
        """[B, D] -> logits [B, C]."""

    @abstractmethod
    def blanks(self, tokens: int, max_items: int) -> Sequence[Sized]:
        """Items of about so many tokens in all, with nothing in them, for warming up."""

    def forward(self, batch: Any, tap: Tap | None = None) -> torch.Tensor:
        """Class logits [B, C] in the model's dtype, pooled as the checkpoint says."""
        x = self.hidden(batch, tap, self.pools_early)
        return self.head(x if self.pools_early else self.pooled(x, batch))

    @torch.inference_mode()
    def classify(self, items: Sequence[Any]) -> Output:
        """One packed forward pass; the order of the items is kept. Raises ValueError on an empty item."""
        tally = SlotTally(self.config)
        logits_BC = self(self.pack(items), tally)
        return Output(logits_BC.float().cpu(), int(tally.routed), int(tally.dropped))


class SlotTally:
    """A tap that counts routed pairs and, in layers that have lost experts, the pairs that met a lost one."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.has_pruned = tuple(any(slot < 0 for slot in layer.route_E) for layer in config.layers)
        self.routed = 0
        self.dropped: int | torch.Tensor = 0

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None:
        routed = self._pairs(layer, routing.slot_TK)
        self.routed += routed
        if self.has_pruned[layer]:
            self.dropped = self.dropped + routed - (routing.slot_TK >= 0).sum()

    def _pairs(self, layer: int, slot_TK: torch.Tensor) -> int:
        """Where experts choose, a slot of -1 is also what no expert took."""
        vision = self.config.vision
        if vision is None or not vision.capacity:
            return slot_TK.numel()
        return len(slot_TK) // self.config.max_tokens * self.config.layers[layer].num_rows * vision.capacity


def register(
    module: nn.Module, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give a module uninitialised parameters of these names and shapes."""
    for name, size in sizes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))
