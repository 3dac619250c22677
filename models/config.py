"""The architecture of a loaded model, in our words, whatever family it came from."""

from dataclasses import dataclass
from typing import Literal, get_args

Pooling = Literal["last", "mean", "first"]
QKNorm = Literal["none", "head", "full"]
Semantics = Literal["slice", "zero", "tie", "constant"]

POOLINGS: tuple[str, ...] = get_args(Pooling)
SEMANTICS: tuple[str, ...] = get_args(Semantics)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's experts.

    num_experts  physical experts held (after pruning); 0 for a dense layer.
    route_E      per router row: the slot it means (kernels.routing), length = router rows; empty for a dense layer.
    """

    num_experts: int
    route_E: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.route_E)

    @property
    def num_constants(self) -> int:
        """Rows of the constant table that the route refers to (slots -2, -3, ...)."""
        return max((-1 - slot for slot in self.route_E if slot < -1), default=0)

    @classmethod
    def unpruned(cls, num_experts: int) -> "LayerShape":
        return cls(num_experts, tuple(range(num_experts)))


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass and the loader need to know. Sizes are counts of elements, not bytes."""

    family: str
    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    expert_width: int
    dense_width: int
    shared_width: int
    top_k: int
    normalize_top_k: bool
    norm_eps: float
    rope_theta: float
    max_tokens: int
    qk_norm: QKNorm
    qkv_bias: bool
    num_labels: int
    pooling: Pooling
    layers: tuple[LayerShape, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.num_experts)
