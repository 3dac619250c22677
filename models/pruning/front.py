"""What no other choice beats on both counts."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def front(items: Iterable[T], cost: Callable[[T], float], gain: Callable[[T], float]) -> tuple[T, ...]:
    """The items of which no other costs no more and gains no less, one of them strictly; by ascending cost.

    Of equal items the first stays alone, so that gains ascend strictly along the front.
    """
    best: list[T] = []
    for item in sorted(items, key=lambda item: (cost(item), -gain(item))):  # stable: the first of equals comes first
        if not best or gain(item) > gain(best[-1]):
            best.append(item)
    return tuple(best)
