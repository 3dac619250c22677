"""One forward pass over a batch, with failures kept to the items that cause them."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

import torch

from models.classifier import Classifier

BatchOutcome = Literal["ok", "split", "retried", "failed"]
Ids = Sized


@dataclass(frozen=True)
class Failure:
    """Why an item has no logits. cause: the exception, or None when the logits were not finite (then kind says how)."""

    code: Literal["inference_failed", "out_of_memory", "invalid_output"]
    cause: Exception | None = None
    kind: Literal["nan", "inf"] | None = None


@dataclass(frozen=True)
class Ran:
    """results: logits or failure per item, in order. The slot counts are sums over the passes that succeeded."""

    results: list[list[float] | Failure]
    outcome: BatchOutcome
    routed_slots: int = 0
    dropped_slots: int = 0

    @property
    def lacked_memory(self) -> bool:
        """Whether the device had no room for the batch, or for an item of it."""
        failures = (result for result in self.results if isinstance(result, Failure))
        return self.outcome == "split" or any(failure.code == "out_of_memory" for failure in failures)


def run(model: Classifier, sequences: list[Ids]) -> Ran:
    """Classify the sequences in one pass; isolate what fails.

    Out of memory: halve, down to one item. Any other exception: rerun each item alone once. A broken device
    (torch.AcceleratorError) is not retried: it propagates and ends the worker.
    """
    try:
        return _pass(model, sequences)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _halves(model, sequences, error)
    except torch.AcceleratorError:
        raise
    except Exception:
        return _one_by_one(model, sequences)


def _pass(model: Classifier, sequences: list[Ids]) -> Ran:
    output = model.classify(sequences)
    rows: list[list[float]] = output.logits_BC.tolist()
    if len(rows) != len(sequences):
        raise RuntimeError(f"the model gave {len(rows)} rows for {len(sequences)} sequences")
    return Ran([_checked(row) for row in rows], "ok", output.routed_slots, output.dropped_slots)


def _checked(row: list[float]) -> list[float] | Failure:
    if all(map(math.isfinite, row)):
        return row
    return Failure("invalid_output", kind="nan" if any(map(math.isnan, row)) else "inf")


def _halves(model: Classifier, sequences: list[Ids], error: Exception) -> Ran:
    if len(sequences) == 1:
        return Ran([Failure("out_of_memory", error)], "failed")
    middle = len(sequences) // 2
    return _joined([run(model, sequences[:middle]), run(model, sequences[middle:])], "split")


def _one_by_one(model: Classifier, sequences: list[Ids]) -> Ran:
    runs: list[Ran] = []
    for sequence in sequences:
        try:
            runs.append(_pass(model, [sequence]))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            runs.append(Ran([Failure("inference_failed", error)], "failed"))
    return _joined(runs, "retried")


def _joined(runs: list[Ran], outcome: BatchOutcome) -> Ran:
    results = [result for ran in runs for result in ran.results]
    if all(ran.outcome == "failed" for ran in runs):
        outcome = "failed"
    return Ran(results, outcome, sum(ran.routed_slots for ran in runs), sum(ran.dropped_slots for ran in runs))
