"""EEP: evolution finds the useless expert, by answers of the whole model; and what a router map means.

Legend: T tokens, E experts.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.routing import RouterPolicy
from models.config import LayerShape, ModelConfig
from models.decoder import DecoderLayer, MoEClassifier
from models.errors import PlanError
from models.pruning.method import Job
from models.pruning.methods.eep import EEP, Answers, Genome, crossed, evolve, mutated
from models.pruning.stats import Core, LayerStats

OPTIONS = {option.name: option.default for option in EEP.options}
USELESS = (1, 0)  # by layer


def toy_model() -> MoEClassifier:
    """Two layers of three experts, top-2, of which one per layer puts out nothing."""
    config = ModelConfig(
        family="toy",
        vocab_size=20,
        width=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        expert_width=6,
        dense_width=0,
        shared_width=0,
        top_k=2,
        normalize_top_k=True,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_tokens=8,
        qk_norm="none",
        qkv_bias=False,
        num_labels=3,
        pooling="mean",
        layers=(LayerShape.unpruned(3), LayerShape.unpruned(3)),
    )
    model = MoEClassifier(config, backend="reference").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for index, expert in enumerate(USELESS):
        layer = model.layers[index]
        assert isinstance(layer, DecoderLayer)
        layer.w_out_PDF[expert] = 0.0
    return model


def toy_job(model: MoEClassifier | None = None, rows: int = 60, **changes: Any) -> Job:
    """Counts that mislead: the useless expert is the most frequent."""
    stats = {}
    for layer, useless in enumerate(USELESS):
        n_E = np.array([3, 3, 3], dtype=np.int64)
        n_E[useless] = 9
        sums = {name: n_E.astype(np.float64) for name in ("g_E", "f_E", "f2_E", "gf_E", "gf2_E", "wgf_E", "p_E")}
        core = Core(tokens=np.array(15), n_E=n_E, fmax_E=np.ones(3, dtype=np.float32), **sums)
        stats[layer] = LayerStats(layer, 3, 2, normalize=True, groups=(core,))
    generator = np.random.default_rng(0)
    sequences = tuple(tuple(generator.integers(20, size=5).tolist()) for _ in range(rows))
    options = {**OPTIONS, "population": 16, "generations": 5, "init": "frequency", "fitness": "agreement"}
    job = Job(model or toy_model(), stats, {0: 2, 1: 2}, "zero", options, sequences)
    return replace(job, **changes)


def kept(job: Job) -> dict[int, tuple[int, ...]]:
    return {layer: plan.kept for layer, plan in EEP.plan(job).items()}


def test_the_useless_experts_are_found_within_five_generations() -> None:
    model = toy_model()
    for seed in range(5):
        assert kept(toy_job(model, seed=seed)) == {0: (0, 2), 1: (1, 2)}
    # without generations, and with one candidate only, there is what the counts would keep
    still = {**toy_job(model).options, "population": 1, "generations": 0}
    assert kept(toy_job(model, options=still)) == {0: (0, 1), 1: (0, 1)}


def test_labels_steer_it_as_well_as_the_parents_answers() -> None:
    job = toy_job(rows=12)  # too few to hold any out
    labels = tuple(job.parent.classify(job.sequences).logits_BC.argmin(1).tolist())
    job = replace(job, options={**job.options, "fitness": "accuracy", "generations": 30}, labels=labels)
    answers = Answers(job, [0, 1], np.random.default_rng(0))
    pairs = ((0, 1), (0, 2), (1, 2))
    best = max(((a, b) for a in pairs for b in pairs), key=lambda genome: answers.fitness(answers.plans(genome)))
    assert tuple(kept(job).values()) == best
    assert best != ((0, 2), (1, 2))  # which answers as the parent, never right here
    with pytest.raises(PlanError, match="use fitness=agreement"):
        EEP.plan(replace(job, labels=()))


def test_same_seed_same_plan_and_plans_are_one_hot() -> None:
    job = toy_job(options={**toy_job().options, "init": "random", "generations": 1}, semantics="slice")
    first, second = EEP.plan(job), EEP.plan(job)
    for layer, plan in first.items():
        assert plan.mix_KE.tolist() == second[layer].mix_KE.tolist()
        assert sorted(np.unique(plan.mix_KE).tolist()) == [0, 1]
        assert (plan.semantics, plan.score_E) == ("slice", None)


def test_protected_experts_stay_and_full_layers_have_no_plan() -> None:
    assert kept(toy_job(protect={0: (1,)}))[0] in ((0, 1), (1, 2))
    assert kept(toy_job(protect={0: (1, 2)}))[0] == (1, 2)
    assert kept(toy_job(protect={0: (0, 1), 1: (0, 1)})) == {0: (0, 1), 1: (0, 1)}
    assert kept(toy_job(rows=12, keep={0: 3, 1: 2})) == {1: (1, 2)}
    assert kept(toy_job(keep={0: 3, 1: 3})) == {}
    with pytest.raises(PlanError, match="layer 0 is to keep 2 experts, but more are protected"):
        EEP.plan(toy_job(protect={0: (0, 1, 2)}))


def test_a_search_that_learnt_its_rows_by_heart_is_undone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = toy_job(rows=200)
    answers = Answers(job, [0, 1], np.random.default_rng(0))
    assert (len(answers.held), len(answers.steering)) == (50, 150)
    assert not set(answers.held) & set(answers.steering)
    best, worse = answers.plans(((0, 2), (1, 2))), answers.plans(((0, 1), (0, 1)))
    assert answers.fitness(best)[0] == 1.0 > answers.fitness(worse)[0]
    with caplog.at_level(logging.WARNING, "secateur.pruning"):
        assert answers.confirmed(best, worse, "start is used") is best
        assert not caplog.records
        assert answers.confirmed(worse, best, "start is used") is best
        assert "gained nothing on rows held out, so the start is used" in caplog.text
    answers.wanted_NC[answers.held] = answers.wanted_NC[answers.held].roll(1, 1)
    assert answers.fitness(best)[0] == 1.0  # rows held out have no say in the search
    assert answers.confirmed(best, worse, "start is used") is worse
    monkeypatch.setattr(answers, "_fitness", lambda plans, rows: (0.5, float(plans is best)))
    assert answers.confirmed(best, worse, "start is used") is worse  # more certain, but not right more often


def test_without_rows_it_says_what_to_give() -> None:
    with pytest.raises(PlanError, match="--data"):
        EEP.plan(toy_job(sequences=()))
    with pytest.raises(PlanError, match="population is 0"):
        EEP.plan(toy_job(options={**toy_job().options, "population": 0}))


def test_children_have_distinct_experts_of_their_parents() -> None:
    generator = np.random.default_rng(0)
    first: Genome = ((0, 1, 2, 3), (), (5,))
    second: Genome = ((1, 2, 3, 4), (), (5,))
    seen = set()
    for _ in range(200):
        child = crossed(first, second, generator)
        assert [len(set(ids)) for ids in child] == [4, 0, 1]
        assert set(child[0]) <= {0, 1, 2, 3, 4}
        assert child[0] == tuple(sorted(child[0]))
        seen.add(child[0])
    assert {first[0], second[0]} < seen


def test_mutants_swap_free_experts_only() -> None:
    generator = np.random.default_rng(0)
    start: Genome = ((0, 2), (), (1,))
    free: Genome = ((0, 2, 5, 6), (3,), (1, 4))
    seen = {mutated(start, free, generator) for _ in range(300)}
    assert {layers[1] for layers in seen} == {()}
    assert {layers[2] for layers in seen} == {(1,), (4,)}
    assert {layers[0] for layers in seen} == {(0, 2), (0, 5), (0, 6), (2, 5), (2, 6), (5, 6)}
    assert mutated(((),), ((),), generator) == ((),)


def test_evolution_asks_each_genome_once_and_breaks_ties_by_lower_ids() -> None:
    asked: list[Genome] = []

    def flat(genome: Genome) -> tuple[float, float]:
        asked.append(genome)
        return 0.0, 0.0

    generator, free = np.random.default_rng(0), ((0, 1, 2, 3),)
    start: Genome = ((2, 3),)
    best = evolve(
        start,
        lambda genome: mutated(genome, free, generator),
        lambda first, second: crossed(first, second, generator),
        flat,
        6,
        20,
        generator,
    )
    assert best == ((0, 1),)
    assert len(asked) == len(set(asked)) == 6


@pytest.mark.parametrize(("normalize", "is_slice"), [(True, True), (False, False)])
def test_a_one_hot_router_map_is_slice_if_gates_are_renormalised(normalize: bool, is_slice: bool) -> None:
    """p' = p RM^T over the kept experts, top-2, with or without dividing by the sum of the two."""
    logits_TE = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    kept_K = [0, 2, 3]
    map_KE = torch.eye(5)[kept_K]
    gate_TK, row_TK = (torch.softmax(logits_TE, 1) @ map_KE.T).topk(2)
    if normalize:
        gate_TK = gate_TK / gate_TK.sum(1, keepdim=True)
    table_VE = torch.tensor([[0, -1, 1, 2, -1]])
    routing = reference.route(logits_TE, table_VE, RouterPolicy(2, normalize=normalize, slice=True))
    assert routing.slot_TK.tolist() == row_TK.tolist()
    assert bool((routing.weight_TK - gate_TK).abs().max() < 1e-6) is is_slice
