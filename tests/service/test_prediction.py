"""Activations and labels against values a person can compute."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.prediction import ACTIVATIONS, MULTI_LABEL, Activation, predict, sigmoid, softmax

SINGLE = "single_label_classification"
finite = st.floats(-1e30, 1e30)


def test_softmax_of_the_published_logits() -> None:
    assert softmax([-1.2, 0.1, 2.9]) == pytest.approx([0.0154, 0.0564, 0.9282], abs=5e-5)
    assert softmax([2.0, -0.5, -1.0]) == pytest.approx([0.8835, 0.0725, 0.0440], abs=5e-5)


def test_softmax_does_not_overflow() -> None:
    assert softmax([-100.0, 5.0]) == pytest.approx([0.0, 1.0])
    assert softmax([1e30, -1e30]) == [1.0, 0.0]


def test_softmax_of_logarithms() -> None:
    assert softmax([math.log(1), math.log(2), math.log(5)]) == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_sigmoid_of_the_published_logits() -> None:
    got = [sigmoid(logit) for logit in (1.2, -0.3, 0.4, -2.0)]
    assert got == pytest.approx([0.7685, 0.4256, 0.5987, 0.1192], abs=5e-5)
    assert [sigmoid(1000.0), sigmoid(-1000.0)] == [1.0, 0.0]


def test_multi_label() -> None:
    prediction = predict([1.2, -0.3, 0.4, -2.0], MULTI_LABEL, "sigmoid", 0.5)
    assert prediction.labels == [0, 2]
    assert prediction.label == 0
    assert predict([-1.0, -2.0], MULTI_LABEL, "sigmoid", 0.5).labels == []
    assert predict([0.0], MULTI_LABEL, "none", 0.5).labels == [0]


def test_ties_go_to_the_lowest_id() -> None:
    assert predict([1.0, 3.0, 3.0, 1.0], SINGLE, "softmax", 0.5).order == [1, 2, 0, 3]


def test_saturated_scores_are_ranked_by_logit() -> None:
    prediction = predict([50.0, 60.0], SINGLE, "sigmoid", 0.5)
    assert prediction.values == [1.0, 1.0]
    assert prediction.order == [1, 0]


def test_one_class() -> None:
    prediction = predict([-2.0], "regression", "none", 0.5)
    assert (prediction.label, prediction.values, prediction.labels) == (0, [-2.0], [0])


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from(sorted(ACTIVATIONS)))
def test_activation_never_changes_the_label(logits: list[float], activation: Activation) -> None:
    prediction = predict(logits, SINGLE, activation, 0.5)
    assert logits[prediction.label] == max(logits)
    assert sorted(prediction.order) == list(range(len(logits)))
    assert all(map(math.isfinite, prediction.values))
    assert prediction.labels == [prediction.label]
