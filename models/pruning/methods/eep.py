"""EEP: evolve keep-sets by how well the whole pruned model answers. arXiv 2407.00945.

Legend: N calibration rows, C classes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import one_hot

from models.batches import by_length
from models.classifier import Classifier
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.method import Job, Method, Option
from models.pruning.methods.scores import METHODS as SCORES
from models.pruning.plan import LayerPlan, keep_best
from models.pruning.stats import Core

MAX_ROWS = 512
# One row in four judges the result and never steers the search, where there are enough rows to spare.
HELD_OUT = 4
MIN_ROWS_TO_SPLIT = 16
BATCH_TOKENS = 4096

INITIAL = {method.name: method.score for method in SCORES if method.score is not None}
log = logging.getLogger("secateur.pruning")

# Per cut layer, the ids that are kept beside the protected ones, ascending.
Genome = tuple[tuple[int, ...], ...]
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
    The second phase, which evolves weighted expert merges with a weighted map, is left out: no router of these families
    can carry such a map, so its result could be measured but neither stored nor served.
    Raises PlanError without rows, without their labels under accuracy, or for a population below 1.
    """
    layers = [i for i, stats in job.stats.items() if job.keep[i] < stats.num_experts]
    if not layers:
        return {}
    if job.options["population"] < 1:
        raise PlanError(f"population is {job.options['population']}, must be at least 1")
    generator = np.random.default_rng(job.seed)
    answers = Answers(job, layers, generator)
    start = tuple(_initial(job, layer, generator) for layer in layers)
    winner = evolve(
        start,
        tuple(_free(job, layer) for layer in layers),
        answers.fitness,
        job.options["population"],
        job.options["generations"],
        generator,
        lambda done, total: job.progress(done, total, "evolving keep-sets"),
    )
    return answers.plans(answers.confirmed(winner, start))


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

    def fitness(self, genome: Genome) -> Fitness:
        return self._fitness(genome, self.steering)

    def confirmed(self, winner: Genome, start: Genome) -> Genome:
        """The winner, or `start` where the winner answers no more of the rows held out."""
        if not self.held or winner == start:
            return winner
        before, after = (self._fitness(genome, self.held) for genome in (start, winner))
        name = self.job.options["fitness"]
        log.info("eep: %s on %d rows held out: %.4f, init %.4f", name, len(self.held), after[0], before[0])
        if after[0] <= before[0]:
            log.warning(
                "eep: evolution gained nothing on rows held out, so the keep-sets of init are used: "
                "give more rows, best such that the parent was not trained on"
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

    def _fitness(self, genome: Genome, rows: Sequence[int]) -> Fitness:
        # Whether fewer experts than top-k may stay was settled before there was a job.
        logits_NC = self.logits(apply(self.job.parent, self.plans(genome), allow_lower_k=True), rows)
        wanted_NC = self.wanted_NC[rows]
        is_right_N = logits_NC.argmax(1) == wanted_NC.argmax(1)
        likelihood_N = (wanted_NC * torch.log_softmax(logits_NC.double(), 1)).sum(1)
        return float(is_right_N.double().mean()), float(likelihood_N.mean())


def evolve(
    start: Genome,
    free: Genome,
    fitness: Callable[[Genome], Fitness],
    population: int,
    generations: int,
    generator: np.random.Generator,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Genome:
    """The fittest genome found; free: the experts of each layer to choose from. No genome is tried twice. Ties keep
    the lower ids."""
    fitness_of = {start: fitness(start)}

    def ranked() -> list[Genome]:
        order = sorted(fitness_of, key=lambda genome: (*(-value for value in fitness_of[genome]), genome))
        return order[:population]

    def add(child: Genome) -> None:
        if child not in fitness_of:
            fitness_of[child] = fitness(child)

    for _ in range(population - 1):
        add(mutated(start, free, generator))
    for generation in range(generations):
        parents = ranked()
        for _ in range(max(1, population // 2)):
            # The better of two drawn at random, twice.
            first, second = (parents[generator.integers(len(parents), size=2).min()] for _ in range(2))
            add(mutated(crossed(first, second, generator), free, generator))
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
        Option("init", "task-mass", "the method whose keep-sets evolution starts from", (*INITIAL, "random")),
        Option("fitness", "accuracy", "share of right answers, or of the parent's answers", ("accuracy", "agreement")),
    ),
)
