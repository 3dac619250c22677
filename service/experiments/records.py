"""What the store holds of one revision of an experiment, read at one moment: all a report is made of."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.experiments.control import Control
from service.sections import ExperimentSettings
from service.settings import Settings
from service.storage.events import Look, PairEvent, Step, StoredState, Tally
from service.storage.store import Store

Milliseconds = npt.NDArray[np.float64]


class Counts:
    """The tallies of a revision. `n` adds up all that agree with what it is given."""

    def __init__(self, rows: Sequence[Tally]) -> None:
        self._rows: dict[str, list[Tally]] = defaultdict(list)
        for row in rows:
            self._rows[row.name].append(row)

    def rows(self, name: str, **wanted: str) -> list[Tally]:
        """The tallies of a name with these values of arm, truth and predicted."""
        return [
            row for row in self._rows.get(name, ()) if all(getattr(row, key) == value for key, value in wanted.items())
        ]

    def n(self, name: str, **wanted: str) -> int:
        """How many were counted."""
        return sum(row.n for row in self.rows(name, **wanted))

    def total(self, name: str, **wanted: str) -> float:
        """Sum of the values counted."""
        return sum(row.total for row in self.rows(name, **wanted))

    def peak(self, name: str) -> float:
        """Greatest of the values counted."""
        return max((row.peak for row in self.rows(name)), default=0.0)


@dataclass(frozen=True)
class Records:
    """One experiment. experiment: with the state and traffic in effect. latencies: ascending, by arm, newest only."""

    name: str
    experiment: ExperimentSettings
    state: StoredState
    control: str
    candidate: str
    counts: Counts
    latencies: dict[str, Milliseconds]
    looks: Sequence[Look]
    steps: Sequence[Step]
    disagreements: Sequence[PairEvent]

    @property
    def arms(self) -> tuple[str, str]:
        """The control and the candidate."""
        return self.control, self.candidate


def read(name: str, settings: Settings, control: Control, store: Store) -> Records:
    """Read everything. Blocks; raises StorageUnavailableError."""
    experiment = control.experiments[name]
    revision = experiment.revision
    arms = settings.roles(experiment)
    return Records(
        name,
        experiment,
        control.state(name),
        *arms,
        counts=Counts(store.tallies(name, revision)),
        latencies=_latencies(store, name, experiment, arms),
        looks=store.looks(name, revision),
        steps=store.steps(name, revision),
        disagreements=store.disagreements(name, revision),
    )


def _latencies(
    store: Store, name: str, experiment: ExperimentSettings, arms: tuple[str, str]
) -> dict[str, Milliseconds]:
    """A split's come from requests that had the device to themselves; those of a shadow are shown, never judged."""
    control, candidate = (store.latencies(name, experiment.revision, arm) for arm in arms)
    if experiment.mode == "shadow":
        found = np.concatenate([control.free, control.contended]), store.candidate_latencies(name, experiment.revision)
    else:
        found = control.free, candidate.free
    return {arm: np.sort(samples) for arm, samples in zip(arms, found, strict=True)}
