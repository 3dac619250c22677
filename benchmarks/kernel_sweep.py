"""Which tiles are fastest at how many tokens per expert: the evidence for the rows of kernels/tiles.py.

For each model and each number of tokens, every candidate with the same number of rows is timed for both products; the
winner is the number of rows whose best two products take least together. Each candidate must first give what the
plain-torch twin gives. Legend: T tokens, K chosen experts per token, P physical experts, D model width, F inner width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import Any
from unittest import mock

import torch

from benchmarks.kernel_cases import Case, LayerWeights, Model, Step, make_layers, make_steps
from benchmarks.kernel_systems import OUR_BOUND, relative_error
from benchmarks.kernel_timing import Ready, Timing, capture, measure
from kernels import reference
from kernels.routing import Routing
from kernels.tiles import PAIR_TILES, PairTile, Tile

# Rows per expert that are measured, and the edge of the band that each stands for: halfway to the next, in logarithms.
ROWS_PER_EXPERT = (2, 6, 12, 24, 48, 96, 192, 512)
GROUPS = {16: 1, 32: 1, 64: 4, 128: 8}

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Timed:
    """One candidate's microseconds per launch."""

    tile: Tile
    timing: Timing


@dataclass(frozen=True)
class Winner:
    """The best pair of tiles at so many rows per expert, and the best pair with another number of rows."""

    rows_per_expert: float
    gate_up: Timed
    down: Timed
    second_us: float

    @property
    def us(self) -> float:
        return self.gate_up.timing.median + self.down.timing.median


def candidates(hopper: bool, accumulators: int) -> list[Tile]:
    """Tiles to try. Those that do not fit in shared memory are dropped when they are compiled; spilling ones lose."""

    def fits(tile: Tile) -> bool:  # at most 128 of a thread's registers for the float32 accumulators
        return tile.rows * tile.columns * accumulators <= 128 * 32 * tile.warps

    if not hopper:
        shapes = product((16, 32, 64, 128), (64, 128), (64,), (4, 8), (3, 4))
        return [tile for tile in (Tile(*shape) for shape in shapes) if fits(tile)]
    swapped = [
        Tile(*shape, swap=True, tma=tma)
        for shape in product((16, 32, 64), (64, 128), (64, 128), (4,), (3, 4))
        for tma in (False, True)
    ]
    plain = [
        Tile(*shape, tma=tma)
        for shape in product((64, 128), (128, 256), (64,), (4, 8), (3, 4))
        for tma in (False, True)
    ]
    return [tile for tile in swapped + plain if fits(tile)]


def winner(rows_per_expert: float, gate_up: Sequence[Timed], down: Sequence[Timed]) -> Winner:
    """Both products walk one tile map, so the two tiles must have equally many rows."""
    best: dict[int, tuple[Timed, Timed]] = {}
    for rows in {timed.tile.rows for timed in gate_up} & {timed.tile.rows for timed in down}:
        best[rows] = (_fastest(gate_up, rows), _fastest(down, rows))
    totals = {rows: sum(timed.timing.median for timed in pair) for rows, pair in best.items()}
    first, *others = sorted(totals, key=lambda rows: totals[rows])
    return Winner(rows_per_expert, *best[first], totals[others[0]] if others else inf)


def _fastest(part: Sequence[Timed], rows: int) -> Timed:
    return min((timed for timed in part if timed.tile.rows == rows), key=lambda timed: timed.timing.median)


def bands(winners: Sequence[Winner], source: str) -> list[str]:
    """Rows for the table: each winner up to the geometric middle to the next; neighbours with equal tiles are one."""
    ordered = sorted(winners, key=lambda w: w.rows_per_expert)
    lines = []
    for here, after in zip(ordered, [*ordered[1:], None], strict=True):
        if after is not None and (after.gate_up.tile, after.down.tile) == (here.gate_up.tile, here.down.tile):
            continue
        edge = "inf" if after is None else f"{(here.rows_per_expert * after.rows_per_expert) ** 0.5:.0f}"
        group = GROUPS[here.gate_up.tile.rows]
        tiles = f"GroupedTiles({code(here.gate_up.tile)}, {code(here.down.tile)}, group={group})"
        times = f"{here.gate_up.timing.median:.1f} + {here.down.timing.median:.1f} us at r = {here.rows_per_expert:g}"
        lines.append(f'Band({edge}, {tiles}, "{source}: {times}, next rows {here.second_us:.1f}"),')
    return lines


def code(tile: Tile) -> str:
    flags = "".join(f", {name}=True" for name in ("swap", "tma") if getattr(tile, name))
    return f"Tile({tile.rows}, {tile.columns}, {tile.depth}, {tile.warps}, {tile.stages}{flags})"


def timed_or_none(runs: Sequence[Call], truth: torch.Tensor, bound: float) -> Ready | None:
    """A candidate ready to be timed, or None if it does not fit on the device or its first output is wrong."""
    from triton.runtime.errors import OutOfResources

    try:
        ready = capture(runs, graphed=True)
    except OutOfResources:
        return None
    return ready if relative_error(ready.outputs[0], truth) <= bound else None


def sweep_tokens(
    steps: Sequence[Step], gate_up_tiles: Sequence[Tile], down_tiles: Sequence[Tile]
) -> tuple[list[Timed], list[Timed]]:
    """Times of every candidate for both products, on the steps' routing."""
    from kernels.grouped_gemm import down, gate_up
    from kernels.sort import sort_pairs

    top_k, num_experts = steps[0].policy.top_k, steps[0].experts.w_in_PGD.shape[0]
    routings = [reference.route(step.logits_TE, step.table_VE, step.policy) for step in steps]
    twin = sort_pairs(routings[0].slot_TK, num_experts, 16)
    h_NF = [_hidden(step, routing) for step, routing in zip(steps, routings, strict=True)]
    true_h = reference.gate_up(steps[0].x_TD, steps[0].experts, twin, top_k, accumulate=torch.float64).double()
    true_y = reference.down(h_NF[0], steps[0].experts, twin, accumulate=torch.float64).double()
    bound = OUR_BOUND[steps[0].x_TD.dtype]
    found: tuple[dict[Tile, Ready], dict[Tile, Ready]] = ({}, {})
    for tile in dict.fromkeys([*gate_up_tiles, *down_tiles]):
        pairs = [sort_pairs(routing.slot_TK, num_experts, tile.rows) for routing in routings]
        group = GROUPS[tile.rows]
        parts: list[tuple[bool, list[Call], torch.Tensor]] = [
            (
                tile in gate_up_tiles,
                [_call(gate_up, s.x_TD, s.experts, p, top_k, tile, group) for s, p in zip(steps, pairs, strict=True)],
                true_h,
            ),
            (
                tile in down_tiles,
                [_call(down, h, s.experts, p, tile, group) for h, s, p in zip(h_NF, steps, pairs, strict=True)],
                true_y,
            ),
        ]
        for (wanted, runs, truth), ready in zip(parts, found, strict=True):
            column = timed_or_none(runs, truth, bound) if wanted else None
            if column is not None:
                ready[tile] = column
    gate_up_times, down_times = (measure(_by_name(part), len(steps)) for part in found)
    return (
        [Timed(tile, gate_up_times[str(tile)]) for tile in found[0]],
        [Timed(tile, down_times[str(tile)]) for tile in found[1]],
    )


def _hidden(step: Step, routing: Routing) -> torch.Tensor:
    """Rows for the second product; their values are of no matter, only that they are not zero."""
    return torch.randn(routing.slot_TK.numel(), step.experts.w_out_PDF.shape[2], device=step.x_TD.device).to(
        step.x_TD.dtype
    )


def _call(function: Callable[..., torch.Tensor], *arguments: Any) -> Call:
    return lambda: function(*arguments)


def _by_name(part: Mapping[Tile, Ready]) -> dict[str, Ready]:
    return {str(tile): ready for tile, ready in part.items()}


def sweep_pair(steps: Sequence[Step]) -> list[tuple[float, PairTile, PairTile]]:
    """(us of both launches, tile of each) of the path without tiles, best first."""
    from kernels.pair import pair_down, pair_gate_up

    routings = [reference.route(step.logits_TE, step.table_VE, step.policy) for step in steps]
    h_NF = [pair_gate_up(step.x_TD, r.slot_TK, step.experts) for step, r in zip(steps, routings, strict=True)]
    calls = {
        "gate_up": [_call(pair_gate_up, s.x_TD, r.slot_TK, s.experts) for s, r in zip(steps, routings, strict=True)],
        "down": [_call(pair_down, h, r, s.experts) for h, r, s in zip(h_NF, routings, steps, strict=True)],
    }
    first = steps[0]
    truths = {
        "gate_up": h_NF[0].double(),
        "down": reference.moe_ffn(first.x_TD.double(), routings[0], first.experts),
    }
    bound, times = OUR_BOUND[first.x_TD.dtype], {name: dict[PairTile, float]() for name in calls}
    for tile in (PairTile(columns, depth, 4) for columns in (4, 8, 16) for depth in (256, 512, 1024)):
        for name, runs in calls.items():
            with mock.patch.dict(PAIR_TILES, {name: tile}):
                ready = timed_or_none(runs, truths[name], bound)
            if ready is not None:
                times[name][tile] = measure({name: ready}, len(steps))[name].median
    pairs = ((up + down, one, two) for one, up in times["gate_up"].items() for two, down in times["down"].items())
    return sorted(pairs, key=lambda triple: triple[0])


def main(models: Sequence[Model]) -> None:
    """Sweep and print; a few minutes for each model, most of it compiling."""
    device = torch.device("cuda")
    hopper = torch.cuda.get_device_capability(device)[0] in (9, 10)
    for model in models:
        layers = make_layers(model, torch.bfloat16, device)
        source = f"swept on {torch.cuda.get_device_name(device)} with {model.name}"
        tiles = candidates(hopper, 2 if model.gated else 1), candidates(hopper, 1)
        with torch.no_grad():
            print(f"\n{model.name}: one token, best three of the path without tiles")
            for us, one, two in sweep_pair(make_steps(Case(model, 1), layers))[:3]:
                print(f"  {us:.1f} us  gate_up {one}  down {two}", flush=True)
            winners = [_sweep_at(rows, model, layers, *tiles) for rows in ROWS_PER_EXPERT]
        print("\n".join(bands(winners, source)), flush=True)


def _sweep_at(rows: int, model: Model, layers: Sequence[LayerWeights], *tiles: Sequence[Tile]) -> Winner:
    tokens = max(rows * model.num_experts // model.top_k, 1)
    # A tile much taller than an expert's rows only pads.
    gate_up, down = ([tile for tile in part if tile.rows <= max(4 * rows, 16)] for part in tiles)
    best = winner(rows, *sweep_tokens(make_steps(Case(model, tokens), layers), gate_up, down))
    print(f"  r = {rows}: {best.us:.1f} us  {code(best.gate_up.tile)}  {code(best.down.tile)}", flush=True)
    return best
