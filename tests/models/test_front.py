"""The front of cost and gain, by hand."""

from models.pruning.front import front

Point = tuple[str, int, float]


def names(*points: Point) -> str:
    return "".join(point[0] for point in front(points, lambda p: p[1], lambda p: p[2]))


def test_what_costs_more_must_gain_more() -> None:
    assert names(("a", 3, 0.9), ("b", 1, 0.5), ("c", 2, 0.4), ("d", 2, 0.7), ("e", 4, 0.9)) == "bda"


def test_of_equals_the_first_stays() -> None:
    assert names(("a", 1, 0.5), ("b", 1, 0.5), ("c", 1, 0.6)) == "c"
    assert names(("a", 1, 0.5), ("b", 1, 0.5)) == "a"


def test_one_point_is_a_front_and_none_is_none() -> None:
    assert names(("a", 1, 0.5)) == "a"
    assert names() == ""
