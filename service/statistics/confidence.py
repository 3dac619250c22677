"""How sure a cascade's candidate is of an item: from its activated probabilities alone, before anything else runs."""

import math
from collections.abc import Callable, Mapping, Sequence

from service.prediction import DEFAULT_ACTIVATION, MULTI_LABEL, sigmoid
from service.sections import Confidence


def confidence(values: Sequence[float], problem_type: str, settings: Confidence) -> float:
    """From 0 to 1; the candidate's answer stands where this reaches the threshold.

    values: the item's softmax row; of a multi-label model its sigmoids, each a question of its own, of which the least
    decided speaks for the item. Raises ValueError for regression: a number has no probability.
    """
    if DEFAULT_ACTIVATION[problem_type] == "none":
        raise ValueError("a regression has no confidence")
    questions = [(value, 1 - value) for value in values] if problem_type == MULTI_LABEL else [values]
    if settings.kind == "probability":
        return min(map(max, questions))
    features = dispersion(questions)
    return sigmoid(settings.bias + math.fsum(weight * features[name] for name, weight in settings.weights.items()))


def dispersion(questions: Sequence[Sequence[float]]) -> dict[str, float]:
    """Every dispersion feature of an item, the smallest of its questions: 0 is uniform, 1 is certain."""
    return {name: min(map(feature, questions)) for name, feature in DISPERSION.items()}


def variance(values: Sequence[float]) -> float:
    """Variance of the probabilities over its largest value, (C-1)/C^2 (arXiv 2311.05185). (.7, .2, .1) gives .31."""
    classes = len(values)
    if classes == 1:
        return 1.0
    return _unit(math.fsum((value - 1 / classes) ** 2 for value in values) * classes / (classes - 1))


def negentropy(values: Sequence[float]) -> float:
    """One less the entropy over its largest value, ln C (arXiv 2311.05185). (.7, .2, .1) gives .27015."""
    classes = len(values)
    if classes == 1:
        return 1.0
    return _unit(1 + math.fsum(value * math.log(value) for value in values if value > 0) / math.log(classes))


def _unit(value: float) -> float:
    """Sums of rounded numbers leave [0, 1] by an ulp."""
    return min(max(value, 0.0), 1.0)


DISPERSION: Mapping[str, Callable[[Sequence[float]], float]] = {"variance": variance, "negentropy": negentropy}
