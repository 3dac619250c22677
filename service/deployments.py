"""Deployments, their tasks, and how they are loaded, tested and declared ready."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.warmup import warm_up
from service.device_memory import allocated_bytes
from service.prediction import DEFAULT_ACTIVATION, Activation
from service.sections import TaskSettings
from service.settings import Settings

Loader = Callable[[Path, str, str, str], Checkpoint]
Readiness = Literal["starting", "ready", "degraded", "failed"]
log = logging.getLogger("secateur.deployments")


class State(StrEnum):
    """The life of a deployment."""

    LOADING = "loading"
    TESTING = "testing"
    READY = "ready"
    FAILED = "failed"


class LoadError(Exception):
    """A checkpoint that must not serve; the code is what `GET /deployments` shows."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class Deployment:
    """One checkpoint under its name on the wire. `checkpoint` is set before the state becomes testing.

    allocator_delta: bytes by which loading it made the device's allocator grow; None on a CPU, which has none to ask.
    """

    name: str
    task: str
    role: Literal["full", "pruned"]
    path: Path
    max_batch_tokens: int
    state: State = State.LOADING
    error_code: str | None = None
    load_seconds: float | None = None
    allocator_delta: int | None = None
    loaded: Checkpoint | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The loaded checkpoint. Raises RuntimeError if there is none; ready deployments always have one."""
        if self.loaded is None:
            raise RuntimeError(f"deployment {self.name} is not loaded")
        return self.loaded

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY


@dataclass(eq=False)
class Task:
    """One classification problem and its deployments, in the order of the configuration."""

    name: str
    settings: TaskSettings
    deployments: dict[str, Deployment] = field(default_factory=dict)

    @property
    def full(self) -> Deployment:
        return self.deployments[self.settings.full]

    @property
    def default(self) -> Deployment:
        return self.deployments[self.settings.default_name]

    @property
    def fallback(self) -> Deployment:
        return self.deployments[self.settings.fallback_name]

    @property
    def reference(self) -> Checkpoint | None:
        """A checkpoint that passed its test; all of a task's deployments agree in labels, tokenizer, problem type."""
        return next((d.checkpoint for d in self.deployments.values() if d.is_ready), None)


def default_activation(checkpoint: Checkpoint) -> Activation:
    """The activation that the checkpoint's problem type asks for."""
    return DEFAULT_ACTIVATION[checkpoint.problem_type]


class Registry:
    """All tasks and deployments of the configuration."""

    def __init__(self, settings: Settings) -> None:
        self.tasks = {name: Task(name, task) for name, task in settings.tasks.items()}
        self.deployments: dict[str, Deployment] = {}
        self._max_batch_items = settings.engine.max_batch_items
        for task in self.tasks.values():
            for name in task.settings.deployments:
                chosen = settings.deployments[name]
                tokens = chosen.max_batch_tokens or settings.engine.max_batch_tokens
                path = settings.model_path(name)
                task.deployments[name] = Deployment(name, task.name, chosen.role, path, tokens)
            self.deployments |= task.deployments

    def load_all(
        self, load: Loader, device: str, dtype: str, backend: str, on_loaded: Callable[[Deployment], None]
    ) -> None:
        """Load and test every deployment, required ones first, and report each. A failure concerns only its own."""
        names = [name for task in self.tasks.values() for name in task.settings.required_names]
        for name in dict.fromkeys([*names, *self.deployments]):
            self._load(self.deployments[name], device, lambda path: load(path, device, dtype, backend))
            on_loaded(self.deployments[name])

    def readiness(self) -> Readiness:
        """Starting until every deployment has been tried, so that the first request meets them all.

        Then failed without a required deployment, degraded without an optional one.
        """
        required = [task.deployments[name] for task in self.tasks.values() for name in task.settings.required_names]
        if any(deployment.state is State.FAILED for deployment in required):
            return "failed"
        if any(deployment.state in (State.LOADING, State.TESTING) for deployment in self.deployments.values()):
            return "starting"
        if any(deployment.state is State.FAILED for deployment in self.deployments.values()):
            return "degraded"
        return "ready"

    def _load(self, deployment: Deployment, device: str, load: Callable[[Path], Checkpoint]) -> None:
        started = time.monotonic()
        try:
            before = allocated_bytes(device)
            deployment.loaded = load(deployment.path)
            after = allocated_bytes(device)
            deployment.allocator_delta = None if before is None or after is None else after - before
            deployment.state = State.TESTING
            self._check(deployment, deployment.loaded)
            warm_up(deployment.loaded.model, deployment.max_batch_tokens, self._max_batch_items)
        except Exception as error:
            deployment.loaded = None
            deployment.error_code = _code(error, deployment.state)
            deployment.state = State.FAILED
            about = {"deployment": deployment.name, "error": deployment.error_code}
            log.exception("deployment failed", extra={"fields": about})
        else:
            deployment.load_seconds = time.monotonic() - started
            deployment.state = State.READY
            fields = {
                "deployment": deployment.name,
                "seconds": round(deployment.load_seconds, 3),
                "backend": deployment.checkpoint.model.backend.name,
            }
            log.info("deployment is ready", extra={"fields": fields})

    def _check(self, deployment: Deployment, checkpoint: Checkpoint) -> None:
        if checkpoint.problem_type not in DEFAULT_ACTIVATION:
            raise LoadError("problem_type_unknown", f"the problem type {checkpoint.problem_type!r} is not known")
        if checkpoint.encoder.max_tokens > deployment.max_batch_tokens:
            raise LoadError(
                "batch_too_small",
                f"max_batch_tokens is {deployment.max_batch_tokens}, an input may have {checkpoint.encoder.max_tokens}",
            )
        reference = self.tasks[deployment.task].reference
        if reference is not None:
            for name in ("labels", "tokenizer_sha256", "problem_type"):
                if getattr(checkpoint, name) != getattr(reference, name):
                    raise LoadError("task_mismatch", f"{name} differs from the task's other deployments")
        checkpoint.verify()


def _code(error: Exception, state: State) -> str:
    if isinstance(error, LoadError):
        return error.code
    if isinstance(error, CheckpointError):
        return "golden_mismatch" if state is State.TESTING else "invalid_checkpoint"
    return "internal"
