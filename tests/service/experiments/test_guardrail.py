"""What pauses an experiment: failures and latency that a bound valid at every look puts beyond what is allowed."""

from typing import Any

import numpy as np
import pytest

from service.experiments.guardrail import breach, failures
from tests.service.experiments.cases import FULL, PRUNED, records, tally


def errors(failed_1: int, n_1: int, failed_0: int, n_0: int) -> list[Any]:
    return [
        tally("requests", n_1, PRUNED),
        tally("errors", failed_1, PRUNED),
        tally("requests", n_0, FULL),
        tally("errors", failed_0, FULL),
    ]


@pytest.mark.parametrize(
    ("counts", "is_breached"),
    [
        ((0, 5000, 0, 5000), False),
        ((60, 5000, 0, 5000), False),  # 1.2 points, and 1 is allowed: not certain at every look
        ((200, 5000, 0, 5000), True),
        ((200, 5000, 200, 5000), False),  # both fail alike
        ((0, 5000, 2000, 5000), False),  # the control's failures are not the candidate's fault
        ((99, 99, 0, 5000), False),  # too few for the bound to hold
        ((100, 100, 0, 100), True),
    ],
)
def test_failures(counts: tuple[int, int, int, int], is_breached: bool) -> None:
    assert (breach(records("split", errors(*counts))) is not None) is is_breached


def test_the_reason_has_numbers() -> None:
    reason = breach(records("split", errors(500, 5000, 0, 5000)))
    assert reason is not None
    assert reason.startswith("mood-pruned fails 10.0 points more often than mood-full, at least ")
    assert reason.endswith(", and 1 are allowed")


def test_what_is_allowed_can_be_set() -> None:
    assert breach(records("split", errors(200, 5000, 0, 5000), guardrail={"error_rate": 0.04})) is None


def test_the_candidate_of_a_shadow_fails_in_its_lane() -> None:
    found = records(
        "shadow",
        [tally("requests", 900, FULL), tally("pairs", 600), tally("pairs", 400, predicted="candidate_failed")],
    )
    assert failures(found, PRUNED) == (400, 1000)
    assert failures(found, FULL) == (0, 900)
    assert breach(found) is not None


def test_a_cascade_has_no_arms_to_compare() -> None:
    assert breach(records("cascade", errors(500, 5000, 0, 5000))) is None


def samples(factor: float) -> list[float]:
    return list(np.random.default_rng(3).gamma(8, 1, 5000) * factor)


@pytest.mark.parametrize(
    ("mode", "factor", "allowed", "is_breached"),
    [
        ("split", 3.0, 1.5, True),
        ("split", 3.0, None, False),
        ("split", 1.6, 1.5, False),  # above, but not beyond doubt
        ("split", 0.5, 1.5, False),
        ("shadow", 3.0, 1.5, False),  # beside a shadow, latency is nobody's
    ],
)
def test_latency(mode: str, factor: float, allowed: float | None, is_breached: bool) -> None:
    found = records(mode, [], {FULL: samples(1), PRUNED: samples(factor)}, guardrail={"latency_ratio": allowed})
    assert (breach(found) is not None) is is_breached


def test_a_false_alarm_is_rare_however_often_one_looks() -> None:
    """The excess is exactly what is allowed, 3 % against 2 %: 200 runs with a look every 50 requests, nominal 2.5 %."""
    chance = np.random.default_rng(11)
    alarms = 0
    for _ in range(200):
        failed = chance.random((2, 3000)) < [[0.02], [0.03]]
        totals = failed.cumsum(axis=1)
        looks = range(100, 3001, 50)
        alarms += any(
            breach(records("split", errors(int(totals[1, n - 1]), n, int(totals[0, n - 1]), n))) for n in looks
        )
    assert alarms <= 10
