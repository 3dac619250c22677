"""Bounds of a paired difference: hand values, a brute-force likelihood, and how often a wrong child passes."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import t

from models.pruning.confirm import (
    ERROR,
    _score,
    change,
    descend,
    difference,
    groups_bound,
    is_not_worse,
    numbered,
    rows_bound,
    rows_p_value,
    rows_to_confirm,
)

# Three standard errors of a share of 5 % in so many trials, and the error allowed.
TRIALS = 1000
MOST = ERROR + 3 * (0.05 * 0.95 / TRIALS) ** 0.5


def test_no_row_changed_bounds_the_difference_as_by_hand() -> None:
    # (1 - x)^292 = .05 - .001 at x = .01028; one thing more to know than the rule of three, 3 / 292 = .01027.
    assert rows_bound(292, 0, 0) == pytest.approx(-(1 - 0.049 ** (1 / 292)), abs=2e-6)
    assert rows_to_confirm(0.01) == 301
    assert rows_bound(300, 0, 0) < -0.01 < rows_bound(301, 0, 0)


def test_the_score_is_the_distance_at_the_likeliest_shares() -> None:
    rows, gained, lost, limit = 80, 3, 9, -0.05

    def unlikely(share_lost: float) -> float:
        share_gained = share_lost + limit
        rest = 1 - share_lost - share_gained
        return -float(gained * np.log(share_gained) + lost * np.log(share_lost) + (rows - 12) * np.log(rest))

    share = float(minimize_scalar(unlikely, bounds=(0.0501, 0.5), method="bounded", options={"xatol": 1e-10}).x)
    variance = rows * (2 * share + limit - limit**2)
    want = (gained - lost - rows * limit) / variance**0.5
    assert float(_score(rows, np.array(gained), np.array(lost), limit)) == pytest.approx(want, abs=1e-6)


def test_the_p_value_is_that_of_the_binomial_where_all_is_known() -> None:
    # Nobody gains and all rows are alike: a result of 0 of 4 lost, where a third should be, has (2/3)^4.
    assert rows_p_value(4, 0, 0, -1 / 3) == pytest.approx((2 / 3) ** 4 + 0.001, abs=5e-3)


def test_more_losses_are_never_better() -> None:
    bounds = [rows_bound(200, 3, lost) for lost in range(12)]
    assert bounds == sorted(bounds, reverse=True)
    gains = [rows_bound(200, gained, 3) for gained in range(12)]
    assert gains == sorted(gains)


def test_groups_bound_by_hand() -> None:
    # Groups change by -2 of 2, 0 of 2, 0 of 2: mean -1/3, residuals -4/3, 2/3, 2/3, error sqrt(3/2 * 24/9) / 6 = 1/3.
    change = np.array([-1.0, -1, 0, 0, 0, 0])
    assert groups_bound(change, [0, 0, 1, 1, 2, 2]) == pytest.approx(-1 / 3 - t.ppf(0.95, 2) / 3)
    assert groups_bound(change, [0] * 6) == -1.0


def test_rows_without_a_group_stand_alone() -> None:
    assert len(set(numbered(["", "a", "", "a"]).tolist())) == 3


def test_the_lower_of_both_bounds_counts() -> None:
    parent, child = np.ones(400, dtype=bool), np.ones(400, dtype=bool)
    child[:20] = False
    apart = difference(parent, child, np.arange(400))
    together = difference(parent, child, np.arange(400) // 20)
    assert apart.value == together.value == -0.05
    assert (apart.gained, apart.lost) == (0, 20)
    assert together.lower < apart.lower < -0.05
    assert is_not_worse(parent, child, np.arange(400), 0.08)
    assert not is_not_worse(parent, child, np.arange(400) // 20, 0.08)


def test_a_change_and_its_error_by_hand() -> None:
    # Of 99 rows, 2 are gained and 1 lost: (3 + 1) / 100 - (1 / 99)^2 is the variance, as if a fourth had changed.
    parent = np.arange(99) > 1
    child = np.arange(99) < 98
    assert change(parent, child) == pytest.approx((1 / 99, ((0.04 - 1 / 99**2) / 99) ** 0.5))
    assert change(parent, parent) == pytest.approx((0.0, 0.01 / 0.99**0.5))


# The truth is exactly on the boundary: every pass is false. (lost, gained), rows, tolerance, rows per group.
BOUNDARY = [
    (0.0105, 0.0, 290, 0.0105, 1),  # hardly a row changes, where a bootstrap sees nothing
    (0.03, 0.02, 400, 0.01, 1),
    (0.11, 0.10, 1200, 0.01, 1),
    (0.06, 0.04, 600, 0.02, 20),
]


def drawn(
    generator: np.random.Generator, lost: float, gained: float, rows: int, each: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Right or wrong by parent and child; some rows do as the first of their group."""
    fate = generator.choice(3, size=rows, p=(lost, gained, 1 - lost - gained))
    first = fate.reshape(-1, each)[:, :1].repeat(each, axis=1).ravel()
    follows = (generator.random(rows) < 0.25) & (each > 1)
    fate = np.where(follows, first, fate)
    return fate != 1, fate != 0


@pytest.mark.parametrize(("lost", "gained", "rows", "tolerance", "each"), BOUNDARY)
def test_a_child_on_the_boundary_passes_in_one_of_twenty_at_most(
    lost: float, gained: float, rows: int, tolerance: float, each: int
) -> None:
    generator = np.random.default_rng(5)
    group_N = np.arange(rows) // each
    passes = sum(is_not_worse(*drawn(generator, lost, gained, rows, each), group_N, tolerance) for _ in range(TRIALS))
    assert passes / TRIALS <= MOST


def test_of_many_children_on_the_boundary_one_in_twenty_is_chosen_at_most() -> None:
    """The whole rule, a ladder of ten with independent luck; going on until one passes would err in four of ten."""
    generator = np.random.default_rng(6)
    chosen = 0
    for _ in range(TRIALS):
        ladder = [drawn(generator, 0.03, 0.02, 400, 1) for _ in range(10)]
        passed, _ = descend(ladder, lambda runs: is_not_worse(*runs, np.arange(400), 0.01))
        chosen += bool(passed)
    assert chosen / TRIALS <= MOST


def test_a_good_child_is_found_behind_a_bad_one_only_in_the_right_order() -> None:
    assert descend("aabXc", str.islower) == (("a", "a", "b"), "X")
    assert descend("Xab", str.islower) == ((), "X")
    assert descend("", str.islower) == ((), None)


def test_a_child_that_is_like_its_parent_mostly_passes() -> None:
    generator = np.random.default_rng(7)
    runs = [drawn(generator, 0.01, 0.01, 1000, 1) for _ in range(200)]
    assert sum(is_not_worse(*run, np.arange(1000), 0.015) for run in runs) > 150
