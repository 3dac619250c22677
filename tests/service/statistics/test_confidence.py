"""Confidence of a cascade's candidate, against hand values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.prediction import softmax
from service.sections import Confidence
from service.statistics.confidence import confidence, dispersion, negentropy, variance

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
FITTED = Confidence(kind="dispersion", weights={"variance": 2.0, "negentropy": 1.0}, bias=-1.0)
rows = st.lists(st.floats(-60, 60), min_size=2, max_size=30).map(softmax)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.7, 0.2, 0.1), (0.31, 0.27015)),
        ((0.9, 0.05, 0.05), (0.7225, 0.64100)),
        ((1 / 3, 1 / 3, 1 / 3), (0, 0)),
        ((0.0, 1.0, 0.0), (1, 1)),
        ((1.0,), (1, 1)),
    ],
)
def test_dispersion_by_hand(values: tuple[float, ...], expected: tuple[float, float]) -> None:
    """The features of Mowst (arXiv 2311.05185), as its published code divides them by their largest value."""
    assert (variance(values), negentropy(values)) == pytest.approx(expected, abs=5e-6)


def test_the_largest_probability_and_of_many_labels_the_least_decided() -> None:
    assert confidence((0.7, 0.2, 0.1), SINGLE, Confidence()) == 0.7
    assert confidence((0.99, 0.4, 0.02), MULTI, Confidence()) == 0.6
    assert confidence((0.01, 0.02, 0.03), MULTI, Confidence()) == 0.97


def test_a_fitted_confidence_is_the_sigmoid_of_the_weighed_features() -> None:
    by_hand = 1 / (1 + math.exp(1 - 2 * 0.31 - 0.270153301))
    assert confidence((0.7, 0.2, 0.1), SINGLE, FITTED) == pytest.approx(by_hand)
    least = dispersion([(0.6, 0.4)])
    of_two = 1 / (1 + math.exp(1 - 2 * least["variance"] - least["negentropy"]))
    assert confidence((0.99, 0.4), MULTI, FITTED) == pytest.approx(of_two)
    assert least["variance"] == pytest.approx(0.04)


def test_a_regression_has_none() -> None:
    with pytest.raises(ValueError, match="regression"):
        confidence((3.5,), "regression", Confidence())


@given(rows)
def test_features_stay_in_their_range_and_know_no_order(values: list[float]) -> None:
    for feature in (variance, negentropy):
        assert 0 <= feature(values) <= 1
        assert feature(values[::-1]) == pytest.approx(feature(values), abs=1e-12)


@given(st.floats(0.5, 1), st.floats(0.5, 1))
def test_of_two_classes_every_kind_ranks_alike(first: float, second: float) -> None:
    if abs(first - second) < 1e-6:
        return
    low, high = sorted((first, second))
    for settings in (Confidence(), FITTED):
        of_low, of_high = (confidence((value, 1 - value), SINGLE, settings) for value in (low, high))
        assert of_low < of_high
