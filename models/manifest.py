"""secateur.json: what a checkpoint is, where it came from, and the answers it must give before it may serve."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from models.config import Compression, LayerShape, Semantics
from models.errors import CheckpointError
from models.hf_config import read_json

MANIFEST_FILE = "secateur.json"

# Golden inputs are fixed sentences, never rows of a user's data: a manifest travels with the checkpoint.
GOLDEN_TEXTS = (
    "Please confirm your account details to receive the payment.",
    "Fracture of the lower end of the left radius, initial encounter",
    "Der Eintrag wurde gespeichert; 日本語 and 123 symbols #!?",
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Layer(_Frozen):
    """One layer: experts before pruning, which of them were kept (or are the heads of merges), and what each router
    row now means. scores: the method's score per old expert, higher is kept; empty for a parent. By the calibration
    data, kept_slots is the share of routed pairs that still run an expert, lost_tokens of tokens without any.
    compression: how the experts' matrices are stored, if not as they are."""

    total: int
    num_experts: int
    kept: tuple[int, ...]
    route: tuple[int, ...]
    scores: tuple[float, ...] = ()
    kept_slots: float | None = None
    lost_tokens: float | None = None
    compression: Compression | None = None

    @model_validator(mode="after")
    def _route_reaches_the_experts(self) -> "Layer":
        slots = {slot for slot in self.route if slot >= 0}
        if slots != set(range(self.num_experts)):
            raise ValueError(
                f"route must reach all {self.num_experts} experts and no other, it reaches {sorted(slots)}"
            )
        return self

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.num_experts, self.route, self.compression)


class Source(_Frozen):
    """A checkpoint this one was made from: its directory's name, the hash of each file, its size."""

    name: str
    files: dict[str, str]
    parameters: int
    bytes: int


class Rows(_Frozen):
    """Labelled rows that were used: a name, how many, and the sha256 of their texts and labels."""

    name: str
    rows: int
    sha256: str


class ClassAccuracy(_Frozen):
    """Recall of one class by parent and child on the same rows, as fractions."""

    label: str
    rows: int
    parent: float
    child: float


class Accuracy(_Frozen):
    """Accuracy of parent and child on the same rows, as fractions; parent is None for a model that was trained here.

    agreement: the share of rows that both give the same label; classes: each one's recall. Empty for a trained model.
    """

    data: Rows
    child: float
    parent: float | None = None
    agreement: float | None = None
    classes: tuple[ClassAccuracy, ...] = ()


class Golden(_Frozen):
    """A fixed input, a text or the name of a drawn image (models.images), and the float32 logits it must give."""

    text: str = ""
    image: str = ""
    logits: tuple[float, ...]


class Manifest(_Frozen):
    """The content of secateur.json. `bytes` counts stored weights; a float32 load of a bf16 file takes twice that."""

    format: Literal[1] = 1
    family: str
    method: str
    options: dict[str, Any]
    semantics: Semantics | Literal["none"]
    dtype: str
    parameters: int
    bytes: int
    layers: tuple[Layer, ...]
    files: dict[str, str]
    golden: tuple[Golden, ...]
    parent: Source | None = None
    pretrained: Source | None = None
    calibration: Rows | None = None
    accuracy: Accuracy | None = None
    training: dict[str, Any] | None = None

    @property
    def parent_sha256(self) -> str | None:
        """One hash for the parent: over the hashes of its files."""
        return combined_sha256(self.parent.files) if self.parent else None

    @property
    def parent_bytes(self) -> int | None:
        return self.parent.bytes if self.parent else None


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a checkpoint directory, or None if it has none. Raises CheckpointError naming a bad field."""
    if not (path / MANIFEST_FILE).exists():
        return None
    try:
        return Manifest.model_validate(read_json(path / MANIFEST_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{MANIFEST_FILE}: {field}: {first['msg']}") from None


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(files: dict[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
