"""Timing on a CUDA device: graph replays between events, columns taken in turns, the card's own peaks.

Nothing here runs without CUDA except the arithmetic on the samples.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernel_roofline import Peaks

ROUNDS = 2
# Per round. Longer replays vary less and cost more: two rounds give at least 10 warm-ups and 20 samples either way.
SHORT_MS = 20.0
SHORT, LONG = (10, 20), (5, 10)  # (warm-ups, samples)
COPY_BYTES, SQUARE = 8_000_000_000, 8192


@dataclass(frozen=True)
class Timing:
    """Microseconds per step (one layer call). medians: of each round."""

    median: float
    p10: float
    p90: float
    medians: tuple[float, ...]
    graphed: bool

    @property
    def spread(self) -> float:
        """How far two measurements of the same thing lay apart."""
        return max(self.medians) - min(self.medians)


def summarize(rounds: Sequence[Sequence[float]], steps: int, graphed: bool) -> Timing:
    """rounds: milliseconds of each replay of `steps` layer calls, by round."""
    samples = sorted(ms * 1e3 / steps for samples in rounds for ms in samples)
    cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    medians = tuple(statistics.median(ms) * 1e3 / steps for ms in rounds)
    return Timing(statistics.median(samples), cuts[0], cuts[-1], medians, graphed)


def is_noise(one: Timing, other: Timing) -> bool:
    """Whether two versions differ by less than repeated measurements of either."""
    return abs(one.median - other.median) <= max(one.spread, other.spread)


@dataclass(frozen=True)
class Ready:
    """A column that can be replayed. outputs: what each step wrote in the last replay."""

    replay: Callable[[], Any]
    outputs: list[torch.Tensor]
    graphed: bool


def capture(runs: Sequence[Callable[[], torch.Tensor]], graphed: bool) -> Ready:
    """All steps in one CUDA graph, or called one after another where a column waits for the device.

    A column that should be capturable and is not raises: a silent fall back would time something else.
    """
    outputs: list[torch.Tensor] = []

    def call() -> None:
        outputs[:] = [run() for run in runs]

    if not graphed:
        call()
        torch.cuda.synchronize()
        return Ready(call, outputs, graphed=False)
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles kernels and fills the libraries' caches, which must not happen in a capture
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    outputs.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return Ready(graph.replay, outputs, graphed=True)


def replay_ms(replay: Callable[[], Any], warm_ups: int, samples: int) -> list[float]:
    """Milliseconds of each replay. Warm-ups run right before, so that the queue never runs dry between the events."""
    starts, ends = ([_event() for _ in range(samples)] for _ in range(2))
    for _ in range(warm_ups):
        replay()
    for start, end in zip(starts, ends, strict=True):
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in zip(starts, ends, strict=True)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(ready: dict[str, Ready], steps: int) -> dict[str, Timing]:
    """Every column in turn, then every column again."""
    counts = {}
    for name, column in ready.items():
        probe = min(replay_ms(column.replay, 1, 2))
        counts[name] = SHORT if probe < SHORT_MS else LONG
    rounds: dict[str, list[list[float]]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, column in ready.items():
            rounds[name].append(replay_ms(column.replay, *counts[name]))
    return {name: summarize(rounds[name], steps, ready[name].graphed) for name in ready}


def measure_peaks(device: torch.device) -> Peaks:
    """The card's copy bandwidth (bytes read plus written, 8 GB) and bf16 rate (8192^3, random data), here and now."""
    bandwidth = 2 * COPY_BYTES / _copy_seconds(device)
    flops = 2 * SQUARE**3 / _matmul_seconds(device)
    torch.cuda.empty_cache()
    return Peaks(bandwidth, flops)


def _copy_seconds(device: torch.device) -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return statistics.median(replay_ms(lambda: target.copy_(source), 10, 20)) / 1e3


def _matmul_seconds(device: torch.device) -> float:
    one, other = (torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = torch.empty_like(one)
    return statistics.median(replay_ms(lambda: torch.mm(one, other, out=product), 10, 20)) / 1e3
