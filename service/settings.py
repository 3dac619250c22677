"""The configuration: one YAML file, overridden by the environment. This is the only reader of the environment.

Precedence: command line > environment > file > default. `SECATEUR_LIMITS__MAX_INPUTS=64` sets `limits.max_inputs`; the
values of variables are YAML, so numbers and booleans need no quotes and lists are written `[a, b]`.
"""

import ipaddress
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from models.errors import ConfigError
from service.sections import (
    Admin,
    Auth,
    DeploymentSettings,
    EngineSettings,
    ExperimentSettings,
    Limits,
    Logging,
    Models,
    Name,
    Section,
    Server,
    Storage,
    TaskSettings,
    rule,
)

ENV_PREFIX = "SECATEUR_"
CONFIG_VARIABLE = "SECATEUR_CONFIG"
HASH_KEY_VARIABLE = "SECATEUR_HASH_KEY"
PROCESS_VARIABLES = frozenset({CONFIG_VARIABLE, HASH_KEY_VARIABLE})
HASH_KEY_BYTES = 32
SQLITE = "sqlite:///"


class Settings(Section):
    """The whole configuration, checked."""

    version: Literal[1]
    server: Server = Server()
    auth: Auth = Auth()
    admin: Admin = Admin()
    models: Models = Models()
    deployments: dict[Name, DeploymentSettings] = Field(min_length=1)
    tasks: dict[Name, TaskSettings] = Field(min_length=1)
    default_task: Name | None = None
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    experiments: dict[Name, ExperimentSettings] = Field(default_factory=dict)
    storage: Storage = Storage()
    logging: Logging = Logging()

    def model_path(self, deployment: str) -> Path:
        """The directory of a deployment's checkpoint."""
        return Path(self.models.root) / self.deployments[deployment].path

    def roles(self, experiment: ExperimentSettings) -> tuple[str, str]:
        """The deployments that are control and candidate of an experiment."""
        found = {arm.role or self._default_role(arm.deployment): arm.deployment for arm in experiment.arms}
        return found["control"], found["candidate"]

    def _default_role(self, deployment: str) -> str:
        return "control" if self.deployments[deployment].role == "full" else "candidate"

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for problem in self._problems():
            raise rule(problem)
        return self

    def _problems(self) -> Iterator[str]:
        if not is_loopback(self.server.host) and "mode" not in self.auth.model_fields_set:
            yield "server.host is not a loopback address: set auth.mode explicitly"
        if self.limits.max_inputs > self.limits.max_queue_items:
            yield "limits.max_inputs exceeds limits.max_queue_items: the largest request could never be admitted"
        if self.limits.max_queue_chars < min(
            self.limits.max_body_bytes, self.limits.max_inputs * self.limits.max_chars
        ):
            yield "limits.max_queue_chars is too small: the longest request could never be admitted"
        if self.default_task is not None and self.default_task not in self.tasks:
            yield f"default_task: no task is named {self.default_task!r}"
        yield from self._deployment_problems()
        yield from self._task_problems()
        yield from self._experiment_problems()

    def _deployment_problems(self) -> Iterator[str]:
        root = Path(self.models.root).resolve()
        for name in self.deployments:
            if not self.model_path(name).resolve().is_relative_to(root):
                yield f"deployments.{name}.path leaves models.root"
            owners = [task for task, settings in self.tasks.items() if name in settings.deployments]
            if len(owners) != 1:
                yield f"deployments.{name} must belong to exactly one task, it belongs to {len(owners)}"

    def _task_problems(self) -> Iterator[str]:
        for name, task in self.tasks.items():
            if len(set(task.deployments)) != len(task.deployments):
                yield f"tasks.{name}.deployments names a deployment twice"
            for deployment in task.deployments:
                if deployment not in self.deployments:
                    yield f"tasks.{name}.deployments: no deployment is named {deployment!r}"
            full = [deployment for deployment in task.deployments if self.deployments[deployment].role == "full"]
            if len(full) != 1:
                yield f"tasks.{name} must have exactly one deployment with role full, it has {len(full)}"
            for key, deployment in task.references():
                if deployment not in task.deployments:
                    yield f"tasks.{name}.{key}: {deployment!r} is not a deployment of this task"
            if task.full != full[0]:
                yield f"tasks.{name}.full: {task.full!r} does not have role full"

    def _experiment_problems(self) -> Iterator[str]:
        running: set[str] = set()
        for name, experiment in self.experiments.items():
            if experiment.task not in self.tasks:
                yield f"experiments.{name}.task: no task is named {experiment.task!r}"
            for arm in experiment.arms:
                if arm.deployment not in self.tasks[experiment.task].deployments:
                    yield f"experiments.{name}.arms: {arm.deployment!r} is not a deployment of {experiment.task!r}"
            if len({arm.deployment for arm in experiment.arms}) != len(experiment.arms):
                yield f"experiments.{name}.arms names a deployment twice"
            if {arm.role or self._default_role(arm.deployment) for arm in experiment.arms} != {"control", "candidate"}:
                yield f"experiments.{name}.arms: give one arm the role control and the other the role candidate"
            for problem in experiment.problems():
                yield f"experiments.{name}.{problem}"
            if experiment.state == "running":
                if experiment.task in running:
                    yield f"experiments.{name}: task {experiment.task!r} already has a running experiment"
                running.add(experiment.task)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader to which a repeated key is an error; YAML itself leaves the choice to the reader."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def configured_path() -> Path | None:
    """The configuration file named by SECATEUR_CONFIG, if any."""
    value = os.environ.get(CONFIG_VARIABLE)
    return Path(value) if value else None


def load_settings(path: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Read and check the configuration: `overrides` (nested) over the environment over the file over the defaults.

    Without `path`, SECATEUR_CONFIG names the file. Raises ConfigError.
    """
    path = path or configured_path()
    if path is None:
        raise ConfigError(f"no configuration: pass --config FILE or set {CONFIG_VARIABLE}")
    document = _read_file(path)
    _merge(document, _environment())
    _merge(document, overrides)
    _anchor(document, path.parent)
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_describe(problem) for problem in error.errors())) from None


def hash_key() -> bytes | None:
    """The key of SECATEUR_HASH_KEY, under which subjects and inputs are recorded. Raises ConfigError if it is short."""
    value = os.environ.get(HASH_KEY_VARIABLE)
    if not value:
        return None
    if len(value.encode()) < HASH_KEY_BYTES:
        raise ConfigError(f"{HASH_KEY_VARIABLE} must have at least {HASH_KEY_BYTES} bytes")
    return value.encode()


def _anchor(document: dict[Any, Any], directory: Path) -> None:
    """Let relative paths start at the configuration file. What is not of the right type is left to validation."""
    models = document.setdefault("models", {})
    if isinstance(models, dict) and isinstance(models.setdefault("root", "models"), str):
        models["root"] = str((directory / models["root"]).absolute())
    auth = document.get("auth")
    if isinstance(auth, dict) and isinstance(auth.get("keys_file"), str):
        auth["keys_file"] = str((directory / auth["keys_file"]).absolute())
    storage = document.setdefault("storage", {})
    if isinstance(storage, dict):
        url = storage.setdefault("url", Storage().url)
        if isinstance(url, str) and url.startswith(SQLITE):
            storage["url"] = SQLITE + str((directory / url.removeprefix(SQLITE)).absolute())


def _read_file(path: Path) -> dict[Any, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold a mapping, see the example in the README")
    return document


def _environment() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for variable, text in sorted(os.environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in PROCESS_VARIABLES:
            continue
        keys = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if keys[0] not in Settings.model_fields:
            nearest = get_close_matches(keys[0], Settings.model_fields, 1, cutoff=0.0)
            raise ConfigError(f"{variable}: unknown key {keys[0]!r}, the nearest known key is {nearest[0]!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{variable}: the value is not valid YAML") from None
        for key in reversed(keys):
            value = {key: value}
        _merge(tree, value)
    return tree


def _merge(base: dict[Any, Any], over: Mapping[Any, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _describe(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    variable = ENV_PREFIX + path.replace(".", "__").upper()
    source = f" (set by {variable})" if variable in os.environ else ""
    return f"{path}{source}: {problem['msg']}" if path else problem["msg"]
