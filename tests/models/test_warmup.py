"""Which batches a model sees before it serves: every size that kernels tell apart, none on a CPU."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kernels.tiles import TABLES
from models import warmup
from models.batches import batch_of
from models.checkpoint import load_checkpoint
from models.classifier import Classifier, Output
from models.warmup import compiles_at_first_use, token_buckets, warm_up


@pytest.fixture
def model(pristine: Path) -> Classifier:
    """At most 48 tokens in a sequence."""
    return load_checkpoint(pristine).model


@pytest.fixture
def batches(model: Classifier, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Lengths of the sequences of each batch that the model classifies, on a device that is said to compile."""
    seen: list[list[int]] = []
    classify = model.classify

    def record(sequences: Sequence[Sequence[int]]) -> Output:
        seen.append([len(sequence) for sequence in sequences])
        return classify(sequences)

    monkeypatch.setattr(model, "classify", record)
    monkeypatch.setattr(warmup, "compiles_at_first_use", lambda device: True)
    return seen


def test_only_a_gpu_compiles_at_first_use() -> None:
    assert [compiles_at_first_use(torch.device(name)) for name in ("cuda", "cuda:1", "cpu")] == [True, True, False]


def test_nothing_runs_on_a_cpu(model: Classifier, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup, "compiles_at_first_use", compiles_at_first_use)
    warm_up(model, 100, 4)
    assert batches == []


def test_every_bucket_runs_once_and_is_logged(
    model: Classifier, batches: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "secateur.warmup")
    warm_up(model, 300, 4)
    assert [sum(lengths) for lengths in batches] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    # Up to four sequences, unless one would be longer than the 48 tokens that the model reads.
    assert [len(lengths) for lengths in batches] == [1, 2, 4, 4, 4, 4, 4, 4, 6, 7]
    assert [record.fields["tokens"] for record in caplog.records] == [sum(lengths) for lengths in batches]  # type: ignore[attr-defined]


def test_a_batch_that_does_not_fit_ends_the_warm_up(
    model: Classifier, batches: list[list[int]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify = model.classify

    def full(sequences: Sequence[Sequence[int]]) -> Output:
        output = classify(sequences)
        if sum(map(len, sequences)) > 4:
            raise torch.OutOfMemoryError("full")
        return output

    monkeypatch.setattr(model, "classify", full)
    warm_up(model, 64, 4)
    assert [sum(lengths) for lengths in batches] == [1, 2, 4, 8]
    assert caplog.messages == ["no memory for a batch of 8 tokens: larger batches will be split"]


def test_buckets_end_with_the_largest_batch() -> None:
    assert list(token_buckets(1)) == [1]
    assert list(token_buckets(8)) == [1, 2, 4, 8]
    assert list(token_buckets(9)) == [1, 2, 4, 8, 9]


def test_lengths_are_even() -> None:
    assert [len(sequence) for sequence in batch_of(10, 4, 48)] == [3, 3, 2, 2]
    assert [len(sequence) for sequence in batch_of(100, 1, 40)] == [34, 33, 33]


def test_no_range_of_tiles_lies_between_two_buckets() -> None:
    """Whatever the number of experts, doubling the tokens cannot step over a band."""
    for tables in TABLES.values():
        for bands in tables.values():
            edges = sorted({band.below for band in bands})
            assert all(upper >= 2 * lower for lower, upper in pairwise(edges))
