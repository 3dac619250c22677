"""Evaluation: hand values, and statsmodels and scikit-learn as oracles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from statsmodels.stats.proportion import proportion_confint

from models.checkpoint import load_checkpoint
from models.dataset import Row
from models.errors import DataError
from models.evaluate import Evaluation, agreement, bootstrap_mean, class_recalls, evaluate, macro_f1, predict, wilson


def outcome(predictions: list[int], truth: list[int], groups: list[str] | None = None) -> Evaluation:
    return Evaluation(
        checkpoint="c",
        rows=len(truth),
        accuracy=float(np.mean(np.equal(predictions, truth))),
        accuracy_interval=(0, 1),
        macro_f1=0,
        recalls=(),
        predictions=tuple(predictions),
        truth=tuple(truth),
        groups=tuple(groups or [""] * len(truth)),
        seconds=1,
        tokens=1,
        parameters=1,
        bytes=1,
        dropped_share=0,
    )


def test_wilson_of_nine_in_ten() -> None:
    assert wilson(9, 10) == pytest.approx((0.596, 0.982), abs=5e-4)


@pytest.mark.parametrize(("right", "rows"), [(0, 7), (7, 7), (83, 1170), (9000, 9054)])
def test_wilson_against_statsmodels(right: int, rows: int) -> None:
    assert wilson(right, rows) == pytest.approx(proportion_confint(right, rows, method="wilson"), abs=1e-12)


def test_macro_f1_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    truth, predictions = generator.integers(0, 6, 500), generator.integers(0, 7, 500)
    want = f1_score(truth, predictions, average="macro", zero_division=0)
    assert macro_f1(predictions.tolist(), truth.tolist()) == pytest.approx(want, abs=1e-12)


def test_recalls_leave_out_classes_without_rows() -> None:
    recalls = class_recalls([0, 1, 1, 0], [0, 1, 0, 0], ("a", "b", "c"))
    assert [(r.label, r.rows, r.recall) for r in recalls] == [("a", 3, 2 / 3), ("b", 1, 1.0)]


def test_agreement_counts_flips_by_hand() -> None:
    a = outcome([0, 1, 1, 0, 2], [0, 1, 0, 0, 1])
    b = outcome([0, 0, 0, 0, 2], [0, 1, 0, 0, 1])
    result = agreement(a, b)
    assert (result.only_a, result.only_b) == (1, 1)
    assert result.rate == pytest.approx(3 / 5)
    assert result.difference == 0.0


def test_agreement_needs_the_same_rows() -> None:
    with pytest.raises(ValueError, match="same rows"):
        agreement(outcome([0], [0]), outcome([0], [1]))


def test_bootstrap_of_single_rows_matches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 4000)
    lower, upper = bootstrap_mean(values, [""] * 4000, seed=0)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert (lower, upper) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_bootstrap_resamples_groups_whole() -> None:
    values = np.repeat(np.random.default_rng(2).normal(0, 1, 40), 25)
    alone = bootstrap_mean(values, [""] * 1000, seed=0)
    grouped = bootstrap_mean(values, [f"g{i // 25}" for i in range(1000)], seed=0)
    # 40 independent values, not 1000: the interval is five times as wide
    assert (grouped[1] - grouped[0]) / (alone[1] - alone[0]) == pytest.approx(5, rel=0.15)


def test_evaluation_equals_one_text_at_a_time(pristine: Path) -> None:
    checkpoint = load_checkpoint(pristine)
    rows = [Row(" ".join(f"w{(7 * i + j) % 50}" for j in range(1 + i % 9)), f"LABEL_{i % 3}") for i in range(60)]
    result = evaluate(checkpoint, rows, batch_tokens=40)
    alone = [int(predict(checkpoint, [row.text]).argmax()) for row in rows]
    assert list(result.predictions) == alone
    assert result.accuracy == pytest.approx(
        np.mean([f"LABEL_{p}" == row.label for p, row in zip(alone, rows, strict=True)])
    )
    assert result.bytes == sum(checkpoint.weight_bytes().values())
    assert evaluate(checkpoint, rows, batch_tokens=10_000).predictions == result.predictions


def test_unknown_labels_are_refused(pristine: Path) -> None:
    with pytest.raises(DataError, match="label 'other' is unknown"):
        evaluate(load_checkpoint(pristine), [Row("w1", "other")])


def test_progress_reaches_the_end(pristine: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = [replace(Row("w1 w2", "LABEL_0"), text=f"w{i}") for i in range(5)]
    evaluate(
        load_checkpoint(pristine), rows, batch_tokens=4, progress=lambda done, total, _: seen.append((done, total))
    )
    assert seen[-1] == (5, 5)
    assert len(seen) == 3
