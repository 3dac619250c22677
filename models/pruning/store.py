"""Statistics of a whole model in one safetensors file: collected once, read by every method at every ratio.

Arrays are named layers.LAYER.GROUP.FIELD, as in models.pruning.stats; the header says what they are sums of.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.errors import PlanError
from models.manifest import Rows
from models.pruning.stats import DATA_GROUPS, LayerStats, Sample

KEY = "secateur_statistics"
FORMAT = 1
GROUPS: Mapping[str, type] = {group.__name__.lower(): group for group in DATA_GROUPS}


class Meta(BaseModel):
    """What statistics are sums of. data: the calibration rows, one entry per shard; kind: the router's score function;
    dtype: of the activations; seed and sample: of the tokens that were sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent_sha256: str
    data: tuple[Rows, ...]
    kind: str
    top_k: int
    normalize: bool
    dtype: str
    seed: int
    sample: int

    @property
    def rows(self) -> Rows:
        """All shards as one entry, for a manifest."""
        if len(self.data) == 1:
            return self.data[0]
        name = "+".join(part.name for part in self.data)
        digest = hashlib.sha256("\n".join(part.sha256 for part in self.data).encode()).hexdigest()
        return Rows(name=name, rows=sum(part.rows for part in self.data), sha256=digest)


@dataclass(frozen=True)
class Stored:
    """layers: statistics by MoE layer, with groups that data filled only."""

    meta: Meta
    layers: Mapping[int, LayerStats]

    def groups(self) -> set[type]:
        """The groups that every layer has."""
        found = [{type(group) for group in stats.groups} for stats in self.layers.values()]
        return set.intersection(*found) if found else set()


def save(file: Path, stored: Stored) -> None:
    """Write the file whole or not at all, in place of an older one."""
    arrays, shapes = {}, {}
    for layer, stats in stored.layers.items():
        shapes[layer] = {"num_experts": stats.num_experts, "groups": [type(g).__name__.lower() for g in stats.groups]}
        for group in stats.groups:
            for f in fields(group):
                name = f"layers.{layer}.{type(group).__name__.lower()}.{f.name}"
                arrays[name] = np.asarray(getattr(group, f.name), order="C")
    # One entry, as safetensors writes several in an order of their own every time.
    header = {KEY: json.dumps({"format": FORMAT, "meta": stored.meta.model_dump(mode="json"), "layers": shapes})}
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(handle)
    try:
        save_file(arrays, temporary, metadata=header)
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(file: Path) -> Stored:
    """Raises PlanError for a file that is absent, no statistics of ours, or damaged."""
    if not file.is_file():
        raise PlanError(f"{file} is missing: `secateur prune --stats FILE` writes one")
    try:
        with safe_open(file, framework="numpy") as handle:
            header = json.loads((handle.metadata() or {}).get(KEY, "{}"))
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, a handle is no dict
        if header.get("format") != FORMAT:
            raise PlanError(f"{file.name} holds no statistics of this version: remove it to calibrate anew")
        meta = Meta.model_validate(header["meta"])
        layers = {
            int(layer): LayerStats(
                layer=int(layer),
                num_experts=shape["num_experts"],
                top_k=meta.top_k,
                seed=meta.seed,
                normalize=meta.normalize,
                groups=tuple(_group(name, f"layers.{layer}.{name}.", arrays) for name in shape["groups"]),
            )
            for layer, shape in header["layers"].items()
        }
    except PlanError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{file.name} is damaged ({error}): remove it to calibrate anew") from None
    return Stored(meta, layers)


def merge(parts: Iterable[Stored]) -> Stored:
    """The statistics of several shards of rows as if they had been collected in one pass.

    Raises PlanError if they are not of the same parent, settings and groups, or if two share a shard.
    """
    return reduce(_merged, parts)


def refuse_other(file: Path, found: Meta, wanted: Meta, sampled: bool) -> None:
    """Raises PlanError naming the first difference. The seed and size of the sample matter where it is used only."""
    matters = {"seed", "sample"} if sampled else set()
    for name in Meta.model_fields:
        if name in {"seed", "sample"} - matters or getattr(found, name) == getattr(wanted, name):
            continue
        problem = REASONS.get(name, f"{name} is {getattr(found, name)}, now it is {getattr(wanted, name)}")
        raise PlanError(f"{file.name}: {problem}: give another --stats FILE, or remove it to calibrate anew")


REASONS = {
    "parent_sha256": "these statistics are of another parent checkpoint",
    "data": "these statistics are of other calibration rows",
}


def _merged(a: Stored, b: Stored) -> Stored:
    for name in Meta.model_fields:
        if name != "data" and getattr(a.meta, name) != getattr(b.meta, name):
            problem = f"{name} is {getattr(a.meta, name)} in one and {getattr(b.meta, name)} in the other"
            raise PlanError(f"these statistics cannot be merged: {problem}")
    if {part.sha256 for part in a.meta.data} & {part.sha256 for part in b.meta.data}:
        raise PlanError("these statistics cannot be merged: both count the same rows")
    if a.layers.keys() != b.layers.keys() or a.groups() != b.groups():
        raise PlanError("these statistics cannot be merged: they hold different layers or groups")
    layers = {}
    for layer, mine in a.layers.items():
        theirs = {type(group): group for group in b.layers[layer].groups}
        layers[layer] = replace(mine, groups=tuple(group + theirs[type(group)] for group in mine.groups))
    data = tuple(sorted((*a.meta.data, *b.meta.data), key=lambda part: part.sha256))
    return Stored(a.meta.model_copy(update={"data": data}), layers)


def _group(name: str, prefix: str, arrays: Mapping[str, Any]) -> Any:
    group = GROUPS[name]
    values = {f.name: arrays[prefix + f.name] for f in fields(group)}
    return group(**values | ({"size": int(values["size"])} if group is Sample else {}))
