"""Successive halving on candidates whose rows are known: who stays, who goes, and why."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from models.pruning.race import Run, distance, doubling, race

Bits = npt.NDArray[np.bool_]


def sure(right_N: Bits, size: int = 1000) -> Run:
    """The true label has a probability of nine tenths where it wins, and of one tenth where it loses."""
    return Run(right_N, -np.log(np.where(right_N, 0.9, 0.1)).astype(np.float32), size)


def all_right(rows: int) -> Run:
    return sure(np.ones(rows, dtype=bool))


class Scripted:
    """Candidates with a chance of being right on each row the parent has right; counts what is run."""

    def __init__(self, chance: dict[str, float], size: Callable[[str], int], rows: int = 800, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.parent_N = generator.random(rows) < 0.9
        self.right = {name: self.parent_N & (generator.random(rows) < p) for name, p in chance.items()}
        self.size, self.asked = size, dict.fromkeys(chance, 0)

    def measure(self, name: str, rows: int) -> Run:
        self.asked[name] = max(self.asked[name], rows)
        return sure(self.right[name][:rows], self.size(name))

    def parent(self, rows: int) -> Run:
        return sure(self.parent_N[:rows])


def test_rounds_double_to_the_last() -> None:
    assert doubling(24, 195) == (24, 48, 97, 195)
    assert doubling(24, 30) == (30,)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_sixteen_stays_for_a_fraction_of_the_rows(seed: int) -> None:
    chance = {f"c{i}": 0.80 for i in range(15)} | {"best": 0.99}
    bench = Scripted(chance, lambda name: 1000, seed=seed)
    result = race(bench.right, bench.measure, bench.parent, doubling(100, 800), tolerance=0.5)
    assert "best" in result.survivors
    assert sum(bench.asked.values()) < 16 * 800 / 2
    assert set(result.survivors) | set(result.dropped) == set(chance)


def by_counts(right: dict[str, int], size: Callable[[str], int]) -> set[str]:
    """Who is left of candidates that have so many of the first hundred rows right, after one halving."""

    def measure(name: str, rows: int) -> Run:
        return sure(np.arange(rows) < right[name], size(name))

    result = race(right, measure, all_right, (100, 101), tolerance=0.5)
    return set(result.survivors)


def test_the_half_that_is_nearer_goes_on() -> None:
    assert by_counts({"a": 90, "b": 92, "c": 91, "d": 93, "e": 89, "f": 94}, lambda name: 1000) == set("dfb")


def test_two_of_a_size_go_on_at_least() -> None:
    assert by_counts({"a": 90, "b": 92, "c": 91}, lambda name: 1000) == {"b", "c"}


def test_each_size_keeps_its_own_best() -> None:
    right = {f"{size}{i}": 90 + i + 4 * (size == "l") for size in "sl" for i in range(4)}
    left = by_counts(right, lambda name: 1000 if name[0] == "s" else 2000)
    assert left == {"s2", "s3", "l2", "l3"}


def test_what_loses_more_than_the_tolerance_goes_early() -> None:
    bench = Scripted({"poor": 0.5, "good": 1.0}, lambda name: 10 if name == "poor" else 1000)
    result = race(("poor", "good"), bench.measure, bench.parent, (100, 800), tolerance=0.02)
    assert result.survivors == ("good",)
    rows, why = result.dropped["poor"]
    assert rows == 100
    assert "clearly more than the tolerance" in why
    assert bench.asked["poor"] == 100


def test_a_larger_one_that_is_clearly_worse_goes() -> None:
    bench = Scripted({"small": 1.0, "large": 0.8}, lambda name: 10 if name == "small" else 1000)
    result = race(("small", "large"), bench.measure, bench.parent, (400,), tolerance=0.9)
    assert result.survivors == ("small",)
    assert "clearly worse than small" in result.dropped["large"][1]


def test_a_smaller_one_is_not_beaten_by_a_larger() -> None:
    bench = Scripted({"small": 0.8, "large": 1.0}, lambda name: 10 if name == "small" else 1000)
    assert set(race(("small", "large"), bench.measure, bench.parent, (400,), tolerance=0.9).survivors) == {
        "small",
        "large",
    }


def test_those_that_are_watched_stay_whatever_they_do() -> None:
    bench = Scripted({"watched": 0.1, **{f"c{i}": 0.99 for i in range(6)}}, lambda name: 1000)
    result = race(bench.right, bench.measure, bench.parent, (100, 800), tolerance=0.01, stay=("watched",))
    assert "watched" in result.survivors
    assert bench.asked["watched"] == 800


def test_distance_by_hand() -> None:
    right_N = np.ones(2, dtype=bool)
    parent, child = (Run(right_N, -np.log(np.array(p, dtype=np.float32)), 1) for p in ((0.8, 0.5), (0.6, 0.9)))
    assert distance(parent, child) == distance(child, parent) == pytest.approx(0.3)
    assert distance(parent, parent) == 0


def test_where_right_rows_tie_the_nearer_go_on() -> None:
    def measure(name: str, rows: int) -> Run:
        return Run(np.ones(rows, dtype=bool), np.full(rows, ord(name[0]) / 100, dtype=np.float32), 1000)

    result = race("hgfedcba", measure, all_right, (50, 100), tolerance=0.01)
    assert set(result.survivors) == set("abcd")


def test_a_lucky_gain_is_no_merit() -> None:
    """Of many children, the one that has most rows right that the parent has not, was lucky."""
    parent_N = np.arange(100) < 90

    def measure(name: str, rows: int) -> Run:
        right_N = parent_N[:rows].copy()
        right_N[90 : 90 + ["like", "lucky", "luckier", "luckiest"].index(name)] = True
        return sure(right_N)

    names = ("luckiest", "luckier", "lucky", "like")
    result = race(names, measure, lambda rows: sure(parent_N[:rows]), (95, 100), tolerance=0.5)
    assert set(result.survivors) == {"like", "lucky"}


def test_progress_counts_those_that_are_left() -> None:
    bench = Scripted({f"c{i}": 0.9 for i in range(8)}, lambda name: 1000)
    told: list[tuple[int, int, str]] = []
    race(bench.right, bench.measure, bench.parent, (100, 800), 0.9, progress=lambda *said: told.append(said))
    assert [total for _, total, _ in told] == [8] * 8 + [4] * 4
    assert [done for done, _, _ in told] == [*range(1, 9), *range(1, 5)]
    assert told[0][2] == "round 1 of 2, 100 rows: c0"
