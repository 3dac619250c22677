"""Where candidates are built and measured: one parent, its statistics and its dev rows, everything at most once.

Legend: N dev rows, in the order in which they are used.
"""

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from models import memory
from models.batches import by_length
from models.checkpoint import Checkpoint
from models.classifier import Classifier
from models.evaluate import BATCH_TOKENS
from models.flops import flops_per_token
from models.pruning import METHODS, LayerPlan, Method
from models.pruning.allocate import Keep, Rules
from models.pruning.apply import apply
from models.pruning.candidates import PARENT, Candidate
from models.pruning.confirm import BoolArray
from models.pruning.journal import Journal
from models.pruning.prune import TaskRows, choose
from models.pruning.race import Run
from models.pruning.stats import DATA_GROUPS, LayerStats
from models.weights import DTYPES

NOTHING: Mapping[str, Any] = {"right": "", "losses": "", "slots": [0, 0], "flops_per_token": {}}
SINGLE_RUNS = 40
BATCH_ROWS = 32
BATCH_RUNS = 7


@dataclass(frozen=True)
class DevRows:
    """Rows that judge, encoded, in the order in which they are used; group_N: who belongs together, as numbers."""

    sequences: tuple[Sized, ...]
    truth: tuple[int, ...]
    group_N: tuple[int, ...]

    @property
    def mean_length(self) -> float:
        return sum(map(len, self.sequences)) / len(self.sequences)


@dataclass
class Workbench:
    """parent and known are read only; plans and runs fill up."""

    parent: Checkpoint
    known: Mapping[int, LayerStats]
    rows: TaskRows
    dev: DevRows
    journal: Journal
    seed: int = 0
    plans: dict[Candidate, dict[int, LayerPlan]] = field(default_factory=dict)

    def plan(self, candidate: Candidate) -> dict[int, LayerPlan]:
        """The candidate's plans by layer. Raises PlanError if it cannot be done or must not."""
        if candidate not in self.plans:
            method = METHODS[candidate.method]
            settings = method.read_options(dict(candidate.options))
            keep: Keep = candidate.keep
            semantics = next(s for s in method.semantics if s == candidate.semantics)
            rules, known = Rules(candidate.allocation), self._known(method, settings)
            _, plans = choose(self.parent, method, semantics, settings, keep, rules, known, self.rows, self.seed)
            self.plans[candidate] = plans
        return self.plans[candidate]

    def _known(self, method: Method, settings: Mapping[str, Any]) -> dict[int, LayerStats]:
        """What `prune` would gather for this method, so that it makes the same child: guards read what is there."""
        wanted = method.needed(settings)
        if wanted & set(DATA_GROUPS):
            wanted |= set(DATA_GROUPS)
        return {
            layer: replace(stats, groups=tuple(group for group in stats.groups if type(group) in wanted))
            for layer, stats in self.known.items()
        }

    def child(self, candidate: Candidate) -> Classifier:
        """The model, its new weights rounded as they will be stored."""
        if candidate == PARENT:
            return self.parent.model
        model = apply(self.parent.model, self.plan(candidate))
        stored = DTYPES[self.parent.stored_dtype]
        shared = {parameter.data_ptr() for parameter in self.parent.model.parameters()}
        for parameter in model.parameters():
            if parameter.dtype != stored and parameter.data_ptr() not in shared:
                parameter.data = parameter.data.to(stored).to(parameter.dtype)
        return model

    def bytes(self, model: Classifier) -> int:
        return memory.stored_bytes(model, DTYPES[self.parent.stored_dtype].itemsize)

    def run(self, candidate: Candidate, rows: int) -> Run:
        """What the candidate does on the first so many dev rows; those already in the journal are not run again."""
        known = self.journal.document["measured"].get(str(candidate))
        if known is None or len(known["right"]) < rows:
            known = self._more(candidate, known or NOTHING, rows)
            self.journal.note("measured", str(candidate), known)
        right_N = np.frombuffer(known["right"][:rows].encode(), dtype=np.uint8) == ord("1")
        loss_N = np.frombuffer(bytes.fromhex(known["losses"]), dtype="<f4")[:rows]
        # As of these rows, whatever was measured since: a plan that goes on must see what it saw.
        seen = min(int(end) for end in known["flops_per_token"] if int(end) >= rows)
        return Run(right_N, loss_N, known["bytes"], known["flops_per_token"][str(seen)])

    def _more(self, candidate: Candidate, known: Mapping[str, Any], rows: int) -> dict[str, Any]:
        model, first = self.child(candidate), len(known["right"])
        found = score(model, self.dev.sequences[first:rows], self.dev.truth[first:rows])
        routed, dropped = known["slots"][0] + found.routed, known["slots"][1] + found.dropped
        share = 1 - dropped / routed if routed else 1.0
        return {
            "right": known["right"] + "".join("1" if right else "0" for right in found.right_N),
            "losses": known["losses"] + found.loss_N.astype("<f4").tobytes().hex(),
            "slots": [routed, dropped],
            "bytes": self.bytes(model),
            "flops_per_token": {
                **known["flops_per_token"],
                str(rows): flops_per_token(model, share, self.dev.mean_length),
            },
        }

    def latency(self, candidate: Candidate) -> dict[str, float]:
        """Median seconds for one row and for a batch, measured once."""
        known = self.journal.document["latency"].get(str(candidate))
        if known is None:
            known = measure_latency(self.child(candidate), self.dev.sequences)
            self.journal.note("latency", str(candidate), known)
        return dict(known)


@dataclass(frozen=True)
class Scores:
    """right_N: whether the likeliest label is the true one; loss_N: cross-entropy in nats."""

    right_N: BoolArray
    loss_N: np.ndarray[Any, np.dtype[np.float32]]
    routed: int
    dropped: int


def score(model: Classifier, sequences: Sequence[Sized], truth: Sequence[int]) -> Scores:
    """Rows in batches by length, back in their own order."""
    right_N, loss_N = np.zeros(len(truth), dtype=np.bool_), np.zeros(len(truth), dtype=np.float32)
    routed = dropped = 0
    for indices in by_length(sequences, BATCH_TOKENS):
        output = model.classify([sequences[i] for i in indices])
        true_B = torch.tensor([truth[i] for i in indices])
        right_N[indices] = (output.logits_BC.argmax(1) == true_B).numpy()
        loss_N[indices] = torch.nn.functional.cross_entropy(output.logits_BC, true_B, reduction="none").numpy()
        routed += output.routed_slots
        dropped += output.dropped_slots
    return Scores(right_N, loss_N, routed, dropped)


def measure_latency(model: Classifier, sequences: Sequence[Sized]) -> dict[str, float]:
    """Medians over a few dozen single rows, one after the other, and over repeats of one batch; in seconds."""
    singles = [[item] for item in sequences[:SINGLE_RUNS]]
    batch = list(sequences[:BATCH_ROWS])
    for items in (singles[0], batch):
        model.classify(items)
    return {
        "single_seconds": statistics.median(_seconds(model, items) for items in singles),
        "batch_seconds": statistics.median(_seconds(model, batch) for _ in range(BATCH_RUNS)),
        "batch_rows": len(batch),
    }


def _seconds(model: Classifier, items: Sequence[Sized]) -> float:
    started = time.perf_counter()
    model.classify(items)  # its logits come back to the CPU, so that a GPU has finished
    return time.perf_counter() - started


def digest(value: Any) -> str:
    """A hash of plans by everything that makes the child, so that equal children are measured once."""
    state = hashlib.sha256()
    _feed(state, value)
    return state.hexdigest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        state.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value):
        state.update(type(value).__name__.encode())
        for f in fields(value):
            if f.name != "score_E":  # a record of why, not of what
                _feed(state, getattr(value, f.name))
    elif isinstance(value, Mapping):
        for key in sorted(value):
            state.update(repr(key).encode())
            _feed(state, value[key])
    elif isinstance(value, tuple):
        state.update(f"({len(value)}".encode())
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode())
