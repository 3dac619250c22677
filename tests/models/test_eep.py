"""EEP: evolution finds the useless expert, by answers of the whole model; and what a router map means.

Legend: T tokens, E experts.
"""

import logging
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.routing import RouterPolicy
from models.config import LayerShape, ModelConfig
from models.decoder import DecoderLayer, MoEClassifier
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.guards import is_alone
from models.pruning.method import Job
from models.pruning.methods.eep import (
    EEP,
    Answers,
    Genome,
    Mixes,
    crossed,
    evolve,
    merging,
    mutated,
    noised,
    rows_of_either,
)
from models.pruning.plan import keep_best
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


KEPT_1_AND_3: Mixes = (((0, 1, 0, 0), (0, 0, 0, 1)),)


def test_noise_keeps_sums_owners_and_the_protected() -> None:
    generator = np.random.default_rng(0)
    mixes, changed = KEPT_1_AND_3, set()
    for _ in range(400):
        before, mixes = mixes, noised(mixes, ((0, 2, 3),), generator)
        (mix_KE,) = mixes
        assert np.array(mix_KE).sum(1) == pytest.approx([1, 1], abs=1e-12)
        assert np.array(mix_KE).argmax(1).tolist() == [1, 3]
        assert mix_KE[0] == KEPT_1_AND_3[0][0]  # expert 1 is protected: it takes nothing
        assert mix_KE[1][1] == 0  # nor gives
        changed |= {e for e in range(4) if mix_KE[1][e] != before[0][1][e]}
    assert changed == {0, 2, 3}
    assert min(mixes[0][1]) < 0  # shares may be negative
    assert noised(KEPT_1_AND_3, ((),), generator) == KEPT_1_AND_3
    near: Mixes = (((0.24, 0.26, 0.25, 0.25),),)  # where most noise would make another the greatest
    moved = {noised(near, ((0, 1, 2, 3),), generator) for _ in range(50)}
    assert len(moved) > 1
    assert {int(np.array(mixes[0]).argmax()) for mixes in moved} == {1}


def test_children_have_each_row_from_either_parent() -> None:
    other: Mixes = (((0.2, 0.8, 0, 0), (0, 0.1, 0, 0.9)),)
    found = {rows_of_either(KEPT_1_AND_3, other, np.random.default_rng(seed)) for seed in range(30)}
    assert found == {((a, b),) for a in (KEPT_1_AND_3[0][0], other[0][0]) for b in (KEPT_1_AND_3[0][1], other[0][1])}


def test_evolution_of_merges_nears_a_known_optimum() -> None:
    target_KE, generator = np.array([[0.3, 0.6, 0.1, 0.0], [-0.1, 0.2, 0.2, 0.7]]), np.random.default_rng(0)

    def distance(mixes: Mixes) -> float:
        return float(np.abs(np.array(mixes[0]) - target_KE).sum())

    best = evolve(
        KEPT_1_AND_3,
        lambda mixes: noised(mixes, ((0, 1, 2, 3),), generator),
        lambda first, second: rows_of_either(first, second, generator),
        lambda mixes: (-distance(mixes), 0.0),
        16,
        80,
        generator,
    )
    assert distance(KEPT_1_AND_3) == pytest.approx(1.6)
    assert distance(best) < 0.2  # .08 when written


@pytest.mark.parametrize("semantics", ["zero", "slice"])
def test_a_merge_changes_experts_and_not_what_the_router_means(semantics: Any) -> None:
    """By hand: 3/4 of expert 0 and 1/4 of expert 1, and 5/4 of expert 2 less 1/4 of expert 0."""
    model = toy_model()
    pruned = keep_best([2, 0, 1], 2, semantics)
    plan = merging(pruned, np.array([[0.75, 0.25, 0.0], [-0.25, 0.0, 1.25]]))
    models = (model, apply(model, {1: plan}), apply(model, {1: pruned}))
    old, new, cut = (cast(DecoderLayer, m.layers[1]) for m in models)
    for name in ("w_in_PGD", "w_out_PDF"):
        w_E, merged_K = getattr(old, name), getattr(new, name)
        torch.testing.assert_close(merged_K[0], 0.75 * w_E[0] + 0.25 * w_E[1])
        torch.testing.assert_close(merged_K[1], 1.25 * w_E[2] - 0.25 * w_E[0])
    assert torch.equal(new.w_router_ED, cut.w_router_ED)
    assert torch.equal(new.table_VE, cut.table_VE)
    assert plan.kept == (0, 2)


def merge_job(rows: int = 12, **changes: Any) -> Job:
    """Keep-sets are given by what is protected and the seed."""
    job = toy_job(rows=rows, keep={0: 2, 1: 2}, **changes)
    return replace(job, options={**job.options, "generations": 0, "population": 8, "init": "random"})


@pytest.mark.parametrize("semantics", ["zero", "slice"])
def test_the_second_phase_answers_better_than_the_first(semantics: Any) -> None:
    job = merge_job(semantics=semantics, protect={0: (1,), 1: (0,)})  # so that the useless experts stay
    told: list[tuple[int, int, str]] = []
    on = {**job.options, "merge_generations": 15}
    pruned, merged = EEP.plan(job), EEP.plan(replace(job, options=on, progress=lambda *args: told.append(args)))
    answers = Answers(job, [0, 1], np.random.default_rng(0))
    assert answers.fitness(merged) > answers.fitness(pruned)
    assert [args for args in told if "merges" in args[2]] == [(n, 15, "evolving merges") for n in range(1, 16)]
    for layer, plan in merged.items():
        assert (plan.kept, plan.route_E.tolist()) == (pruned[layer].kept, pruned[layer].route_E.tolist())
        assert is_alone(plan, job.protect[layer][0])
    again = EEP.plan(replace(job, options=on))
    assert all(np.array_equal(again[layer].mix_KE, plan.mix_KE) for layer, plan in merged.items())


def test_a_merge_that_gains_nothing_on_rows_held_out_is_dropped(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = merge_job(rows=40, protect={0: (1,), 1: (0,)})
    pruned = EEP.plan(job)
    judged = Answers._fitness

    def by_heart(self: Answers, plans: Any, rows: Any) -> tuple[float, float]:
        return (0.5, 0.0) if rows == self.held else judged(self, plans, rows)

    monkeypatch.setattr(Answers, "_fitness", by_heart)
    with caplog.at_level(logging.WARNING, "secateur.pruning"):
        plans = EEP.plan(replace(job, options={**job.options, "merge_generations": 5}))
    assert "on rows held out, so the merges are dropped" in caplog.text
    assert all(np.array_equal(plans[layer].mix_KE, plan.mix_KE) for layer, plan in pruned.items())


def test_fewer_generations_than_none_are_refused() -> None:
    with pytest.raises(PlanError, match="merge-generations is -1, must be at least 0"):
        EEP.plan(toy_job(options={**OPTIONS, "merge_generations": -1}))
