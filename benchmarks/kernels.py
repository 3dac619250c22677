"""One MoE layer of pruned models on a GPU against transformers, torch and the card's own limits.

    python -m benchmarks.kernels [--minutes 9] [--out runs/kernels.jsonl] [--plot docs/kernels.png]
    python -m benchmarks.kernels --read runs/kernels.jsonl [--plot docs/kernels.png]
    python -m benchmarks.kernels --sweep [--models OLMoE-1B-7B]
    python -m benchmarks.kernels --quick

The first times what people use today and ours, from router logits to the layer's output, on the layers of five models;
nothing is timed whose output is off by more than its bound from the same layer in float64. Every replay of a CUDA graph
runs several layers with distinct weights and inputs, so that nothing waits in the L2 cache; columns take turns, twice.
Rows come in order of importance until the budget is spent, and what was left out is listed. JSON lines are written as
they come, the table is printed last. Exits with 1 if any of our outputs was refused.

--quick needs no GPU: it checks every kernel against its plain-torch twin (in Triton's interpreter where there is no
CUDA device), then compiles every tile ahead of time. --sweep times candidate tiles by tokens per expert and prints the
winners as rows for kernels/tiles.py.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_cases import (
    MODELS,
    TOKENS,
    Case,
    LayerWeights,
    Model,
    Step,
    all_cases,
    make_layers,
    make_steps,
    measured_work,
)
from benchmarks.kernel_report import (
    OURS,
    Row,
    figures,
    format_row,
    plot,
    read_results,
    row_content,
    table,
    write_line,
)
from benchmarks.kernel_roofline import H100, Peaks, floor_seconds
from benchmarks.kernel_systems import COPY_LIMIT_BYTES, copied_bytes, oracle, relative_error, systems, tile_layer
from benchmarks.kernel_timing import capture, measure, measure_peaks

RESULTS = Path("runs/kernels.jsonl")
RESERVE_SECONDS, PRIOR_SECONDS = 10.0, 20.0


class RefusedError(Exception):
    """Our output is wrong, so nothing of this case is timed."""


def gate(outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor], bound: float) -> tuple[float, bool]:
    """(largest relative error over the steps, whether all are within the bound); NaN is not."""
    errors = [relative_error(output, expected) for output, expected in zip(outputs, truth, strict=True)]
    return max(errors), all(error <= bound for error in errors)


def run_case(case: Case, layers: Sequence[LayerWeights], peaks: Peaks) -> Row:
    """Check and time every column of one case. Raises RefusedError if ours is wrong."""
    steps = make_steps(case, layers)
    truth = [oracle(step) for step in steps]
    chosen, other = systems(case)
    ready, errors = {}, {}
    for system in chosen:
        try:
            column = capture([system.prepare(step) for step in steps], system.graphed)
        except torch.cuda.OutOfMemoryError:
            if system.ours:
                raise
            other[system.name] = "ran out of memory"
            torch.cuda.empty_cache()
            continue
        bound = system.bound(steps[0])
        errors[system.name], right = gate(column.outputs, truth, bound)
        if right:
            ready[system.name] = column
        elif system.ours:
            raise RefusedError(f"relative error {errors[OURS]:.1e}, bound {bound:.0e}")
        else:
            other[system.name] = f"is wrong by {errors[system.name]:.1e}, not timed"
    del truth
    times = measure(ready, case.steps)
    loads, path, rows = [step.load for step in steps], *chosen_path(steps[0])
    return Row(
        case=case.name,
        model=case.model.name,
        tokens=case.tokens,
        semantics=case.semantics,
        skewed=case.skewed,
        kept=case.kept,
        dtype=str(steps[0].x_TD.dtype).removeprefix("torch."),
        path=path,
        steps=case.steps,
        kept_share=sum(load.kept_share for load in loads) / len(loads),
        active=sum(load.active for load in loads) / len(loads),
        padded=sum(load.padded(rows) for load in loads) / len(loads),
        times=times,
        errors=errors,
        other=other,
        **figures(measured_work(case, loads), times, peaks, H100),
    )


def chosen_path(step: Step) -> tuple[str, int]:
    """What our dispatch picks for a step: a description, and the rows of a tile (1 on the pair path)."""
    from kernels.gpu import limits
    from kernels.tiles import choose

    tiles = choose(tile_layer(step), limits(step.x_TD.device))
    return ("pair", 1) if tiles is None else (f"{tiles.gate_up} {tiles.down}", tiles.gate_up.rows)


def estimated_seconds(case: Case) -> float:
    """A guess at the time one row takes, for the budget; scaled by what earlier rows really took.

    Per layer call: ours at 60 % of the floor, two columns at a third of it, batched_mm by what it copies (read, then
    written, then read), eager at 60 us for each expert it loops over, all 60 times if short and 30 if long; and the
    check in float64 once, at 40 TFLOP/s.
    """
    work = case.expected_work()
    floor = floor_seconds(work, H100)
    eager = max(2 * floor, 60e-6 * min(case.model.num_experts, case.tokens * case.model.top_k))
    copied = copied_bytes(case) if copied_bytes(case) <= COPY_LIMIT_BYTES else 0
    call = floor / 0.6 + 2 * floor / 0.33 + eager + 3 * copied / 3e12
    repeats = 60 if case.steps * floor < 5e-3 else 30
    return 1.0 + case.steps * (call * repeats + work.flops / 40e12)


class Budget:
    """Seconds to spend. Learns from each row how far the estimates are off.

    Starts as if it had seen PRIOR_SECONDS of right estimates, because first rows also compile kernels.
    """

    def __init__(self, seconds: float, now: float) -> None:
        self.end = now + seconds - RESERVE_SECONDS
        self.estimated, self.spent = PRIOR_SECONDS, PRIOR_SECONDS

    def admits(self, estimate: float, now: float) -> bool:
        return now + estimate * self.spent / self.estimated <= self.end

    def note(self, estimate: float, seconds: float) -> None:
        self.estimated += estimate
        self.spent += seconds


def run_all(cases: Iterable[Case], args: argparse.Namespace, peaks: Peaks, budget: Budget) -> dict[str, Any]:
    """Every case that the budget admits, written as it comes. Returns what was left out and what was refused."""
    left_out: list[str] = []
    refused: dict[str, str] = {}
    held: tuple[Model | None, list[LayerWeights]] = (None, [])
    for case in cases:
        estimate, start = estimated_seconds(case), time.monotonic()
        if not budget.admits(estimate, start):
            left_out.append(case.name)
            continue
        if held[0] != case.model:
            held = (None, [])
            release()
            held = (case.model, make_layers(case.model, torch.bfloat16, torch.device("cuda")))
        try:
            with torch.no_grad():
                row = run_case(case, held[1], peaks)
        except (RefusedError, torch.cuda.OutOfMemoryError) as error:
            refused[case.name] = str(error).splitlines()[0]
            print(f"{case.name}: refused: {refused[case.name]}", file=sys.stderr, flush=True)
        else:
            write_line(args.out, "row", row_content(row))
            print(format_row(row), file=sys.stderr, flush=True)
        release()
        budget.note(estimate, time.monotonic() - start)
    return {"left_out": left_out, "refused": refused}


def release() -> None:
    """Give freed graphs and buffers back before the next case."""
    gc.collect()
    torch.cuda.empty_cache()


def setting(peaks: Peaks) -> dict[str, Any]:
    import transformers
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "driver": first_line(query),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "commit": first_line(["git", "describe", "--always", "--dirty"]),
        "date": time.strftime("%Y-%m-%d"),
        "copy_tbps": round(peaks.bandwidth / 1e12, 3),
        "matmul_tflops": round(peaks.flops / 1e12, 1),
    }


def first_line(command: Sequence[str]) -> str:
    """What a command prints, or "unknown" where it cannot be run."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (result.stdout.splitlines() or ["unknown"])[0]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check every kernel and compile it, time nothing")
    parser.add_argument("--sweep", action="store_true", help="time candidate tiles, print rows for kernels/tiles.py")
    parser.add_argument("--read", type=Path, help="print (and plot) a result file instead of running")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole run's budget")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file, JSON lines; overwritten")
    parser.add_argument("--plot", type=Path, help="draw share of roofline against tokens to this PNG file")
    return parser.parse_args(arguments)


def show(results: Path, picture: Path | None) -> None:
    where, rows, end = read_results(results)
    print(table(where, rows, end))
    if picture is not None:
        plot(rows, picture, f"{where.get('device', '')}, {where.get('date', '')}, commit {where.get('commit', '')}")


def main() -> None:
    start, args = time.monotonic(), parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if args.read:
        show(args.read, args.plot)
        return
    if args.quick:
        from benchmarks import kernel_quick

        sys.exit(kernel_quick.main())
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: only --quick (checks without timing) and --read run on this machine")
    if args.sweep:
        from benchmarks import kernel_sweep

        kernel_sweep.main([MODELS[name] for name in args.models])
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)
    peaks = measure_peaks(torch.device("cuda"))
    write_line(args.out, "setting", setting(peaks))
    end = run_all(all_cases(args.models, args.tokens), args, peaks, Budget(60 * args.minutes, start))
    write_line(args.out, "end", {**end, "seconds": round(time.monotonic() - start)})
    show(args.out, args.plot)
    sys.exit(1 if end["refused"] else 0)


if __name__ == "__main__":
    main()
