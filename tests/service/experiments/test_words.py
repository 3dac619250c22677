"""What a report says in words: every verdict, with bounds rounded away from the claim."""

import pytest

from service.deployments import Registry
from service.experiments.words import roughly
from service.storage.events import Tally
from tests.service.experiments.cases import pair_tallies, records, registry, report_on, split_tallies

__all__ = ["registry"]

SAID = {
    "superior": (
        pair_tallies(4300, 20, 180, 500),
        "mood-pruned is more accurate than mood-full, by at least 2.33 points (+3.20 estimated).",
    ),
    "inferior": (
        pair_tallies(4300, 280, 20, 400),
        "mood-pruned is less accurate than mood-full by at least 4.14 points; 1 point is allowed.",
    ),
    "insufficient_data": (
        pair_tallies(40, 0, 0, 2),
        "Too early to say: there are 42 items that both answered, and 100 are needed at least.",
    ),
}


@pytest.mark.parametrize(("tallies", "said"), SAID.values(), ids=SAID)
def test_a_verdict_in_words(registry: Registry, tallies: list[Tally], said: str) -> None:
    report = report_on(registry, records("shadow", tallies))
    assert report.words == said


def test_bounds_are_never_rounded_in_favour(registry: Registry) -> None:
    for b, c in ((280, 20), (20, 180)):
        report = report_on(registry, records("shadow", pair_tallies(4300, b, c, 500)))
        bound = min(abs(report.difference.lower), abs(report.difference.upper))
        said = float(report.words.partition("at least ")[2].split()[0])
        assert 100 * bound - 0.01 < said <= 100 * bound


def test_what_an_undecided_comparison_needs(registry: Registry) -> None:
    report = report_on(registry, records("split", split_tallies(900, 1000, 900, 1000)))
    assert report.verdict == "undecided"
    assert report.words.startswith("It is not known yet whether mood-pruned is less accurate than mood-full by more")
    assert report.needed is not None
    assert report.needed.units is not None
    more = roughly(report.needed.units - 2000)
    assert report.needed.words == f"If the rates stay, about {more:,} more units will decide it."


def test_what_no_number_of_units_would_decide(registry: Registry) -> None:
    # One point lost in every hundred: exactly the margin.
    report = report_on(registry, records("shadow", pair_tallies(97_000, 1000, 0, 2000)))
    assert report.verdict == "undecided"
    assert report.needed is not None
    assert (report.needed.units, report.needed.more) == (None, None)
    assert report.needed.words == "At the rates seen so far, no number of units would decide it."


def test_too_few_in_one_arm(registry: Registry) -> None:
    report = report_on(registry, records("split", split_tallies(40, 50, 45, 55), margin=0.1))
    assert (
        report.words == "Too early to say: there are 50 labelled units in the smaller arm, and 100 are needed at least."
    )


@pytest.mark.parametrize(
    ("units", "rough"), [(0, 0), (7, 7), (99, 99), (100, 100), (101, 110), (29_500, 30_000), (4_535_810, 4_600_000)]
)
def test_a_forecast_has_two_digits_and_never_promises_too_much(units: int, rough: int) -> None:
    assert roughly(units) == rough
