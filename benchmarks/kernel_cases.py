"""What the kernel benchmark runs: the models' layers, how they are pruned and routed, and in which order.

Legend: T tokens, K chosen experts per token, E router rows of the unpruned layer, P physical experts, D model width,
F expert inner width, G = 2F (F if not gated), S width of all shared experts together. Everything is random: N(0, 1)
inputs and logits, weights N(0, 1) / sqrt(fan-in). Nothing is zero, because products of zeros draw less power and run
faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log

import torch

from benchmarks.kernel_roofline import LayerSize, Work, expected_active, work
from kernels import reference
from kernels.routing import SKIP, Activation, ExpertWeights, RouterPolicy, Routing

TOKENS = (1, 16, 64, 256, 1024, 4096, 32_768)
L2_BYTES = 50 * 2**20


@dataclass(frozen=True)
class Model:
    """One layer of a model. layers: how many with distinct weights are timed one after another."""

    name: str
    width: int
    inner: int
    num_experts: int
    top_k: int
    normalize: bool
    shared: int = 0
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False
    layers: int = 4

    @property
    def size(self) -> LayerSize:
        return LayerSize(self.width, self.inner, 3 if self.gated else 2, self.shared)


MODELS = {
    model.name: model
    for model in (
        Model("Qwen3-30B-A3B", 2048, 768, 128, 8, normalize=True),
        Model("OLMoE-1B-7B", 2048, 1024, 64, 8, normalize=False),
        Model("Mixtral-8x7B", 4096, 14_336, 8, 2, normalize=True, layers=1),
        Model("DeepSeekMoE-16B", 2048, 1408, 64, 6, normalize=False, shared=2),
        Model("V-MoE-B/16", 768, 3072, 8, 2, normalize=False, gated=False, activation="gelu_erf", bias=True, layers=8),
    )
}
GOAL_MODELS = ("Qwen3-30B-A3B", "OLMoE-1B-7B")
# full: nothing pruned. slice: half the experts and their router rows removed. zero: half the experts removed, their
# choices add nothing. uneven: sliced, each layer to another count.
SEMANTICS = ("full", "slice", "zero", "uneven")


@dataclass(frozen=True)
class Case:
    """One row of the result. skewed: logits lean towards few experts, and the least used are the ones pruned."""

    model: Model
    tokens: int
    semantics: str = "full"
    skewed: bool = False

    @property
    def name(self) -> str:
        return f"{self.model.name} T={self.tokens} {self.semantics}{' skewed' if self.skewed else ''}"

    @property
    def kept(self) -> tuple[int, ...]:
        """Surviving experts of each layer, in turn."""
        experts, top_k = self.model.num_experts, self.model.top_k
        if self.semantics == "full":
            return (experts,)
        if self.semantics in ("slice", "zero"):
            return (experts // 2,)
        odd = 37 if experts > 37 else experts // 2 - 1
        return tuple(max(count, top_k) for count in (experts, experts * 3 // 4, experts // 2, odd))

    @property
    def steps(self) -> int:
        """Layers run one after another in one replay, each with inputs of its own.

        Enough that what one step reads has left the L2 cache when its weights come round again, and at least four input
        sets; two where a single one already exceeds the cache many times.
        """
        least = 2 if self.tokens >= 4096 and self.semantics != "uneven" else 4
        return max(least, min(8, ceil(3 * L2_BYTES / self.expected_work().bytes)))

    def expected_work(self) -> Work:
        """The mean over layers if routing were uniform: what the order and the budget go by."""
        works = []
        for kept in self.kept:
            rows = self.model.num_experts if self.semantics == "zero" else kept
            active = expected_active(kept, rows, self.model.top_k, self.tokens)
            pairs = self.tokens * self.model.top_k * kept / rows
            works.append(work(self.model.size, self.tokens, active, pairs))
        return mean_work(works)


def mean_work(works: Sequence[Work]) -> Work:
    """The work of an average step."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Work(
        works[0].tokens,
        mean([w.pairs for w in works]),
        mean([w.bytes for w in works]),
        mean([w.two_launch_bytes for w in works]),
        mean([w.flops for w in works]),
    )


def all_cases(models: Sequence[str] = tuple(MODELS), tokens: Sequence[int] = TOKENS) -> list[Case]:
    """Every case, the most important first, so that a budget cuts from the end.

    First the two models that the goals are stated for, then the others, then skewed routing. Within a rank a model's
    cases stay together, because its weights are made once.
    """

    def cases(names: Sequence[str], semantics: Sequence[str], skewed: bool) -> list[Case]:
        return [
            Case(MODELS[name], count, kind, skewed)
            for name in names
            if name in models
            for kind in semantics
            for count in tokens
        ]

    others = [name for name in MODELS if name not in GOAL_MODELS]
    return [
        *cases(GOAL_MODELS, ("full", "slice", "zero", "uneven"), skewed=False),
        *cases(others, ("full", "slice", "zero"), skewed=False),
        *cases(GOAL_MODELS, ("full", "slice", "zero"), skewed=True),
        *cases(others, ("slice", "zero", "uneven"), skewed=True),
    ]


@dataclass(frozen=True)
class Load:
    """What one step's routing came to: pairs that run an expert, experts that have any, rows of every expert."""

    kept_share: float
    active: int
    rows_P: tuple[int, ...]

    def padded(self, block_rows: int) -> float:
        """Rows of all tiles over rows with a pair; 1 where nothing is tiled or nothing runs."""
        live = sum(self.rows_P)
        return sum(ceil(rows / block_rows) for rows in self.rows_P) * block_rows / live if live else 1.0


def load_of(routing: Routing, num_experts: int) -> Load:
    slot_N = routing.slot_TK.flatten()
    rows_P = torch.bincount(slot_N[slot_N >= 0].long(), minlength=num_experts).tolist()
    return Load(sum(rows_P) / slot_N.numel(), sum(rows > 0 for rows in rows_P), tuple(rows_P))


@dataclass(frozen=True)
class Step:
    """One layer call: what goes in, and the pruned layer it goes through.

    x_TD [T, D]; logits_TE float32 [T, rows of the router]; table_VE int32 [1, rows]. load: what the routing comes to.
    w_shared_GD [2S, D] and w_shared_DS [D, S], or None, are the shared experts as one wide dense expert.
    """

    x_TD: torch.Tensor
    logits_TE: torch.Tensor
    table_VE: torch.Tensor
    policy: RouterPolicy
    experts: ExpertWeights
    load: Load
    w_shared_GD: torch.Tensor | None
    w_shared_DS: torch.Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """Unpruned weights of one layer; pruned ones are views of their first experts."""

    w_in_EGD: torch.Tensor
    w_out_EDF: torch.Tensor
    b_in_EG: torch.Tensor | None
    b_out_ED: torch.Tensor | None
    w_shared_GD: torch.Tensor | None
    w_shared_DS: torch.Tensor | None


def make_layers(model: Model, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[LayerWeights]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, fan_in: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        return values.mul_(fan_in**-0.5)

    width, inner, experts, shared = model.width, model.inner, model.num_experts, model.shared * model.inner
    rows = inner * (2 if model.gated else 1)
    return [
        LayerWeights(
            normal(experts, rows, width, fan_in=width),
            normal(experts, width, inner, fan_in=inner),
            normal(experts, rows, fan_in=1) if model.bias else None,
            normal(experts, width, fan_in=1) if model.bias else None,
            normal(2 * shared, width, fan_in=width) if shared else None,
            normal(width, shared, fan_in=shared) if shared else None,
        )
        for _ in range(model.layers)
    ]


def make_steps(case: Case, layers: Sequence[LayerWeights], seed: int = 0) -> list[Step]:
    """The case's calls, on the layers' device and in their dtype."""
    device, dtype = layers[0].w_in_EGD.device, layers[0].w_in_EGD.dtype
    generator = torch.Generator(device).manual_seed(seed)
    return [
        _step(case, layers[i % len(layers)], case.kept[i % len(case.kept)], generator, device, dtype)
        for i in range(case.steps)
    ]


def _step(
    case: Case, layer: LayerWeights, kept: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Step:
    model, tokens = case.model, case.tokens
    lean_E = popularity(model.num_experts, case.skewed)
    rows, slots = pruned_rows(lean_E, kept, case.semantics)
    logits_TE = torch.empty(tokens, len(rows), device=device).normal_(generator=generator)
    logits_TE += torch.tensor([lean_E[row] for row in rows], device=device)
    x_TD = torch.empty(tokens, model.width, dtype=dtype, device=device).normal_(generator=generator)
    experts = ExpertWeights(
        layer.w_in_EGD[:kept],
        layer.w_out_EDF[:kept],
        b_in_PG=None if layer.b_in_EG is None else layer.b_in_EG[:kept],
        b_out_PD=None if layer.b_out_ED is None else layer.b_out_ED[:kept],
        activation=model.activation,
        gated=model.gated,
    )
    table_VE = torch.tensor([slots], dtype=torch.int32, device=device)
    policy = RouterPolicy(model.top_k, normalize=model.normalize)
    # What calibration would have found; it only guides the choice of tiles.
    load = load_of(reference.route(logits_TE, table_VE, policy), kept)
    experts = replace(experts, kept_share=max(load.kept_share, 0.01))
    return Step(x_TD, logits_TE, table_VE, policy, experts, load, layer.w_shared_GD, layer.w_shared_DS)


def popularity(num_experts: int, skewed: bool) -> list[float]:
    """What is added to each expert's logit: nothing, or minus the logarithm of its rank (Zipf with exponent 1).

    Ranks are spread over the experts by a fixed step that is coprime to any power of two, not laid out in order.
    """
    if not skewed:
        return [0.0] * num_experts
    return [-log(1 + (expert * 5 + 3) % num_experts) for expert in range(num_experts)]


def pruned_rows(lean_E: Sequence[float], kept: int, semantics: str) -> tuple[list[int], list[int]]:
    """(router rows that are left, the slot that each means): the `kept` most popular experts survive, in order."""
    by_popularity = sorted(range(len(lean_E)), key=lambda expert: -lean_E[expert])
    survivors = sorted(by_popularity[:kept])
    if semantics != "zero":
        return survivors, list(range(kept))
    slots = [SKIP] * len(lean_E)
    for slot, expert in enumerate(survivors):
        slots[expert] = slot
    return list(range(len(lean_E))), slots


def measured_work(case: Case, loads: Sequence[Load]) -> Work:
    """The mean step's work with the experts and pairs that this routing really reached."""
    return mean_work([work(case.model.size, case.tokens, load.active, sum(load.rows_P)) for load in loads])
