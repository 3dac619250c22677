"""`secateur samplesize`."""

from collections.abc import Callable
from typing import Any

import pytest

from service.statistics.power import anytime_size, label_free_size, split_anytime_size


def test_the_sizes_are_those_of_the_formulas(run_cli: Callable[..., Any]) -> None:
    document = run_cli("samplesize", "--disagreement", 0.005, "--json").document
    assert [(row["experiment"], row["one_look"], row["anytime"]) for row in document["sizes"]] == [
        ("shadow", 2355, anytime_size(-0.01, 0.03)),
        ("shadow without labels", None, label_free_size(0.01, 0.005)),
        ("split, both arms", 28_256, 2 * (split_anytime_size(-0.01, 0.9, 0.9, 0.01) or 0)),
    ]
    assert document["expected"] == {"accuracy": 0.9, "difference": 0.0, "discordance": 0.03, "disagreement": 0.005}


@pytest.mark.parametrize("difference", [0.01, -0.009])
def test_an_expected_difference_is_planned_for_too(difference: float, run_cli: Callable[..., Any]) -> None:
    rows = run_cli("samplesize", "--difference", difference, "--json").document["sizes"]
    better = {row["experiment"]: row for row in rows if row["to_conclude"] == "which one is better"}
    assert better["shadow"]["anytime"] == anytime_size(0.0, 0.03, abs(difference))
    assert better["shadow"]["one_look"] < better["shadow"]["anytime"] < better["split, both arms"]["one_look"]
    if difference == 0.01:
        assert better["shadow"]["one_look"] == 2353


def test_a_person_sees_a_table(run_cli: Callable[..., Any]) -> None:
    ran = run_cli("samplesize")
    assert ran.code == 0
    for word in ("not worse by the margin", "looking all along", "2,355", "28,256", "80 %"):
        assert word in ran.out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--margin", 0), "--margin"),
        (("--margin", 0.5), "--margin"),
        (("--alpha", 0.6), "--alpha"),
        (("--power", 0.4), "--power"),
        (("--power", 1), "--power"),
        (("--accuracy", 1), "--accuracy"),
        (("--accuracy", 0.995, "--difference", 0.005), "--accuracy"),
        (("--difference", -0.01), "--difference"),
        (("--difference", 0.04), "--discordance"),
        (("--discordance", 0), "--discordance"),
        (("--discordance", 1.1), "--discordance"),
        (("--disagreement", 1.1), "--disagreement"),
        (("--disagreement", -0.1), "--disagreement"),
    ],
)
def test_expectations_that_make_no_sense(options: tuple[object, ...], named: str, run_cli: Callable[..., Any]) -> None:
    ran = run_cli("samplesize", *options, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert named in ran.err
