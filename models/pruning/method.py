"""What a pruning method is: a function from a job to one plan per layer, and what it has to be given."""

import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from models.classifier import Classifier
from models.config import Semantics
from models.errors import PlanError
from models.progress import Progress, silent
from models.pruning.guards import plan_around
from models.pruning.plan import FloatArray, LayerPlan
from models.pruning.stats import DATA_GROUPS, LayerStats

Value = bool | int | float | str


@dataclass(frozen=True)
class Job:
    """One cut to be planned.

    keep       experts that each MoE layer shall have afterwards.
    protect    experts that stay, each by itself, whatever they score.
    exempt     layers that stay as they are; they keep all experts.
    sequences  items of the calibration rows, token ids or images; labels: their class indices. Empty without data.
    options    the method's own, checked and complete.
    parent_sha256  names the checkpoint, for methods that read statistics from files of their own.
    """

    parent: Classifier
    stats: Mapping[int, LayerStats]
    keep: Mapping[int, int]
    semantics: Semantics
    options: Mapping[str, Any] = field(default_factory=dict)
    sequences: tuple[Sized, ...] = ()
    labels: tuple[int, ...] = ()
    seed: int = 0
    progress: Progress = silent
    protect: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    exempt: tuple[int, ...] = ()
    parent_sha256: str = ""


@dataclass(frozen=True)
class Option:
    """A method's own setting: `--option NAME=VALUE`, with `_` or `-` in the name. The default's type is its type.

    needs: groups of statistics that plan reads for some of the choices only. names_files: the value is one or more
    paths, separated by commas.
    """

    name: str
    default: Value
    help: str
    choices: tuple[str, ...] = ()
    needs: Mapping[str, tuple[type, ...]] = field(default_factory=dict)
    names_files: bool = False

    def read(self, text: str) -> Value:
        """The value that a text stands for. Raises ValueError saying what it must be."""
        kind = type(self.default)
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"one of {', '.join(self.choices)}")
            return text
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError("true or false")
            return text.lower() == "true"
        try:
            value: Value = kind(text)
        except ValueError:
            raise ValueError("an integer" if kind is int else "a number") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a finite number")
        return value


@dataclass(frozen=True)
class Method:
    """semantics: what cut experts may mean, the default first. needs: the groups of statistics that plan always reads.

    score: float64 [E] of one layer, higher is kept, for allocations that compare layers; None if there is none.
    keeps_all: experts get smaller instead of fewer, so that all must be kept. allocation: how layers share a total
    unless the user says otherwise, see `allocate`.
    """

    name: str
    summary: str
    plan: Callable[[Job], dict[int, LayerPlan]]
    semantics: tuple[Semantics, ...]
    needs: tuple[type, ...] = ()
    options: tuple[Option, ...] = ()
    score: Callable[..., FloatArray] | None = None
    keeps_all: bool = False
    allocation: str = "uniform"

    @property
    def needs_data(self) -> bool:
        return bool(set(self.needs) & set(DATA_GROUPS))

    def read_options(self, given: Mapping[str, str]) -> dict[str, Value]:
        """All of the method's options by name, the defaults where none was given, `-` and `_` alike.

        Raises PlanError naming the method, the option and what is allowed.
        """
        known = {option.name.replace("-", "_"): option for option in self.options}
        values = {name: option.default for name, option in known.items()}
        for name, text in given.items():
            key = name.replace("-", "_")
            if key not in known:
                takes = f"its options are {', '.join(_shown(o) for o in known)}" if known else "it has no options"
                raise PlanError(f"{self.name} has no option {name!r}: {takes}")
            try:
                values[key] = known[key].read(text)
            except ValueError as error:
                raise PlanError(f"{self.name}: option {_shown(key)} is {text!r}, must be {error}") from None
        return values

    def recorded(self, options: Mapping[str, Value]) -> dict[str, Value]:
        """The options as a manifest keeps them: of files the names alone, since a checkpoint travels."""
        files = {o.name.replace("-", "_") for o in self.options if o.names_files}
        return {
            name: ",".join(Path(path.strip()).name for path in str(value).split(",")) if name in files else value
            for name, value in options.items()
        }

    def needed(self, options: Mapping[str, Value]) -> set[type]:
        """The groups of statistics that plan reads with these options."""
        chosen = (o.needs.get(str(options[o.name.replace("-", "_")]), ()) for o in self.options)
        return {*self.needs, *(group for groups in chosen for group in groups)}


def each_layer(plan: Callable[..., LayerPlan]) -> Callable[[Job], dict[int, LayerPlan]]:
    """Lift plan(stats, keep, semantics, **options) to a whole job; layers that keep every expert stay out.

    What is wrong with one layer is raised as a PlanError that names it.
    """

    def planned(job: Job) -> dict[int, LayerPlan]:
        plans = {}
        for layer, stats in job.stats.items():
            if job.keep[layer] < stats.num_experts:
                work = partial(plan, semantics=job.semantics, **job.options)
                try:
                    plans[layer] = plan_around(work, stats, job.keep[layer], job.protect.get(layer, ()))
                except PlanError as error:
                    where = f"layer {layer}"
                    raise error if where in str(error) else PlanError(f"{where}: {error}") from None
        return plans

    return planned


def _shown(key: str) -> str:
    return key.replace("_", "-")
