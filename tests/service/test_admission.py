"""Slots are taken all or none and given back once."""

import pytest

from service.admission import Slots


def test_all_or_none() -> None:
    slots = Slots(limit_items=4, limit_chars=100)
    assert slots.reserve(3, 30)
    assert not slots.reserve(2, 2)
    assert not slots.reserve(1, 71)
    assert slots.reserve(1, 70)
    assert (slots.items, slots.chars) == (4, 100)
    slots.release(4, 100)
    assert slots.reserve(4, 100)


def test_released_twice() -> None:
    slots = Slots(limit_items=4, limit_chars=100)
    slots.reserve(1, 10)
    slots.release(1, 10)
    with pytest.raises(RuntimeError, match="released twice"):
        slots.release(1, 10)
