"""When an experiment gets more traffic, and when it gets none: a pure function of its report."""

import re
from typing import Literal

from service.experiments.document import Report
from service.sections import Ramp

Move = Literal["advance", "roll_back", "hold"]
# Actions after which units are counted anew for the next step.
TRAFFIC_ACTIONS = frozenset({"configured", "traffic", "running"})
_UNITS = re.compile(r" at (\d+) units$")


def decide(report: Report, ramp: Ramp) -> Move:
    """Roll back if the candidate is inferior; advance once enough distinct units met this step and nothing is amiss.

    Amiss is a verdict of `invalid`, a candidate that is `worse` within the margin, or one that answers slower.
    """
    if report.state != "running":
        return "hold"
    if report.verdict == "inferior":
        return "roll_back"
    is_amiss = report.verdict == "invalid" or report.worse or report.latency_ms.verdict == "slower"
    if is_amiss or next_step(ramp, report.traffic) is None:
        return "hold"
    return "advance" if enrolled(report) - _units_at_last_step(report) >= ramp.units else "hold"


def next_step(ramp: Ramp, traffic: float) -> float | None:
    """The first step above `traffic` percent, None above the last."""
    return next((step for step in ramp.steps if step > traffic), None)


def enrolled(report: Report) -> int:
    """Distinct units that met the experiment, whatever the arm."""
    return sum(arm.units for arm in report.arms)


def units_detail(what: str, units: int) -> str:
    """A step's detail that says how many units there were, as `units_of` reads it."""
    return f"{what} at {units} units"


def units_of(detail: str) -> int | None:
    """The units that a detail names, None if it names none."""
    found = _UNITS.search(detail)
    return int(found[1]) if found else None


def _units_at_last_step(report: Report) -> int:
    for step in reversed(report.steps):
        units = units_of(step.detail) if step.action in TRAFFIC_ACTIONS else None
        if units is not None:
            return units
    return 0
