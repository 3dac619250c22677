"""EEP: evolve keep-sets by how well the whole pruned model answers, then what is merged into them. arXiv 2407.00945.

Legend: N calibration rows, C classes, K experts after, E experts before.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import one_hot

from models.batches import by_length
from models.classifier import Classifier
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.method import Job, Method, Option
from models.pruning.methods.scores import METHODS as SCORES
from models.pruning.plan import FloatArray, LayerPlan, keep_best
from models.pruning.stats import Core

MAX_ROWS = 512
# One row in four judges the result and never steers the search, where there are enough rows to spare.
HELD_OUT = 4
MIN_ROWS_TO_SPLIT = 16
BATCH_TOKENS = 4096
# Standard deviation of what a mutation adds to the shares in a merge.
NOISE = 0.05

INITIAL = {method.name: method.score for method in SCORES if method.score is not None}
log = logging.getLogger("secateur.pruning")

# Per cut layer, the ids that are kept beside the protected ones, ascending.
Genome = tuple[tuple[int, ...], ...]
# Per cut layer, the rows of mix [K, E]: what of each old expert goes into each new one.
Mixes = tuple[tuple[tuple[float, ...], ...], ...]
G = TypeVar("G", Genome, Mixes)
# Share of rows answered as wanted, then the mean log-likelihood of what is wanted, which tells equals apart.
Fitness = tuple[float, float]


def eep(job: Job) -> dict[int, LayerPlan]:
    """Keep-sets of all layers together, by evolution on at most 512 calibration rows.

    The first candidate is what `init` would keep, the others are mutants of it. Every generation adds half a population
    of children: of two fit parents, each new expert is inherited from either; an expert inherited twice gives way to
    one that only a parent has; then experts are swapped for cut ones at random. The fittest survive. fitness=accuracy
    counts right answers, agreement the answers of the unpruned parent. Unless the winner beats `init` on the rows held
    out, the search has learnt its rows by heart: that is logged, and `init`'s keep-sets are returned. Rows that the
    parent was fine-tuned on say little: it knows them, most keep-sets still answer them, and what evolution then finds
    can be worse on new rows than `init`, held-out rows or not.

    This is the paper's first phase, whose one-hot map of router probabilities is `slice` where gates are renormalised.
    merge_generations adds the second: rows of the expert merging matrix, one-hot so far, are moved by Gaussian noise,
    so that cut experts and other kept ones flow into each kept one. What noise adds to a row's others, its own expert
    loses (the sum stays 1), and it stays the greatest; protected experts take and give nothing. The merge too must be
    right more often than what it started from on the rows held out, else it is dropped. The router map
    stays one-hot, while the paper evolves it too: no router of these families can carry a weighted map of its
    probabilities, so such a result could be measured but neither stored nor served.
    Raises PlanError without rows, without their labels under accuracy, for a population below 1, or for fewer
    generations than none.
    """
    layers = [i for i, stats in job.stats.items() if job.keep[i] < stats.num_experts]
    if not layers:
        return {}
    for name, least in (("population", 1), ("generations", 0), ("merge_generations", 0)):
        if job.options[name] < least:
            raise PlanError(f"{name.replace('_', '-')} is {job.options[name]}, must be at least {least}")
    generator = np.random.default_rng(job.seed)
    answers = Answers(job, layers, generator)
    start = tuple(_initial(job, layer, generator) for layer in layers)
    free = tuple(_free(job, layer) for layer in layers)
    winner = evolve(
        start,
        lambda genome: mutated(genome, free, generator),
        lambda first, second: crossed(first, second, generator),
        lambda genome: answers.fitness(answers.plans(genome)),
        job.options["population"],
        job.options["generations"],
        generator,
        lambda done, total: job.progress(done, total, "evolving keep-sets"),
    )
    pruned = answers.plans(start)
    if winner != start:
        pruned = answers.confirmed(answers.plans(winner), pruned, "keep-sets of init are used")
    if not job.options["merge_generations"]:
        return pruned
    return _merged(job, layers, answers, pruned, generator)


def _merged(
    job: Job,
    layers: Sequence[int],
    answers: "Answers",
    pruned: dict[int, LayerPlan],
    generator: np.random.Generator,
) -> dict[int, LayerPlan]:
    """The second phase, from the first's keep-sets."""
    start: Mixes = tuple(tuple(map(tuple, pruned[layer].mix_KE.tolist())) for layer in layers)
    free = tuple(_free(job, layer) for layer in layers)

    def plans(mixes: Mixes) -> dict[int, LayerPlan]:
        return {layer: merging(pruned[layer], np.array(mix_KE)) for layer, mix_KE in zip(layers, mixes, strict=True)}

    winner = evolve(
        start,
        lambda mixes: noised(mixes, free, generator),
        lambda first, second: rows_of_either(first, second, generator),
        lambda mixes: answers.fitness(plans(mixes)),
        job.options["population"],
        job.options["merge_generations"],
        generator,
        lambda done, total: job.progress(done, total, "evolving merges"),
    )
    return pruned if winner == start else answers.confirmed(plans(winner), pruned, "merges are dropped")


def merging(pruned: LayerPlan, mix_KE: FloatArray) -> LayerPlan:
    """The plan with other experts in the kept ones' places; the router chooses as it did."""
    router_mix_KE = pruned.mix_KE if pruned.semantics == "slice" else None
    return replace(pruned, mix_KE=mix_KE, router_mix_KE=router_mix_KE)


def noised(mixes: Mixes, free: Genome, generator: np.random.Generator) -> Mixes:
    """Noise on one row of a random layer; with probability 1/2 on another, and so on. Its sum and its greatest stay."""
    layers = [np.array(mix_KE, dtype=np.float64) for mix_KE in mixes]
    for _ in range(generator.geometric(0.5)):
        layer = generator.integers(len(layers))
        own_K = layers[layer].argmax(1)
        open_rows = np.flatnonzero(np.isin(own_K, free[layer]))
        if not open_rows.size:
            continue
        row = open_rows[generator.integers(open_rows.size)]
        change_E = np.zeros(layers[layer].shape[1])
        change_E[list(free[layer])] = generator.normal(0.0, NOISE, len(free[layer]))
        change_E[own_K[row]] -= change_E.sum()
        new_E = layers[layer][row] + change_E
        if new_E.argmax() == own_K[row]:
            layers[layer][row] = new_E
    return tuple(tuple(map(tuple, mix_KE.tolist())) for mix_KE in layers)


def rows_of_either(first: Mixes, second: Mixes, generator: np.random.Generator) -> Mixes:
    """A child of two merges."""
    return tuple(
        tuple(a if generator.random() < 0.5 else b for a, b in zip(one, other, strict=True))
        for one, other in zip(first, second, strict=True)
    )


class Answers:
    """The pruned model's answers on the calibration rows: some steer the search, those held out judge its result.

    wanted_NC: float64, what each row's class probabilities should be, the label's or the unpruned parent's.
    """

    def __init__(self, job: Job, layers: Sequence[int], generator: np.random.Generator) -> None:
        self.job, self.layers = job, layers
        self.sequences = [ids for ids in job.sequences[:MAX_ROWS] if ids]
        if not self.sequences:
            raise PlanError("eep runs pruned models on task data: give --data FILE")
        if job.options["fitness"] == "agreement":
            self.wanted_NC = torch.softmax(self.logits(job.parent, range(len(self.sequences))).double(), 1)
        elif len(job.labels) == len(job.sequences):
            pairs = zip(job.sequences[:MAX_ROWS], job.labels[:MAX_ROWS], strict=True)
            label_N = torch.tensor([label for ids, label in pairs if ids])
            self.wanted_NC = one_hot(label_N, job.parent.config.num_labels).double()
        else:
            raise PlanError("fitness=accuracy needs the label of every calibration row: use fitness=agreement")
        order = generator.permutation(len(self.sequences)).tolist()
        held = len(order) // HELD_OUT if len(order) >= MIN_ROWS_TO_SPLIT else 0
        self.held, self.steering = order[:held], order[held:]

    def fitness(self, plans: dict[int, LayerPlan]) -> Fitness:
        return self._fitness(plans, self.steering)

    def confirmed(
        self, winner: dict[int, LayerPlan], start: dict[int, LayerPlan], otherwise: str
    ) -> dict[int, LayerPlan]:
        """The winner, or `start` where the winner answers no more of the rows held out."""
        if not self.held:
            return winner
        before, after = (self._fitness(plans, self.held) for plans in (start, winner))
        name = self.job.options["fitness"]
        log.info("eep: %s on %d rows held out: %.4f, at the start %.4f", name, len(self.held), after[0], before[0])
        if after[0] <= before[0]:
            log.warning(
                "eep: evolution gained nothing on rows held out, so the %s: "
                "give more rows, best such that the parent was not trained on",
                otherwise,
            )
            return start
        return winner

    def plans(self, genome: Genome) -> dict[int, LayerPlan]:
        return {layer: _plan(self.job, layer, kept) for layer, kept in zip(self.layers, genome, strict=True)}

    def logits(self, model: Classifier, rows: Sequence[int]) -> torch.Tensor:
        """float32 [N, C], in the order of the rows."""
        sequences = [self.sequences[row] for row in rows]
        logits_NC = torch.empty(len(rows), model.config.num_labels)
        for indices in by_length(sequences, BATCH_TOKENS):
            logits_NC[indices] = model.classify([sequences[i] for i in indices]).logits_BC
        return logits_NC

    def _fitness(self, plans: dict[int, LayerPlan], rows: Sequence[int]) -> Fitness:
        # Whether fewer experts than top-k may stay was settled before there was a job.
        logits_NC = self.logits(apply(self.job.parent, plans, allow_lower_k=True), rows)
        wanted_NC = self.wanted_NC[rows]
        is_right_N = logits_NC.argmax(1) == wanted_NC.argmax(1)
        likelihood_N = (wanted_NC * torch.log_softmax(logits_NC.double(), 1)).sum(1)
        return float(is_right_N.double().mean()), float(likelihood_N.mean())


def evolve(
    start: G,
    mutate: Callable[[G], G],
    cross: Callable[[G, G], G],
    fitness: Callable[[G], Fitness],
    population: int,
    generations: int,
    generator: np.random.Generator,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> G:
    """The fittest genome found. No genome is tried twice. Ties keep the lower ids."""
    fitness_of: dict[G, Fitness] = {start: fitness(start)}

    def ranked() -> list[G]:
        order = sorted(fitness_of, key=lambda genome: (*(-value for value in fitness_of[genome]), genome))
        return order[:population]

    def add(child: G) -> None:
        if child not in fitness_of:
            fitness_of[child] = fitness(child)

    for _ in range(population - 1):
        add(mutate(start))
    for generation in range(generations):
        parents = ranked()
        for _ in range(max(1, population // 2)):
            # The better of two drawn at random, twice.
            first, second = (parents[generator.integers(len(parents), size=2).min()] for _ in range(2))
            add(mutate(cross(first, second)))
        progress(generation + 1, generations)
    return ranked()[0]


def crossed(first: Genome, second: Genome, generator: np.random.Generator) -> Genome:
    """Each slot from either parent; an expert's second copy gives way to one that only a parent has."""
    child = []
    for a, b in zip(first, second, strict=True):
        ids = set(np.where(generator.random(len(a)) < 0.5, a, b).tolist())
        spare = sorted({*a, *b} - ids)
        ids.update(generator.choice(spare, len(a) - len(ids), replace=False).tolist() if len(ids) < len(a) else ())
        child.append(tuple(sorted(ids)))
    return tuple(child)


def mutated(genome: Genome, free: Genome, generator: np.random.Generator) -> Genome:
    """One swap of a kept for a cut expert in a random layer; with probability 1/2 another, and so on."""
    layers = list(genome)
    open_layers = [layer for layer, ids in enumerate(layers) if ids]
    if not open_layers:
        return genome
    for _ in range(generator.geometric(0.5)):
        layer = open_layers[generator.integers(len(open_layers))]
        kept = list(layers[layer])
        cut = sorted(set(free[layer]) - set(kept))
        kept[generator.integers(len(kept))] = cut[generator.integers(len(cut))]
        layers[layer] = tuple(sorted(kept))
    return tuple(layers)


def _free(job: Job, layer: int) -> tuple[int, ...]:
    """The experts that are not protected."""
    return tuple(e for e in range(job.stats[layer].num_experts) if e not in job.protect.get(layer, ()))


def _initial(job: Job, layer: int, generator: np.random.Generator) -> tuple[int, ...]:
    """The free experts that `init` would keep beside the protected ones."""
    name, stats, free = job.options["init"], job.stats[layer], np.array(_free(job, layer), dtype=np.int64)
    score_E = generator.random(stats.num_experts) if name == "random" else INITIAL[name](stats)
    order = free[np.argsort(-score_E[free], kind="stable")]
    count = job.keep[layer] - (stats.num_experts - free.size)
    if count < 0:
        raise PlanError(f"layer {layer} is to keep {job.keep[layer]} experts, but more are protected")
    return tuple(sorted(order[:count].tolist()))


def _plan(job: Job, layer: int, chosen: Sequence[int]) -> LayerPlan:
    kept = (*chosen, *job.protect.get(layer, ()))
    is_kept_E = np.isin(np.arange(job.stats[layer].num_experts), kept)
    return replace(keep_best(is_kept_E, len(kept), job.semantics), score_E=None)


EEP = Method(
    name="eep",
    summary="evolve keep-sets by the pruned model's accuracy on calibration rows (arXiv 2407.00945)",
    plan=eep,
    semantics=("slice", "zero"),
    needs=(Core,),
    options=(
        Option("population", 32, "keep-sets that survive each generation"),
        Option("generations", 50, "rounds of half a population of children"),
        Option("merge_generations", 0, "rounds that merge other experts into the kept ones; 0 leaves them as they are"),
        Option("init", "task-mass", "the method whose keep-sets evolution starts from", (*INITIAL, "random")),
        Option("fitness", "accuracy", "share of right answers, or of the parent's answers", ("accuracy", "agreement")),
    ),
)
