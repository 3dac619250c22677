"""The sections of the configuration file: keys, types, defaults and the rules that concern one key alone."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

RESERVED_NAMES = frozenset({"auto", "full", "pruned", "mixed"})


def rule(message: str) -> PydanticCustomError:
    """A broken rule, as the error that validation reports."""
    return PydanticCustomError("rule", "{message}", {"message": message})


def _name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise rule("a name is 1 to 63 of a-z 0-9 . _ - and starts with a letter or digit")
    if value in RESERVED_NAMES:
        raise rule(f"the name {value!r} is reserved")
    return value


def _relative_path(value: str) -> str:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise rule("the path must be relative to models.root and must not contain '..'")
    return value


def _two_decimals(value: float) -> float:
    if abs(value * 100 - round(value * 100)) > 1e-6:
        raise rule("a percentage has at most two decimals")
    return value


Name = Annotated[str, AfterValidator(_name)]
Percent = Annotated[float, Field(ge=0, le=100), AfterValidator(_two_decimals)]


class Section(BaseModel):
    """A mapping of the file: typed without coercion, frozen, and closed to unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    nearest = get_close_matches(str(key), cls.model_fields, 1, cutoff=0.0)
                    raise rule(f"unknown key {str(key)!r}, the nearest known key is {nearest[0]!r}")
        return data


class Server(Section):
    """Where the service listens, and how it leaves."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    docs: bool = False
    drain_seconds: float = Field(30, ge=0)
    ready_off_seconds: float = Field(5, ge=0)


class Auth(Section):
    """Who may call. `open` admits everyone who reaches the port."""

    mode: Literal["open"] = "open"


class Models(Section):
    """Where checkpoints lie and how they are loaded. A relative root starts at the configuration file."""

    root: str = "models"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    backend: Literal["auto", "reference", "cpu", "triton"] = "auto"


class DeploymentSettings(Section):
    """One checkpoint to serve."""

    path: Annotated[str, AfterValidator(_relative_path)]
    role: Literal["full", "pruned"]
    max_batch_tokens: int | None = Field(None, ge=1)


class TaskSettings(Section):
    """One classification problem and the deployments that answer it."""

    deployments: list[Name] = Field(min_length=1)
    full: Name
    default: Name | None = None
    fallback: Name | None = None
    required: list[Name] | None = None
    slo_ms: float | None = Field(None, gt=0)

    @property
    def default_name(self) -> str:
        """The deployment that answers when nothing else decides."""
        return self.default or self.full

    @property
    def fallback_name(self) -> str:
        """The deployment that answers for one that is not ready."""
        return self.fallback or self.full

    @property
    def required_names(self) -> list[str]:
        """The deployments without which the service is not ready."""
        return [self.full] if self.required is None else self.required

    def references(self) -> Iterator[tuple[str, str]]:
        """Yield (key, deployment) for every name that must be one of `deployments`."""
        yield "full", self.full
        yield "default", self.default_name
        yield "fallback", self.fallback_name
        for name in self.required_names:
            yield "required", name


class Limits(Section):
    """What one request, and all waiting requests together, may ask for."""

    max_body_bytes: int = Field(2_000_000, ge=1024)
    max_inputs: int = Field(128, ge=1)
    max_chars: int = Field(100_000, ge=1)
    max_pixels: int = Field(25_000_000, ge=1)
    timeout_ms: int = Field(30_000, ge=1)
    body_timeout_s: float = Field(10, gt=0)
    max_queue_items: int = Field(512, ge=1)
    max_queue_chars: int = Field(8_000_000, ge=1)


class EngineSettings(Section):
    """The size of a batch and the patience of the watchdog."""

    max_batch_tokens: int = Field(16_384, ge=1)
    max_batch_items: int = Field(64, ge=1)
    tokenizer_threads: int = Field(2, ge=1)
    stall_seconds: float = Field(60, gt=0)


class Arm(Section):
    """A deployment inside an experiment and its share of the enrolled traffic, in percent."""

    deployment: Name
    weight: Percent


class ExperimentSettings(Section):
    """A sticky split of one task's traffic between deployments."""

    task: Name
    mode: Literal["split"]
    arms: list[Arm] = Field(min_length=2)
    revision: int = Field(1, ge=1)
    state: Literal["running", "paused", "stopped"] = "running"
    salt: str | None = Field(None, min_length=1)
    traffic: Percent = 100


class Logging(Section):
    """How much is written to the log; lines are JSON."""

    level: Literal["debug", "info", "warning", "error"] = "info"
