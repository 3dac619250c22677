"""The sections of the configuration file: keys, types, defaults and the rules that concern one key alone."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

DRIVERS = frozenset({"sqlite", "postgresql", "postgresql+psycopg"})
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


def _database(value: str) -> str:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise rule("not a database URL, such as postgresql://user:password@host:5432/name") from None
    if url.drivername not in DRIVERS or not url.database:
        raise rule("must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")
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
    """Who may call. `open` admits everyone who reaches the port; `keys` asks for one of the keys in `keys_file`."""

    mode: Literal["open", "keys"] = "open"
    keys_file: str | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _keys_have_a_file(self) -> Self:
        if (self.mode == "keys") is (self.keys_file is None):
            raise rule("keys_file belongs to mode `keys`, which needs it: make one with `secateur keys new`")
        return self


class Admin(Section):
    """Whether routes that change what is served exist at all."""

    enabled: bool = False


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
    shadow_queue_items: int = Field(64, ge=1)
    shadow_batch_tokens: int = Field(2048, ge=1)


class Arm(Section):
    """A deployment inside an experiment. weight: its share of the enrolled traffic in percent, for splits only.

    role: `candidate` is the deployment that wants to take over, `control` the one it is compared with. Default: by the
    deployment's own role, full is the control.
    """

    deployment: Name
    weight: Percent | None = None
    role: Literal["control", "candidate"] | None = None


class Confidence(Section):
    """How sure a cascade's candidate is of an item, 0 to 1: made by `secateur calibrate-cascade`, not by hand.

    kind `probability`: the largest class probability (multi-label: the least decided class). kind `dispersion`: a
    logistic regression on dispersion features of the probabilities; `weights` names them, `bias` is its intercept.
    """

    kind: Literal["probability", "dispersion"] = "probability"
    weights: dict[Literal["variance", "negentropy"], float] = Field(default_factory=dict)
    bias: float = 0.0

    @model_validator(mode="after")
    def _weights_belong_to_dispersion(self) -> Self:
        if (self.kind == "dispersion") is (not self.weights):
            raise rule("kind dispersion needs weights, and only it has them: `secateur calibrate-cascade` prints both")
        return self


class Guardrail(Section):
    """What pauses an experiment by itself, whatever its verdict.

    error_rate: the greatest excess of failed requests in the candidate's arm. latency_ratio: the greatest ratio of the
    arms' p95, candidate over control; None watches no latency. Both act on bounds that hold at every look.
    """

    error_rate: float = Field(0.01, gt=0, lt=1)
    latency_ratio: float | None = Field(None, gt=0)


class Ramp(Section):
    """Raise `traffic` step by step while nothing speaks against it. steps: percent of the traffic, rising.

    units: distinct units that must have met the experiment at a step before the next one is taken.
    """

    steps: list[Percent] = Field(default_factory=lambda: [5.0, 25.0, 50.0, 100.0], min_length=1)
    units: int = Field(1000, ge=1)


class ExperimentSettings(Section):
    """A comparison of two deployments of one task on live traffic.

    split: each unit meets one arm. shadow: the control answers and the candidate runs behind it on `sample` percent of
    the requests. cascade: the candidate answers where its confidence reaches `threshold`, the control elsewhere.
    """

    task: Name
    mode: Literal["split", "shadow", "cascade"]
    arms: list[Arm] = Field(min_length=2, max_length=2)
    revision: int = Field(1, ge=1)
    state: Literal["running", "paused", "stopped"] = "running"
    salt: str | None = Field(None, min_length=1)
    traffic: Percent = 100
    sample: Percent = 100
    metric: Literal["accuracy"] = "accuracy"
    margin: float = Field(0.01, gt=0, lt=0.5)
    alpha: float = Field(0.05, gt=0, lt=0.5)
    threshold: float | None = Field(None, ge=0, le=1)
    confidence: Confidence = Confidence()
    guardrail: Guardrail = Guardrail()
    ramp: Ramp | None = None

    def problems(self) -> Iterator[str]:
        """What the keys say against each other, for the mode they are in."""
        is_split = self.mode == "split"
        if any((arm.weight is None) is is_split for arm in self.arms):
            yield "arms: " + ("each arm of a split needs a weight" if is_split else f"a {self.mode} has no weights")
        elif is_split and sum(round((arm.weight or 0) * 100) for arm in self.arms) != 10_000:
            yield "arms: the weights must sum to exactly 100"
        if (self.threshold is None) is (self.mode == "cascade"):
            yield "threshold: a cascade needs one, and only a cascade has one"
        if self.mode != "cascade" and "confidence" in self.model_fields_set:
            yield f"confidence: a {self.mode} has none, only a cascade"
        if self.mode != "shadow" and "sample" in self.model_fields_set:
            yield f"sample: a {self.mode} has none, only a shadow"
        if self.ramp is not None and any(a >= b for a, b in pairwise(self.ramp.steps)):
            yield "ramp.steps must rise"


class Storage(Section):
    """Where experiments keep their records. A relative SQLite path starts at the configuration file.

    queue_events: records that may wait for the writer; beyond it they are dropped and counted.
    """

    url: Annotated[str, AfterValidator(_database)] = "sqlite:///secateur.db"
    queue_events: int = Field(10_000, ge=1)
    retention_days: int = Field(90, ge=1)


class Logging(Section):
    """How much is written to the log; lines are JSON."""

    level: Literal["debug", "info", "warning", "error"] = "info"
