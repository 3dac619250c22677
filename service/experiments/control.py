"""What operators, ramps and guardrails made of the configured experiments: the configuration with the store over it."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from models.errors import ConfigError
from service.errors import ApiError
from service.experiments import ramp
from service.experiments.document import ExperimentPatch
from service.sections import ExperimentSettings
from service.settings import Settings
from service.storage.events import Step, StorageUnavailableError, StoredState
from service.storage.store import Store

Actor = Literal["operator", "ramp", "guardrail"]
# What a comparison was made under. A change of any of these makes the numbers of before and after incomparable.
ANALYSIS = ("task", "mode", "margin", "alpha", "sample", "threshold", "confidence")
HASH_DIGITS = 16


class Control:
    """The experiments as they stand now. Both mappings are replaced whole, so a reader sees one moment.

    experiments: the configured ones with the state and the traffic that are in effect. winners: the deployment that
    answers a task instead of its default, since an experiment ended, or was paused by its guardrail.
    """

    def __init__(self, settings: Settings, store: Store | None) -> None:
        """Take over what the store knows. Raises ConfigError if a configured experiment contradicts it."""
        self._settings = settings
        self._store = store
        self._lock = threading.Lock()
        self._states: dict[str, StoredState] = {}
        self.experiments: Mapping[str, ExperimentSettings] = settings.experiments
        self.winners: Mapping[str, str] = {}
        if store is None:
            return
        try:
            self._reconcile(store)
        except StorageUnavailableError:
            raise ConfigError("storage.url: the database failed while the experiments were set up") from None

    def state(self, name: str) -> StoredState:
        """What is in effect for a configured experiment."""
        return self._states[name]

    def poll(self) -> None:
        """Take over what other replicas did. Blocks; raises StorageUnavailableError."""
        with self._lock:
            self._read()

    def patch(self, name: str, wanted: ExperimentPatch) -> None:
        """Do what an operator wants, and record it. Blocks.

        Raises ApiError: experiment_not_found, validation_failed, revision_required, storage_unavailable.
        """
        if name not in self.experiments:
            raise ApiError("experiment_not_found", "no experiment has this name", "name")
        try:
            with self._lock:
                self._read()
                self._write(*self._patched(name, wanted))
        except StorageUnavailableError:
            raise ApiError("storage_unavailable", "the database cannot be written, nothing was changed") from None

    def set_traffic(self, name: str, traffic: float) -> None:
        """Take a step of the ramp. Blocks; raises StorageUnavailableError."""
        with self._lock:
            state = self._states[name]
            self._write(replace(state, traffic=traffic), "ramp", "traffic", self._traffic_detail(state, traffic))

    def pause(self, name: str, actor: Actor, reason: str) -> None:
        """Pause, and let the task's fallback answer until an operator decides. Blocks; raises StorageUnavailableError.

        The task's default would be the wrong place to go: it may be the very candidate that failed.
        """
        experiment = self.experiments[name]
        control, candidate = self._settings.roles(experiment)
        fallback = self._settings.tasks[experiment.task].fallback_name
        with self._lock:
            refuge = control if fallback == candidate else fallback
            state = replace(self._states[name], state="paused", winner=refuge)
            self._write(state, actor, "paused", f"{reason}; {refuge} answers the task")

    def _reconcile(self, store: Store) -> None:
        known = store.states()
        for name, experiment in self._settings.experiments.items():
            store.declare(name, experiment.revision, experiment.mode, *self._settings.roles(experiment))
            start = self._start(name, experiment)
            stored = known.get(name)
            if stored is None or stored.revision < start.revision:
                self._begin(start)
                continue
            _check_same(stored, start)
            if stored.winner is None and stored.config_hash != start.config_hash:
                # The file was edited since: of two wishes, the later one counts.
                self._begin(start)
            else:
                self._states[name] = stored
        for name in self._crowded():
            detail = "the configuration runs another experiment of the task"
            self._write(replace(self._states[name], state="paused"), "operator", "paused", detail)
        self._publish()

    def _start(self, name: str, experiment: ExperimentSettings) -> StoredState:
        """The state in which the configuration starts an experiment: a ramp begins at its first step."""
        has_own_traffic = experiment.ramp is None or "traffic" in experiment.model_fields_set
        traffic = experiment.traffic if has_own_traffic or experiment.ramp is None else experiment.ramp.steps[0]
        digest = config_hash(self._settings, name)
        return StoredState(name, experiment.revision, digest, experiment.state, traffic, updated=time.time())

    def _begin(self, start: StoredState) -> None:
        self._write(start, "operator", "configured", f"{start.state}, {self._traffic_detail(start, start.traffic)}")

    def _crowded(self) -> Iterator[str]:
        """Experiments that an operator once started, of tasks in which the file now runs another."""
        running = [name for name, state in self._states.items() if state.state == "running"]
        file = self._settings.experiments
        for name in running:
            rivals = (other for other in running if other != name and file[other].task == file[name].task)
            if file[name].state != "running" and any(True for _ in rivals):
                yield name

    def _patched(self, name: str, wanted: ExperimentPatch) -> tuple[StoredState, Actor, str, str]:
        """The new state, and the step that tells of it."""
        state = self._states[name]
        given = {key for key, value in wanted.model_dump().items() if value is not None and value is not False}
        if not given:
            raise ApiError("validation_failed", "send state, traffic, advance or winner")
        if wanted.winner is not None:
            return self._ended(state, wanted.winner, given)
        if has_ended(state):
            raise ApiError("revision_required", "the experiment has ended: raise its revision to run it again")
        details: list[str] = []
        action = "traffic"
        if wanted.advance or wanted.traffic is not None:
            traffic = self._next_traffic(name, wanted)
            details.append(self._traffic_detail(state, traffic))
            state = replace(state, traffic=traffic)
        if wanted.state is not None:
            self._check_alone(name, wanted.state)
            action = wanted.state
            state = replace(state, state=wanted.state, winner=None)
        return state, "operator", action, ", ".join(details)

    def _ended(self, state: StoredState, winner: str, given: set[str]) -> tuple[StoredState, Actor, str, str]:
        if given != {"winner"}:
            raise ApiError("validation_failed", "winner ends the experiment: send it alone", "winner")
        if winner not in [arm.deployment for arm in self.experiments[state.name].arms]:
            raise ApiError("validation_failed", "the winner must be one of the arms", "winner")
        return replace(state, state="stopped", winner=winner), "operator", "ended", f"{winner} answers the task"

    def _next_traffic(self, name: str, wanted: ExperimentPatch) -> float:
        if wanted.traffic is not None:
            if wanted.advance:
                raise ApiError("validation_failed", "send traffic or advance", "advance")
            if abs(wanted.traffic * 100 - round(wanted.traffic * 100)) > 1e-6:
                raise ApiError("validation_failed", "a percentage has at most two decimals", "traffic")
            return wanted.traffic
        settings = self.experiments[name].ramp
        if settings is None:
            raise ApiError("validation_failed", "the experiment has no ramp: send traffic", "advance")
        following = ramp.next_step(settings, self._states[name].traffic)
        if following is None:
            raise ApiError("validation_failed", "the ramp is at its last step", "advance")
        return following

    def _check_alone(self, name: str, wanted: str) -> None:
        task = self.experiments[name].task
        others = [other for other, found in self.experiments.items() if found.task == task and other != name]
        if wanted == "running" and any(self.experiments[other].state == "running" for other in others):
            raise ApiError("validation_failed", "another experiment of the task is running", "state")

    def _traffic_detail(self, state: StoredState, traffic: float) -> str:
        assert self._store is not None
        tallies = self._store.tallies(state.name, state.revision)
        return ramp.units_detail(f"{traffic:g} %", sum(tally.n for tally in tallies if tally.name == "units"))

    def _read(self) -> None:
        """Take over what the store holds of the configured revisions; one that is newer is another replica's."""
        assert self._store is not None
        for name, stored in self._store.states().items():
            if name in self._states and stored.revision == self._states[name].revision:
                self._states[name] = stored
        self._publish()

    def _write(self, state: StoredState, actor: Actor, action: str, detail: str) -> None:
        assert self._store is not None
        now = time.time()
        state = replace(state, updated=now)
        self._store.put_state(state)
        self._store.add_step(state.name, state.revision, Step(now, actor, action, detail))
        self._states[state.name] = state
        self._publish()

    def _publish(self) -> None:
        overlaid = {}
        for name, experiment in self._settings.experiments.items():
            state = self._states.get(name)
            changes = {"state": state.state, "traffic": state.traffic} if state else {}
            overlaid[name] = experiment.model_copy(update=changes)
        took_over = sorted((state for state in self._states.values() if state.winner), key=lambda state: state.updated)
        winners = {overlaid[state.name].task: state.winner for state in took_over if state.winner}
        self.experiments, self.winners = overlaid, winners


def has_ended(state: StoredState) -> bool:
    """Whether a winner has been chosen; a paused experiment may have one for the time being."""
    return state.state == "stopped" and state.winner is not None


def config_hash(settings: Settings, name: str) -> str:
    """Two digests, `analysis.start`: what a revision must keep, and the state and traffic that the file starts with."""
    experiment = settings.experiments[name]
    values = experiment.model_dump(mode="json")
    control, candidate = settings.roles(experiment)
    analysis = {key: values[key] for key in ANALYSIS} | {
        "salt": experiment.salt or name,
        "control": control,
        "candidate": candidate,
        "arms": [[arm.deployment, arm.weight] for arm in experiment.arms],
    }
    start = {key: values[key] for key in ("state", "traffic", "ramp")}
    return f"{_digest(analysis)}.{_digest(start)}"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]


def _check_same(stored: StoredState, start: StoredState) -> None:
    where = f"experiments.{start.name}.revision"
    if stored.revision > start.revision:
        raise ConfigError(
            f"{where}: {start.revision} is past, the database has revision {stored.revision}: raise revision above that"
        )
    if stored.config_hash.partition(".")[0] != start.config_hash.partition(".")[0]:
        raise ConfigError(
            f"{where}: the arms, the margin or another rule of the comparison changed under revision {start.revision}, "
            "and its records would be mixed with new ones: raise revision"
        )
