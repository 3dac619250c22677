"""How many experts each layer keeps: a count, a ratio, a list or a budget in bytes; alike everywhere or by score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from kernels.routing import FIRST_CONSTANT, SKIP
from models.architecture import layer_parameters, outer_parameters
from models.config import LayerShape, ModelConfig, Semantics
from models.errors import PlanError
from models.pruning.plan import FloatArray

AllocationName = Literal["uniform", "global"]
ALLOCATIONS: tuple[str, ...] = get_args(AllocationName)


@dataclass(frozen=True)
class Budget:
    """Keep as much as fits: the child's stored weights take at most so many bytes."""

    bytes: int


# A count for every layer, a fraction of each layer's experts, a count for each MoE layer in turn, or a budget.
Keep = int | float | tuple[int, ...] | Budget


@dataclass(frozen=True)
class Rules:
    """What limits how a request is met.

    allocation    uniform: every layer alike. global: the layers share one total, by the method's scores. None: the
                  method's own choice.
    exempt        layers that keep all their experts.
    protect       experts by layer that stay, each by itself.
    allow_lower_k fewer experts than each token chooses may stay; under slice, tokens then choose that many.
    keep_super    experts whose activations dwarf all others are protected too.
    """

    allocation: str | None = None
    exempt: tuple[int, ...] = ()
    protect: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    allow_lower_k: bool = False
    keep_super: bool = True

    def check(self, config: ModelConfig) -> None:
        """Raises PlanError for a layer or an expert that the model does not have."""
        if self.allocation not in (None, *ALLOCATIONS):
            raise PlanError(f"allocation is {self.allocation!r}, must be one of {', '.join(ALLOCATIONS)}")
        for layer in (*self.exempt, *self.protect):
            if layer not in config.moe_layers:
                raise PlanError(f"layer {layer} has no experts; those that have are {_listed(config.moe_layers)}")
        for layer, experts in self.protect.items():
            for expert in experts:
                if not 0 <= expert < config.layers[layer].num_rows:
                    raise PlanError(
                        f"layer {layer} has no expert {expert}, they are 0 to {config.layers[layer].num_rows - 1}"
                    )


def allocate(
    config: ModelConfig,
    keep: Keep,
    semantics: Semantics,
    rules: Rules,
    bytes_each: int,
    score: Callable[[int], FloatArray] | None = None,
    protect: Mapping[int, tuple[int, ...]] | None = None,
) -> dict[int, int]:
    """Experts to keep in each MoE layer.

    bytes_each: of one stored parameter. score: a layer's scores, higher is kept, for the global allocation. protect:
    instead of rules.protect, whose layers keep at least so many.
    Raises PlanError for a request that these layers cannot meet, or would only with fewer experts than top-k.
    """
    protect = rules.protect if protect is None else protect
    total_E = {layer: config.layers[layer].num_rows for layer in config.moe_layers}
    open_layers = [layer for layer in total_E if layer not in rules.exempt]
    lowest = {
        layer: max(1 if rules.allow_lower_k else config.top_k, len(protect.get(layer, ()))) for layer in open_layers
    }

    def uniform(count: int) -> dict[int, int]:
        return total_E | {layer: min(count, total_E[layer]) for layer in open_layers}

    def spread(count: int) -> dict[int, int]:
        if score is None:
            raise PlanError("this method ranks experts within a layer only: use the uniform allocation")
        return total_E | share_out({layer: score(layer) for layer in open_layers}, count, lowest, protect)

    if isinstance(keep, Budget):
        size = _size_of(config, semantics, bytes_each)
        if rules.allocation == "global":
            counts = range(sum(total_E[i] for i in open_layers), sum(lowest.values()) - 1, -1)
            return spread(_largest(counts, lambda n: size(total_E | _any_spread(total_E, lowest, n)), keep.bytes))
        tallest, floor = max((total_E[i] for i in open_layers), default=0), max(lowest.values(), default=0)
        return uniform(_largest(range(tallest, floor - 1, -1), lambda n: size(uniform(n)), keep.bytes))

    if isinstance(keep, tuple):
        counts_E = _listed_counts(keep, total_E, rules.exempt)
    elif isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise PlanError(f"keep is {keep}, must be a fraction above 0 and up to 1, or a count")
        counts_E = total_E | {layer: round(keep * total_E[layer]) for layer in open_layers}
    else:
        counts_E = total_E | dict.fromkeys(open_layers, keep)
    for layer in open_layers:
        _check_count(layer, counts_E[layer], total_E[layer], config.top_k, rules.allow_lower_k)
    if rules.allocation == "global":
        if isinstance(keep, tuple):
            raise PlanError("a count for each layer leaves nothing to allocate: give one count, a ratio or a budget")
        return spread(sum(counts_E[layer] for layer in open_layers))
    return counts_E


def share_out(
    score: Mapping[int, FloatArray],
    total: int,
    floor: Mapping[int, int],
    protect: Mapping[int, tuple[int, ...]] | None = None,
) -> dict[int, int]:
    """Split `total` experts over layers: each layer's best `floor` come first, then the best shares anywhere.

    A share is score / sum of the layer's scores; ties go to the lower layer, then the lower expert. Protected experts
    are the first of their layers. Raises PlanError for a negative or non-finite score, or if the floors exceed the
    total.
    """
    if sum(floor[layer] for layer in score) > total:
        raise PlanError(
            f"{total} experts in all are fewer than the {sum(floor.values())} that the layers need at least"
        )
    counts, queue = {}, []
    for layer, score_E in score.items():
        if not np.isfinite(score_E).all():
            expert = int(np.flatnonzero(~np.isfinite(score_E))[0])
            raise PlanError(f"layer {layer}: score of expert {expert} is not finite")
        if (score_E < 0).any():
            raise PlanError(
                f"layer {layer}: scores below 0 have no share of their sum, so layers cannot be compared: "
                "use the uniform allocation"
            )
        share_E = score_E / score_E.sum() if score_E.sum() > 0 else np.zeros(len(score_E))
        first_E = np.isin(np.arange(len(score_E)), (protect or {}).get(layer, ()))
        order = np.lexsort((np.arange(len(score_E)), -share_E, ~first_E))
        counts[layer] = min(floor[layer], len(score_E))
        queue += [(-float(share_E[e]), layer, int(e)) for e in order[counts[layer] :]]
    for _, layer, _ in sorted(queue)[: total - sum(counts.values())]:
        counts[layer] += 1
    return counts


def stored_parameters(config: ModelConfig, keep: Mapping[int, int], semantics: Semantics) -> int:
    """Parameters of the child that keeps so many experts: pruning, tying or averaging, without further compression."""
    shapes = list(config.layers)
    for layer, count in keep.items():
        cut = config.layers[layer].num_rows - count
        if semantics == "slice":
            shapes[layer] = LayerShape.unpruned(count)
        elif cut:
            constants = tuple(FIRST_CONSTANT - i for i in range(cut)) if semantics == "constant" else (SKIP,) * cut
            shapes[layer] = LayerShape(count, (*range(count), *constants))
    child = replace(config, layers=tuple(shapes))
    sizes: list[Any] = [*outer_parameters(child).values()]
    for layer in range(config.num_layers):
        sizes += layer_parameters(child, layer).values()
    return sum(int(np.prod(size)) for size in sizes)


def _size_of(config: ModelConfig, semantics: Semantics, bytes_each: int) -> Callable[[Mapping[int, int]], int]:
    return lambda keep: stored_parameters(config, keep, semantics) * bytes_each


def _largest(counts: range, size: Callable[[int], int], limit: int) -> int:
    """The first count, from the largest down, whose child fits."""
    for count in counts:
        if size(count) <= limit:
            return count
    if not counts:
        raise PlanError("every layer is exempt: nothing is left to cut")
    raise PlanError(f"{limit} bytes are too few: the smallest child of these rules takes {size(counts[-1])}")


def _any_spread(total_E: Mapping[int, int], lowest: Mapping[int, int], total: int) -> dict[int, int]:
    """Some counts with this sum: an expert takes the same bytes in every layer."""
    counts, left = dict(lowest), total - sum(lowest.values())
    for layer in counts:
        more = min(left, total_E[layer] - counts[layer])
        counts[layer] += more
        left -= more
    return counts


def _listed_counts(keep: tuple[int, ...], total_E: Mapping[int, int], exempt: Sequence[int]) -> dict[int, int]:
    if len(keep) != len(total_E):
        raise PlanError(f"keep lists {len(keep)} counts, the model has {len(total_E)} layers with experts")
    counts = dict(zip(total_E, keep, strict=True))
    for layer in exempt:
        if counts[layer] != total_E[layer]:
            raise PlanError(
                f"layer {layer} is exempt and keeps all {total_E[layer]} experts, keep says {counts[layer]}"
            )
    return counts


def _check_count(layer: int, count: int, total: int, top_k: int, allow_lower_k: bool) -> None:
    """Under `slice` the router must fill its choices; under `zero` a token would too often lose all of them."""
    if count > total:
        raise PlanError(f"keep is {count}, but layer {layer} has only {total} experts")
    if count < 1:
        raise PlanError(f"keep is {count} in layer {layer}, at least one expert must stay")
    if count < top_k and not allow_lower_k:
        raise PlanError(
            f"keep is {count}, fewer than the top-{top_k} experts each token chooses: keep more, or allow a lower k"
        )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
