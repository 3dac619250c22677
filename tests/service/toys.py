"""Toy models whose answers a person can compute: the logit of class c is how often the digit c stands in the text.

"0 0 2" has logits [2, 0, 1]. Other words are switches: `poison` makes the pass raise, `nan` and `inf` spoil their own
row, `huge` fits into memory only alone, `broken` breaks the device.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.moe import BACKENDS
from models.checkpoint import Checkpoint
from models.classifier import Output
from models.config import LayerShape, ModelConfig
from models.decoder import MoEClassifier
from models.errors import CheckpointError
from models.manifest import Manifest
from models.tokenizer import TOKENIZER_FILE, Encoded, TextEncoder
from service.settings import Settings, load_settings

POISON, NAN, INF, HUGE, BROKEN, OTHER = range(100, 106)
SWITCHES = {"poison": POISON, "nan": NAN, "inf": INF, "huge": HUGE, "broken": BROKEN}
LABELS = ("negative", "neutral", "positive")


class ToyEncoder(TextEncoder):
    """One token per word; `calls` counts texts; the word `crash` makes it raise, `void` has no token."""

    def __init__(self, max_tokens: int = 8) -> None:
        self.max_tokens = max_tokens
        self.calls = 0

    def encode(self, text: object, max_tokens: int | None = None) -> Encoded[tuple[int, ...]]:
        assert isinstance(text, str)
        self.calls += 1
        limit = self.max_tokens if max_tokens is None else min(self.max_tokens, max_tokens)
        words = [word for word in text.split() if word != "void"]
        if "crash" in words:
            raise RuntimeError(f"cannot encode {text}")
        ids = tuple(int(word) if word.isdigit() else SWITCHES.get(word, OTHER) for word in words)
        return Encoded(ids[:limit], len(ids))


class ToyModel(MoEClassifier):
    """Counts digits. `gate` holds every pass until it is set; `entered` is released when a pass begins.

    fault: an exception that every pass raises, or a value that every logit takes. shift: the classes every count moves.
    allergy: a token that makes a pass raise.
    """

    def __init__(self, num_labels: int = 3, kept: int = 4) -> None:
        nn.Module.__init__(self)
        shape = LayerShape(kept, tuple(range(kept)))
        self.config = toy_config(num_labels, (shape, shape))
        self.backend = BACKENDS["reference"]()
        self.embedding_VD = nn.Parameter(torch.zeros(4, 8), requires_grad=False)
        self.w_in_PGD = nn.Parameter(torch.zeros(kept, 4, 2), requires_grad=False)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[tuple[int, ...]]] = []
        self.fault: Exception | float | None = None
        self.shift = 0
        self.allergy = POISON

    def classify(self, sequences: Sequence[Sequence[int]]) -> Output:
        self.batches.append([tuple(ids) for ids in sequences])
        self.entered.release()
        assert self.gate.wait(30), "the test never opened the gate"
        flat = [token for ids in sequences for token in ids]
        if isinstance(self.fault, Exception):
            raise self.fault
        if self.allergy in flat:
            raise RuntimeError("poison")
        if HUGE in flat and len(sequences) > 1:
            raise torch.OutOfMemoryError("huge")
        if BROKEN in flat:
            raise torch.AcceleratorError("broken")
        classes = self.config.num_labels
        logits_BC = torch.tensor([[float(list(ids).count(c)) for c in range(classes)] for ids in sequences])
        logits_BC = logits_BC.roll(self.shift, 1)
        if self.fault is not None:
            logits_BC[:] = self.fault
        for row, ids in enumerate(sequences):
            if NAN in ids:
                logits_BC[row, 0] = torch.nan
            if INF in ids:
                logits_BC[row, 0] = torch.inf
        return Output(logits_BC, routed_slots=4 * len(flat), dropped_slots=len(flat))


def toy_config(num_labels: int, layers: tuple[LayerShape, ...]) -> ModelConfig:
    sizes: dict[str, Any] = dict.fromkeys(
        ("vocab_size", "width", "num_heads", "num_kv_heads", "head_dim", "expert_width", "dense_width", "top_k"), 1
    )
    return ModelConfig(
        family="toy",
        shared_width=0,
        normalize_top_k=False,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_tokens=8,
        qk_norm="none",
        qkv_bias=False,
        num_labels=num_labels,
        pooling="last",
        layers=layers,
        **sizes,
    )


@dataclass(frozen=True)
class ToyCheckpoint(Checkpoint):
    """A checkpoint that passes its test unless told otherwise."""

    is_faithful: bool = True

    def verify(self) -> None:
        if not self.is_faithful:
            raise CheckpointError("golden input 0 is off")


def toy_checkpoint(
    path: Path = Path("toy"),
    model: ToyModel | None = None,
    encoder: ToyEncoder | None = None,
    labels: tuple[str, ...] = LABELS,
    problem_type: str = "single_label_classification",
    manifest: Manifest | None = None,
    tokenizer: str = "t",
    is_faithful: bool = True,
) -> ToyCheckpoint:
    return ToyCheckpoint(
        path=path,
        model=model or ToyModel(len(labels)),
        encoder=encoder or ToyEncoder(),
        labels=labels,
        problem_type=problem_type,
        manifest=manifest,
        raw_config={},
        files={TOKENIZER_FILE: tokenizer},
        is_faithful=is_faithful,
    )


class ToyLoader:
    """Gives each path's checkpoint, made once and kept in `made`; a path in `broken` fails to load."""

    def __init__(self, makers: dict[str, Callable[[], ToyCheckpoint]] | None = None) -> None:
        self.makers = makers or {}
        self.made: dict[str, ToyCheckpoint] = {}
        self.broken: dict[str, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, path: Path, device: str, dtype: str, backend: str) -> Checkpoint:
        assert self.gate.wait(30), "the test never opened the gate"
        if path.name in self.broken:
            raise self.broken[path.name]
        self.made[path.name] = self.makers.get(path.name, toy_checkpoint)()
        return self.made[path.name]

    def model(self, name: str) -> ToyModel:
        model = self.made[name].model
        assert isinstance(model, ToyModel)
        return model

    def encoder(self, name: str) -> ToyEncoder:
        encoder = self.made[name].encoder
        assert isinstance(encoder, ToyEncoder)
        return encoder


TOY_CONFIG = """
version: 1
server: {port: 0, ready_off_seconds: 0}
deployments:
  mood-full: {path: mood-full, role: full}
  mood-pruned: {path: mood-pruned, role: pruned}
  topics-full: {path: topics-full, role: full}
tasks:
  mood: {deployments: [mood-full, mood-pruned], full: mood-full, slo_ms: 40}
  topics: {deployments: [topics-full], full: topics-full}
default_task: mood
limits: {max_inputs: 8, max_body_bytes: 4096, max_chars: 400, max_queue_chars: 4096, max_queue_items: 16}
engine: {max_batch_tokens: 16, max_batch_items: 4}
"""


def toy_settings(directory: Path, **sections: Any) -> Settings:
    """The toy configuration with some sections laid over it."""
    file = directory / "secateur.yaml"
    file.write_text(TOY_CONFIG, encoding="utf-8")
    return load_settings(file, sections)


def toy_loader() -> ToyLoader:
    """Two deployments of a three-class task, and one of a multi-label task."""
    return ToyLoader(
        {
            "mood-pruned": lambda: toy_checkpoint(model=ToyModel(kept=2)),
            "topics-full": lambda: toy_checkpoint(
                labels=("art", "law", "war", "zoo"), problem_type="multi_label_classification"
            ),
        }
    )
