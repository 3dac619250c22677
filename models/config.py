"""The architecture of a loaded model, in our words, whatever family it came from."""

from dataclasses import dataclass
from typing import Literal, get_args

Pooling = Literal["last", "mean", "first"]
QKNorm = Literal["none", "head", "full"]
Semantics = Literal["slice", "zero", "tie", "constant"]
Structure = Literal["row", "col"]

POOLINGS: tuple[str, ...] = get_args(Pooling)
SEMANTICS: tuple[str, ...] = get_args(Semantics)


@dataclass(frozen=True)
class Bitmask:
    """A matrix without its zeros: each `group` neighbouring columns of a row keep `kept` values, and a bit per column
    says which. Raises ValueError for a count outside 1..group."""

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.group:
            raise ValueError(f"a group of {self.group} columns cannot keep {self.kept} values")

    def __str__(self) -> str:
        return f"{self.kept} of {self.group} columns"


@dataclass(frozen=True)
class LowRank:
    """A matrix as U V of this rank, plus `lines` whole rows or columns of what that leaves.

    Raises ValueError for a rank below 1 or a negative number of lines.
    """

    rank: int
    lines: int
    structure: Structure

    def __post_init__(self) -> None:
        if self.rank < 1 or self.lines < 0:
            raise ValueError(f"rank is {self.rank} and lines {self.lines}, must be at least 1 and 0")

    def __str__(self) -> str:
        return f"rank {self.rank} + {self.lines} {self.structure}s"


Form = Bitmask | LowRank


@dataclass(frozen=True)
class Compression:
    """How one layer's experts hold their three matrices; None is dense."""

    gate: Form | None = None
    up: Form | None = None
    down: Form | None = None

    def __str__(self) -> str:
        forms = (("gate", self.gate), ("up", self.up), ("down", self.down))
        return ", ".join(f"{name} {form}" for name, form in forms if form is not None)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's experts.

    num_experts  physical experts held (after pruning); 0 for a dense layer.
    route_E      per router row: the slot it means (kernels.routing), length = router rows; empty for a dense layer.
    compression  how the experts' matrices are stored and run; None if they are dense.
    """

    num_experts: int
    route_E: tuple[int, ...]
    compression: Compression | None = None

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
class Vision:
    """How an image becomes tokens: it is resized to height x width and cut into square patches, `patch` pixels a side.

    channels  1 for grey, 3 for red, green, blue. mean, std: per channel; the model reads (value / 255 - mean) / std.
    capacity  tokens that each expert takes of an image, where experts choose; 0 where tokens choose.
    """

    height: int
    width: int
    patch: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    capacity: int = 0

    @property
    def num_patches(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


@dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass and the loader need to know. Sizes are counts of elements, not bytes.

    max_tokens: the longest input; every image has so many. vision: None for a model that reads text.
    """

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
    vision: Vision | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.num_experts)
