"""How good a checkpoint is on labelled rows, with intervals; and how two checkpoints differ on the same rows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binomtest

from models import memory
from models.batches import by_length
from models.checkpoint import Checkpoint
from models.dataset import Row, label_ids
from models.errors import DataError
from models.progress import Progress, silent

BOOTSTRAP_SAMPLES = 2000
# Rows per forward pass are bounded by tokens; this bounds them for very short texts too.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class ClassRecall:
    """Of the rows that truly have this label, the share that was found, with its 95 % Wilson interval."""

    label: str
    rows: int
    recall: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on one set of rows. Fractions, not percent; intervals are 95 % Wilson score intervals."""

    checkpoint: str
    rows: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    recalls: tuple[ClassRecall, ...]
    predictions: tuple[int, ...]
    truth: tuple[int, ...]
    groups: tuple[str, ...]
    seconds: float
    tokens: int
    parameters: int
    bytes: int
    dropped_share: float


@dataclass(frozen=True)
class Agreement:
    """Two checkpoints on the same rows: b against a. Fractions.

    rate, interval: share of rows with the same label, Wilson. difference: accuracy of b minus accuracy of a, with a
    95 % paired bootstrap interval over groups. only_a, only_b: rows that only one of them has right.
    """

    rate: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    only_a: int
    only_b: int


def evaluate(
    checkpoint: Checkpoint, rows: Sequence[Row], batch_tokens: int = BATCH_TOKENS, progress: Progress = silent
) -> Evaluation:
    """Classify every row and compare with its label. Raises DataError for an unknown label, a text
    without tokens, or texts for a model of images and the reverse."""
    truth = label_ids(rows, checkpoint.labels)
    sequences = [checkpoint.encoder.encode(row.source).ids for row in rows]
    empty = next((number for number, ids in enumerate(sequences, start=1) if not len(ids)), None)
    if empty is not None:
        raise DataError(f"row {empty} has no tokens")
    started = time.perf_counter()
    predictions = [0] * len(rows)
    routed = dropped = done = 0
    for indices in by_length(sequences, batch_tokens):
        output = checkpoint.model.classify([sequences[i] for i in indices])
        for index, label in zip(indices, output.logits_BC.argmax(1).tolist(), strict=True):
            predictions[index] = label
        routed += output.routed_slots
        dropped += output.dropped_slots
        done += len(indices)
        progress(done, len(rows), f"evaluating {checkpoint.path.name}")
    right = sum(p == t for p, t in zip(predictions, truth, strict=True))
    return Evaluation(
        checkpoint=checkpoint.path.name,
        rows=len(rows),
        accuracy=right / len(rows),
        accuracy_interval=wilson(right, len(rows)),
        macro_f1=macro_f1(predictions, truth),
        recalls=class_recalls(predictions, truth, checkpoint.labels),
        predictions=tuple(predictions),
        truth=tuple(truth),
        groups=tuple(row.group for row in rows),
        seconds=time.perf_counter() - started,
        tokens=sum(len(ids) for ids in sequences),
        parameters=memory.num_parameters(checkpoint.model),
        bytes=sum(checkpoint.weight_bytes().values()),
        dropped_share=dropped / routed if routed else 0.0,
    )


def agreement(a: Evaluation, b: Evaluation, seed: int = 0) -> Agreement:
    """Compare b with a. Raises ValueError unless both saw the same rows."""
    if a.truth != b.truth or a.groups != b.groups:
        raise ValueError("the two evaluations are not about the same rows")
    same = sum(x == y for x, y in zip(a.predictions, b.predictions, strict=True))
    right_a = np.equal(a.predictions, a.truth)
    right_b = np.equal(b.predictions, b.truth)
    change_N = right_b.astype(np.float64) - right_a.astype(np.float64)
    return Agreement(
        rate=same / a.rows,
        interval=wilson(same, a.rows),
        difference=float(change_N.mean()),
        difference_interval=bootstrap_mean(change_N, a.groups, seed),
        only_a=int((right_a & ~right_b).sum()),
        only_b=int((right_b & ~right_a).sum()),
    )


def wilson(right: int, rows: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion. 9 of 10 gives (.596, .982)."""
    interval = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(value_N: npt.NDArray[np.float64], groups: Sequence[str], seed: int) -> tuple[float, float]:
    """95 % percentile interval of a mean, resampling whole groups; a row without group stands for itself."""
    names = [group or f"\0{number}" for number, group in enumerate(groups)]
    _, group_N = np.unique(names, return_inverse=True)
    sum_G = np.bincount(group_N, weights=value_N)
    size_G = np.bincount(group_N).astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(BOOTSTRAP_SAMPLES)
    for sample in range(BOOTSTRAP_SAMPLES):
        chosen = generator.integers(0, sum_G.size, sum_G.size)
        means[sample] = sum_G[chosen].sum() / size_G[chosen].sum()
    lower, upper = np.quantile(means, (0.025, 0.975))
    return float(lower), float(upper)


def macro_f1(predictions: Sequence[int], truth: Sequence[int]) -> float:
    """Mean F1 over the classes that occur in truth or predictions."""
    predicted, true = np.asarray(predictions), np.asarray(truth)
    scores = []
    for label in np.union1d(predicted, true):
        both = int(((predicted == label) & (true == label)).sum())
        scores.append(2 * both / int((predicted == label).sum() + (true == label).sum()))
    return float(np.mean(scores))


def class_recalls(predictions: Sequence[int], truth: Sequence[int], labels: Sequence[str]) -> tuple[ClassRecall, ...]:
    """Recall of each class that has rows, in class-id order."""
    recalls = []
    for label_id, label in enumerate(labels):
        found = [p == t for p, t in zip(predictions, truth, strict=True) if t == label_id]
        if found:
            lower, upper = wilson(sum(found), len(found))
            recalls.append(ClassRecall(label, len(found), sum(found) / len(found), lower, upper))
    return tuple(recalls)


def predict(checkpoint: Checkpoint, inputs: Sequence[object]) -> torch.Tensor:
    """Logits of a few texts or images in one batch: float32 [B, C]."""
    return checkpoint.model.classify([checkpoint.encoder.encode(source).ids for source in inputs]).logits_BC
