"""When the traffic rises, stays or stops."""

from dataclasses import replace
from typing import Any

import pytest

from service.deployments import Registry
from service.experiments import ramp
from service.sections import Ramp
from service.storage.events import Step
from tests.service.experiments.cases import (
    FULL,
    PRUNED,
    pair_tallies,
    records,
    registry,
    report_on,
    split_tallies,
    tally,
)

__all__ = ["registry"]

RAMP = Ramp(steps=[5, 25, 100], units=1000)


def step(action: str, detail: str) -> Step:
    return Step(1.0, "ramp", action, detail)


def report(registry: Registry, tallies: list[Any], *steps: Step, mode: str = "split", **fields: Any) -> Any:
    return report_on(registry, replace(records(mode, tallies, **fields), steps=steps))


def units(n: int) -> list[Any]:
    return [tally("units", n // 2, FULL), tally("units", n - n // 2, PRUNED)]


@pytest.mark.parametrize(("n", "move"), [(999, "hold"), (1000, "advance")])
def test_a_step_takes_its_units(registry: Registry, n: int, move: str) -> None:
    assert ramp.decide(report(registry, units(n), traffic=5), RAMP) == move


@pytest.mark.parametrize(("n", "move"), [(2039, "hold"), (2040, "advance")])
@pytest.mark.parametrize("action", ["traffic", "configured", "running"])
def test_units_are_counted_from_the_last_change_of_traffic(registry: Registry, n: int, move: str, action: str) -> None:
    steps = step("traffic", "5 % at 0 units"), step(action, "25 % at 1040 units"), step("method", "label_free")
    assert ramp.decide(report(registry, units(n), *steps, traffic=25), RAMP) == move


def test_a_resumed_experiment_waits_on(registry: Registry) -> None:
    steps = step("traffic", "25 % at 1040 units"), step("paused", ""), step("running", "")
    assert ramp.decide(report(registry, units(2040), *steps, traffic=25), RAMP) == "advance"


def test_the_last_step_is_the_last(registry: Registry) -> None:
    assert ramp.decide(report(registry, units(9999), traffic=100), RAMP) == "hold"


def test_traffic_between_steps_rises_to_the_next(registry: Registry) -> None:
    assert ramp.next_step(RAMP, 7.5) == 25
    assert ramp.decide(report(registry, units(1000), traffic=7.5), RAMP) == "advance"


@pytest.mark.parametrize("state", ["paused", "stopped"])
def test_an_experiment_at_rest_is_left_alone(registry: Registry, state: str) -> None:
    inferior = split_tallies(1000, 5000, 4000, 5000)
    assert ramp.decide(report(registry, inferior, traffic=5, state=state), RAMP) == "hold"


def test_an_inferior_candidate_is_rolled_back_at_any_step(registry: Registry) -> None:
    for traffic in (5, 100):
        found = report(registry, split_tallies(1000, 5000, 4000, 5000), traffic=traffic)
        assert found.verdict == "inferior"
        assert ramp.decide(found, RAMP) == "roll_back"


def test_nothing_rises_while_something_is_amiss(registry: Registry) -> None:
    slow, fast = [float(value) for value in range(1000, 2000)], [float(value) for value in range(1000)]
    amiss = {
        "invalid": report(registry, split_tallies(5400, 5500, 4900, 5000), traffic=5),
        "worse": report(registry, [*pair_tallies(1800, 40, 15, 145), *units(1000)], traffic=5, mode="shadow"),
        "slower": report_on(registry, records("split", units(1000), {FULL: fast, PRUNED: slow}, traffic=5)),
    }
    assert (amiss["invalid"].verdict, amiss["worse"].worse) == ("invalid", True)
    assert amiss["slower"].latency_ms.verdict == "slower"
    assert {ramp.decide(found, RAMP) for found in amiss.values()} == {"hold"}


def test_units_are_written_as_they_are_read() -> None:
    assert ramp.units_of(ramp.units_detail("25 %", 1040)) == 1040
    assert ramp.units_of("mood-full answers the task") is None
