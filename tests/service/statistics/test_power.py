"""Sizes of samples: hand values, statsmodels, and what the planner and the projection promise each other."""

import pytest
from statsmodels.stats.power import NormalIndPower

from service.statistics.comparison import Comparison, LabelFree, Paired, TwoArms
from service.statistics.power import (
    anytime_size,
    label_free_size,
    mcnemar_size,
    non_inferior_size,
    split_anytime_size,
    split_non_inferior_size,
    split_size,
    still_needed,
)
from service.statistics.verdict import DECIDED, verdict


def test_split_by_hand() -> None:
    assert split_size(0.90, 0.89) == 14_749
    assert split_non_inferior_size(0.9, 0.9, 0.01) == 14_128


@pytest.mark.parametrize(("control", "candidate", "power"), [(0.9, 0.89, 0.8), (0.7, 0.75, 0.9)])
def test_split_against_statsmodels(control: float, candidate: float, power: float) -> None:
    """Their normal test takes an effect in standard deviations of one arm; ours averages the arms' variances."""
    deviation = ((control * (1 - control) + candidate * (1 - candidate)) / 2) ** 0.5
    expected = NormalIndPower().solve_power((control - candidate) / deviation, power=power, alpha=0.05)
    assert split_size(control, candidate, power) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(("discordance", "pairs"), [(0.02, 1568), (0.03, 2353), (0.05, 3923), (0.10, 7847)])
def test_mcnemar_by_hand(discordance: float, pairs: int) -> None:
    assert mcnemar_size(0.01, discordance) == mcnemar_size(-0.01, discordance) == pairs


@pytest.mark.parametrize(("discordance", "pairs"), [(0.01, 785), (0.03, 2355), (0.05, 3925), (0.10, 7849)])
def test_non_inferior_by_hand(discordance: float, pairs: int) -> None:
    assert non_inferior_size(0.01, discordance) == pairs


def test_an_expected_difference_moves_the_size() -> None:
    # 7.84888 (0.03 - 0.000025) / 0.015^2 and 7.84888 (0.03 - 0.000016) / 0.006^2.
    assert non_inferior_size(0.01, 0.03, difference=0.005) == 1046
    assert non_inferior_size(0.01, 0.03, difference=-0.004) == 6538
    # 7.84888 (0.09 + 0.085975) / 0.015^2.
    assert split_non_inferior_size(0.9, 0.905, 0.01) == 6139


def test_pairs_need_about_a_sixth_of_a_split() -> None:
    assert 2 * split_non_inferior_size(0.9, 0.9, 0.01) / non_inferior_size(0.01, 0.05) == pytest.approx(7.2, abs=0.1)
    assert 2 * split_non_inferior_size(0.9, 0.9, 0.01) / non_inferior_size(0.01, 0.06) == pytest.approx(6, abs=0.01)


# Simulated: pairs by which half and 80 % of 1000 runs had said non_inferior. margin, discordance, difference.
SIMULATED = {
    (0.01, 0.002, 0.0): (610, 860),
    (0.01, 0.01, 0.0): (1327, 1943),
    (0.01, 0.03, 0.0): (2826, 4595),
    (0.01, 0.05, 0.0): (4275, 7174),
    (0.01, 0.10, 0.0): (8840, 14_181),
    (0.05, 0.20, 0.0): (720, 1186),
    (0.01, 0.03, 0.005): (1310, 2118),
    (0.01, 0.03, -0.004): (7760, 12_710),
}


@pytest.mark.parametrize("expected", SIMULATED)
def test_looking_all_along_is_planned_within_a_tenth(expected: tuple[float, float, float]) -> None:
    margin, discordance, difference = expected
    median, most = SIMULATED[expected]
    assert anytime_size(-margin, discordance, difference, power=0.5) == pytest.approx(median, rel=0.12)
    assert anytime_size(-margin, discordance, difference) == pytest.approx(most, rel=0.1)


def test_what_no_sample_shows_has_no_size() -> None:
    assert anytime_size(0.0, 0.03) is None
    assert label_free_size(0.01, 0.01) is None
    assert split_anytime_size(0.0, 0.9, 0.9, 0.01) is None


def test_without_disagreement_the_least_sample_is_enough() -> None:
    assert label_free_size(0.01, 0.0) == 610
    assert label_free_size(0.02, 0.0) == 303


def test_more_power_and_more_noise_cost_more() -> None:
    sizes = [anytime_size(-0.01, 0.03, power=power) or 0 for power in (0.5, 0.8, 0.9, 0.99)]
    assert sizes == sorted(sizes)
    sizes = [label_free_size(0.01, disagreement) or 0 for disagreement in (0.0, 0.002, 0.004, 0.006)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "seen",
    [
        Paired(15, 15, 1000),
        Paired(60, 54, 4000),
        Paired(40, 15, 2000),
        Paired(0, 0, 50),
        LabelFree(3, 700),
        TwoArms(90, 100, 90, 100),
        TwoArms(450, 500, 900, 1000),
        TwoArms(420, 500, 900, 1000),
    ],
)
def test_the_projection_is_the_first_size_that_decides(seen: Comparison) -> None:
    needed = still_needed(seen, 0.01)
    assert needed is not None
    assert verdict(seen.projected(needed), 0.01)[0] in DECIDED
    assert verdict(seen.projected(needed - 1), 0.01)[0] not in DECIDED


def test_the_projection_keeps_rates_and_shares() -> None:
    assert Paired(15, 10, 1000).projected(2000) == Paired(30, 20, 2000)
    assert LabelFree(15, 1000).projected(500) == LabelFree(7.5, 500)
    assert LabelFree(15, 1000, 4, 6).projected(500) == LabelFree(7.5, 500, 2, 3)
    assert TwoArms(90, 100, 270, 300).projected(800) == TwoArms(180, 200, 540, 600)


def test_what_is_decided_needs_no_more() -> None:
    needed = still_needed(Paired(75, 75, 5000), 0.01)
    assert needed is not None
    assert needed <= 5000


@pytest.mark.parametrize("seen", [Paired(20, 10, 1000), LabelFree(20, 2000), TwoArms(0, 0, 0, 0)])
def test_rates_that_lead_nowhere(seen: Comparison) -> None:
    assert still_needed(seen, 0.01) is None


def test_nothing_yet_needs_at_least_what_a_perfect_start_would() -> None:
    assert still_needed(Paired(0, 0, 0), 0.01) == still_needed(LabelFree(0, 0), 0.01) == 610
