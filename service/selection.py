"""Which deployment answers a request: task, then explicit variant, experiment arm or default, then fallback."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from service.assignment import arm, bucket, is_enrolled
from service.deployments import Deployment, Registry, Task
from service.errors import ApiError
from service.schemas import Query
from service.sections import ExperimentSettings
from service.settings import Settings
from service.storage.events import Source


class Standing(Protocol):
    """The experiments as they stand now; winners: the deployments that answer their tasks instead of the default."""

    @property
    def experiments(self) -> Mapping[str, ExperimentSettings]: ...

    @property
    def winners(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Exposure:
    """How a request met an experiment. arm: the deployment it was meant for, or the one it asked for by name."""

    name: str
    experiment: ExperimentSettings
    control: str
    candidate: str
    arm: str
    source: Source

    @property
    def revision(self) -> int:
        return self.experiment.revision

    def is_in(self, mode: str) -> bool:
        """Whether the experiment is in this mode and the request a part of its comparison."""
        return self.experiment.mode == mode and self.source != "override"

    def is_sampled(self, unit: str) -> bool:
        """Whether a shadow's candidate is to see the items of this request, `unit` being its server-made id."""
        points = round(self.experiment.sample * 100)
        return self.is_in("shadow") and bucket(f"{_salt(self.name, self.experiment)}:shadow", unit) < points


@dataclass(frozen=True)
class Selection:
    """The deployment that should answer, and what led to it. explicit: the client named it."""

    task: Task
    intended: Deployment
    explicit: bool
    exposure: Exposure | None

    def serving(self) -> Deployment:
        """The intended deployment if it is ready, else the task's fallback; a named one is never substituted.

        Raises ApiError: deployment_unavailable, or not_ready while it still loads.
        """
        candidates = [self.intended] if self.explicit else [self.intended, self.task.fallback]
        for deployment in candidates:
            if deployment.is_ready:
                return deployment
        if self.intended.error_code is None:
            raise ApiError("not_ready", "the deployment is still loading")
        raise ApiError("deployment_unavailable", "the deployment could not be loaded")


def select(query: Query, registry: Registry, settings: Settings, standing: Standing, unit: str) -> Selection:
    """Choose. `unit` is the server-made id, the assignment key of requests without a subject.

    Raises ApiError: task_required, task_not_found, variant_not_found.
    """
    task, variant = _names(query, registry, settings.default_task)
    running = _running(standing.experiments, task.name)
    if variant != "auto":
        deployment = task.full if variant == "full" else task.deployments[variant]
        exposure = Exposure(*running, *settings.roles(running[1]), deployment.name, "override") if running else None
        return Selection(task, deployment, True, exposure)
    exposure = _assigned(*running, settings, query.subject, unit) if running else None
    winner = standing.winners.get(task.name, task.settings.default_name)
    return Selection(task, task.deployments[exposure.arm if exposure else winner], False, exposure)


def _names(query: Query, registry: Registry, default_task: str | None) -> tuple[Task, str]:
    """The task, and `auto`, `full` or the name of one of its deployments."""
    name, variant, param = query.task, query.variant, "variant"
    if query.model is not None and query.model not in ("auto", "full"):
        param = "model"
        if query.model in registry.tasks:
            name, variant = _agreeing(name, query.model), "auto"
        elif query.model in registry.deployments:
            name, variant = _agreeing(name, registry.deployments[query.model].task), query.model
        else:
            raise ApiError("variant_not_found", "no deployment or task has this name", "model")
    elif query.model is not None:
        variant = query.model
    if name is None:
        name = default_task or (next(iter(registry.tasks)) if len(registry.tasks) == 1 else None)
    if name is None:
        raise ApiError("task_required", f"name one of the tasks: {', '.join(registry.tasks)}", "task")
    task = registry.tasks.get(name)
    if task is None:
        raise ApiError("task_not_found", "no task has this name", "task")
    if variant not in ("auto", "full") and variant not in task.deployments:
        raise ApiError("variant_not_found", "the task has no deployment of this name", param)
    return task, variant


def _agreeing(task: str | None, of_model: str) -> str:
    if task is not None and task != of_model:
        raise ApiError("variant_not_found", "the model belongs to another task", "model")
    return of_model


def _running(experiments: Mapping[str, ExperimentSettings], task: str) -> tuple[str, ExperimentSettings] | None:
    matches = (pair for pair in experiments.items() if pair[1].task == task and pair[1].state == "running")
    return next(matches, None)


def _assigned(
    name: str, experiment: ExperimentSettings, settings: Settings, subject: str | None, unit: str
) -> Exposure | None:
    key = unit if subject is None else subject
    salt = _salt(name, experiment)
    if not is_enrolled(salt, round(experiment.traffic * 100), key):
        return None
    control, candidate = settings.roles(experiment)
    chosen = {"shadow": control, "cascade": candidate}.get(experiment.mode) or arm(salt, _weights(experiment), key)
    return Exposure(name, experiment, control, candidate, chosen, "request" if subject is None else "subject")


def _salt(name: str, experiment: ExperimentSettings) -> str:
    return experiment.salt or name


def _weights(experiment: ExperimentSettings) -> list[tuple[str, int]]:
    return [(arm.deployment, round((arm.weight or 0) * 100)) for arm in experiment.arms]
