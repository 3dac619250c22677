"""From one item's logits to its label and scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Activation = Literal["softmax", "sigmoid", "none"]
DEFAULT_ACTIVATION: dict[str, Activation] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
MULTI_LABEL = "multi_label_classification"
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Prediction:
    """values: activated logits by class id. order: class ids, greatest logit first. labels: the class ids predicted."""

    values: list[float]
    order: list[int]
    labels: list[int]

    @property
    def label(self) -> int:
        """The class with the greatest logit, the lowest id among equals."""
        return self.order[0]


def predict(logits: Sequence[float], problem_type: str, activation: Activation, threshold: float) -> Prediction:
    """Activate and rank finite logits. The label never depends on the activation: saturated values could tie."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    labels = order[:1]
    if problem_type == MULTI_LABEL:
        labels = [i for i, logit in enumerate(logits) if sigmoid(logit) >= threshold]
    return Prediction(ACTIVATIONS[activation](logits), order, labels)


def softmax(logits: Sequence[float]) -> list[float]:
    """Softmax in double precision with the maximum subtracted, so that no exponential overflows."""
    top = max(logits)
    exps = [math.exp(logit - top) for logit in logits]
    total = math.fsum(exps)
    return [value / total for value in exps]


def sigmoid(logit: float) -> float:
    """Logistic function; the exponential only ever sees a negative argument."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    value = math.exp(logit)
    return value / (1 + value)


ACTIVATIONS: dict[Activation, Callable[[Sequence[float]], list[float]]] = {
    "softmax": softmax,
    "sigmoid": lambda logits: [sigmoid(logit) for logit in logits],
    "none": list,
}
