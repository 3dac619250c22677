"""Records by hand: the tallies that the store would have kept, and what else a report is made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.deployments import Registry, State
from service.experiments.records import Counts, Records
from service.experiments.report import assemble
from service.sections import ExperimentSettings
from service.storage.events import StoredState, Tally
from tests.service.experiments.live import shadow, split
from tests.service.toys import toy_loader, toy_settings

FULL, PRUNED = "mood-full", "mood-pruned"
NO_DROPS = {"busy": 0, "draining": 0}


def tally(name: str, n: int, arm: str = "", truth: str = "", predicted: str = "", **values: float) -> Tally:
    return Tally(name, arm, truth, predicted, n, **values)


def pair_tallies(both_right: int, b: int, c: int, both_wrong: int, *, disagree: int = 0) -> list[Tally]:
    """Labelled pairs, each of its own unit: b only the control got right, c only the candidate."""
    counted = {"both_right": both_right, "only_control": b, "only_candidate": c, "both_wrong": both_wrong}
    n = both_right + b + c + both_wrong
    return [
        *(tally("labelled_pairs", counted[word], predicted=word) for word in counted),
        tally("unit_pairs", n - disagree, predicted="agree"),
        tally("unit_pairs", disagree, predicted="disagree"),
        tally("pairs", n - disagree, predicted="agree"),
        tally("pairs", disagree, predicted="disagree"),
        tally("requests", n, FULL),
        tally("items", n, FULL),
    ]


def split_tallies(right_1: int, n_1: int, right_0: int, n_0: int) -> list[Tally]:
    """Labelled units of a split: index 1 is the candidate."""
    found = []
    for arm, right, n in ((PRUNED, right_1, n_1), (FULL, right_0, n_0)):
        found += [tally(name, n, arm) for name in ("requests", "items", "units", "labelled")]
        found.append(tally("right", right, arm))
    return found


def records(
    mode: str,
    tallies: list[Tally],
    latencies: Mapping[str, list[float]] | None = None,
    stored: StoredState | None = None,
    **fields: Any,
) -> Records:
    """Records of an experiment on the toy task in a mode, with some keys of its configuration."""
    if mode == "cascade":
        fields = {"mode": mode, "threshold": 0.8, **fields}
    made = split(**fields) if mode == "split" else shadow(**fields)
    experiment = ExperimentSettings.model_validate(made["exp"])
    samples = {FULL: [], PRUNED: [], **(latencies or {})}
    return Records(
        "exp",
        experiment,
        stored or StoredState("exp", 1, "", experiment.state, experiment.traffic),
        FULL,
        PRUNED,
        Counts(tallies),
        {arm: np.sort(np.array(samples[arm], np.float64)) for arm in (FULL, PRUNED)},
        looks=[],
        steps=[],
        disagreements=[],
    )


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """The toy deployments, loaded."""
    registry = Registry(toy_settings(tmp_path))
    load = toy_loader()
    for deployment in registry.deployments.values():
        deployment.loaded = load(deployment.path, "cpu", "float32", "auto")
        deployment.state = State.READY
    return registry


def report_on(registry: Registry, found: Records) -> Any:
    """The report, at a fixed moment."""
    return assemble(found, registry, NO_DROPS, now=1767225600.0)
