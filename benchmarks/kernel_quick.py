"""Every kernel against its plain-torch twin on small shapes of each family, then every tile compiled ahead of time.

Without a CUDA device the kernels run in Triton's interpreter, in float16 and float32: it multiplies bfloat16 wrongly.
With one they run on it, in bfloat16 and float16. Legend: T tokens, K chosen experts per token, P physical experts.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernel_cases import MODELS, Case, Model, Step, make_layers, make_steps
from benchmarks.kernel_systems import OUR_BOUND, System, oracle, relative_error, tile_layer
from benchmarks.kernel_systems import ours as prepare_ours
from kernels import reference
from kernels.routing import Routing

# Enough tokens for several tiles and a partial one, widths that no tile divides, and fewer experts.
TOKENS, WIDTH, INNER, MAX_EXPERTS, MAX_TOP_K = 20, 72, 40, 8, 3
WEIGHT_BOUND = 2e-6


@dataclass(frozen=True)
class Check:
    """One kernel on one family's layer. error: relative L2, or for whole numbers how many differ."""

    kernel: str
    family: str
    dtype: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN is not


def small(model: Model) -> Model:
    """A layer of the same kind that an interpreter gets through."""
    return replace(
        model,
        width=WIDTH,
        inner=INNER,
        num_experts=min(model.num_experts, MAX_EXPERTS),
        top_k=min(model.top_k, MAX_TOP_K),
        layers=1,
    )


def check_family(model: Model, dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    """Each step of the layer on the twin's inputs, then the whole layer in each semantics."""
    name = str(dtype).removeprefix("torch.")
    layers = make_layers(model, dtype, device)
    step = make_steps(Case(model, TOKENS, "zero"), layers)[0]
    for kernel, error, bound in (*check_routing(step), *check_products(step, OUR_BOUND[dtype])):
        yield Check(kernel, model.name, name, error, bound)
    ours = System("ours", prepare_ours, ours=True)
    for semantics in ("full", "slice", "zero"):
        for tokens, path in ((TOKENS, "layer"), (1, "pair path")):
            step = make_steps(Case(model, tokens, semantics), layers)[0]
            error = relative_error(ours.prepare(step)(), oracle(step))
            yield Check(f"{path} {semantics}", model.name, name, error, ours.bound(step))


def check_routing(step: Step) -> Iterator[tuple[str, float, float]]:
    """(kernel, error, bound) of route and remap in each way of treating survivors, and of sort."""
    from kernels.route import remap, route
    from kernels.sort import sort_pairs

    expected = reference.route(step.logits_TE, step.table_VE, step.policy)
    found = route(step.logits_TE, step.table_VE, step.policy)
    yield from _routing_errors("route", found, expected)
    policy = replace(step.policy, score="sigmoid", slice=True, survivors="one", scale=2.0)
    arguments = (step.logits_TE, step.table_VE, policy)
    yield from _routing_errors("route, sigmoid, slice", route(*arguments), reference.route(*arguments))
    score_TE = torch.softmax(step.logits_TE, dim=-1)
    weight_TK, row_TK = torch.topk(score_TE, step.policy.top_k, dim=-1)
    foreign = (row_TK.to(torch.int32), weight_TK, step.table_VE)
    found = remap(*foreign, survivors="old_sum")
    yield from _routing_errors("remap", found, reference.remap(*foreign, survivors="old_sum"))

    num_experts = step.experts.w_in_PGD.shape[0]
    sorted_pairs = (sort(expected.slot_TK, num_experts, 16) for sort in (sort_pairs, reference.sort_pairs))
    ours, twin = sorted_pairs
    live, tiles = int(twin.offset_Q[-1]), int(twin.num_tiles_1)
    parts = [(ours.order_N[:live], twin.order_N[:live]), (ours.offset_Q, twin.offset_Q)]
    parts += [(ours.num_tiles_1, twin.num_tiles_1)]
    for field in ("tile_expert_M", "tile_row_M", "tile_rows_M"):
        parts.append((getattr(ours, field)[:tiles], getattr(twin, field)[:tiles]))
    yield "sort", float(sum((one != other).sum() for one, other in parts)), 0.0


def _routing_errors(kernel: str, found: Routing, expected: Routing) -> Iterator[tuple[str, float, float]]:
    yield f"{kernel}: slots", float((found.slot_TK != expected.slot_TK).sum()), 0.0
    yield f"{kernel}: weights", float((found.weight_TK - expected.weight_TK).abs().max()), WEIGHT_BOUND


def check_products(step: Step, bound: float) -> Iterator[tuple[str, float, float]]:
    """(kernel, error, bound) of both products and the sum, each fed the twin's input, in the tiles that would run."""
    from kernels.combine import combine
    from kernels.gpu import limits
    from kernels.grouped_gemm import down, gate_up
    from kernels.tiles import choose

    experts, top_k = step.experts, step.policy.top_k
    tiles = choose(tile_layer(step), limits(step.x_TD.device))
    assert tiles is not None, "so many tokens take the path with tiles"
    routing = reference.route(step.logits_TE, step.table_VE, step.policy)
    pairs = reference.sort_pairs(routing.slot_TK, experts.w_in_PGD.shape[0], tiles.gate_up.rows)
    live = int(pairs.offset_Q[-1])
    alive_N = routing.slot_TK.flatten() >= 0
    h_NF = reference.gate_up(step.x_TD, experts, pairs, top_k, accumulate=torch.float64)
    y_ND = reference.down(h_NF, experts, pairs, accumulate=torch.float64)
    out_TD = reference.combine(y_ND.double(), routing, accumulate=torch.float64)

    found = gate_up(step.x_TD, experts, pairs, top_k, tiles.gate_up, tiles.group)
    yield "gate_up", relative_error(found[:live], h_NF[:live].double()), bound
    found = down(h_NF, experts, pairs, tiles.down, tiles.group)
    yield "down", relative_error(found[alive_N], y_ND[alive_N].double()), bound
    yield "combine", relative_error(combine(y_ND, routing), out_TD), bound


def table(checks: list[Check]) -> str:
    """One line per kernel and dtype: the largest error over the families, and any family that failed."""
    lines = [f"{'kernel':32}{'dtype':10}{'error':>9}{'bound':>9}  over {len({c.family for c in checks})} families"]
    for kernel, dtype in dict.fromkeys((check.kernel, check.dtype) for check in checks):
        group = [check for check in checks if (check.kernel, check.dtype) == (kernel, dtype)]
        worst = max(group, key=lambda check: (not check.passed, check.error))
        failed = [check.family for check in group if not check.passed]
        verdict = f"FAIL: {', '.join(failed)}" if failed else "ok"
        lines.append(f"{kernel:32}{dtype:10}{worst.error:9.1e}{worst.bound:9.0e}  {verdict}")
    return "\n".join(lines)


def run_checks(families: list[Model], device: torch.device) -> list[Check]:
    dtypes = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float16, torch.float32)
    return [check for dtype in dtypes for model in families for check in check_family(small(model), dtype, device)]


def main() -> int:
    """Print both tables. Returns the exit status: 1 if anything failed."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel: the decorator reads it
    device = torch.device("cuda" if on_gpu else "cpu")
    print(f"every kernel against its plain-torch twin, {'on the GPU' if on_gpu else 'in the interpreter'}", flush=True)
    with torch.no_grad():
        checks = run_checks(list(MODELS.values()), device)
    print(table(checks), flush=True)
    print("\ncompiled ahead of time (python -m benchmarks.aot has more forms of the same kernels):", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--core"]
    compiled = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=False)
    return 0 if all(check.passed for check in checks) and compiled.returncode == 0 else 1
