"""The pruning benchmark's pure parts: what comes first, what an interval says, what the page claims."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pruning_cells import ALSO, RATIOS, RECOVERED, WITHIN_EXPERTS, Cell, draws, grid, importance
from benchmarks.pruning_report import duels, left_out, page, recovery_table, size_table, verdict_line
from benchmarks.pruning_results import (
    Contrast,
    Outcome,
    Parent,
    Weights,
    against_parent,
    append,
    contrast,
    is_settled,
    packed,
    read,
    read_parent,
    save_parent,
    seeds_of,
    unpacked,
)
from models.evaluate import bootstrap_mean
from models.pruning import METHODS

ROWS = 200
GENERATOR = np.random.default_rng(0)
RIGHT = GENERATOR.random(ROWS) < 0.9


def parent_of(task: str = "toys") -> Parent:
    return Parent(
        task=task,
        sha256="p",
        accuracy=float(RIGHT.mean()),
        rows=ROWS,
        right=packed(RIGHT),
        groups=tuple(f"g{row // 2}" for row in range(ROWS)),
        bytes=1000,
        parameters=500,
        experts=(8, 8),
        setting="a machine",
    )


def outcome_of(cell: Cell, wrong: int, **changes: object) -> Outcome:
    """The parent's answers with the first so many right ones spoilt."""
    right = RIGHT.copy()
    right[np.flatnonzero(right)[:wrong]] = False
    plain = Outcome(cell, "p", accuracy=float(right.mean()), right=packed(right), bytes=500, kept_slots=0.75)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_grid_holds_every_method_at_every_ratio_with_seeds_where_they_matter() -> None:
    cells = grid(["a", "b"])
    assert len(set(cells)) == len(cells)
    for name, method in METHODS.items():
        mine = [c for c in cells if (c.task, c.method, c.recovered) == ("a", name, False)]
        kinds = {method.semantics[0], *(semantics for other, semantics in ALSO if other == name)}
        assert {c.semantics for c in mine} == kinds
        assert {c.ratio for c in mine} == set(RATIOS)
        assert {c.seed for c in mine} == ({0, 1, 2} if draws(method) else {0})
        assert kinds <= set(method.semantics)
    assert draws(METHODS["random"])
    assert draws(METHODS["naee"])  # by the tokens it samples
    assert not draws(METHODS["frequency"])
    for method_name, semantics in RECOVERED:
        assert semantics in METHODS[method_name].semantics
    assert {(c.method, c.semantics) for c in cells if c.recovered} == set(RECOVERED)


def test_what_is_recovered_was_measured_before() -> None:
    cells = grid(["a"])
    assert all(replace(cell, recovered=False) in cells for cell in cells if cell.recovered)


def test_the_most_important_come_first() -> None:
    flagship = Cell("a", "router-norm-change", "zero", 0.25)
    order = [
        flagship,
        Cell("b", "random", "slice", 0.75, seed=2),
        Cell("a", "mone", "constant", 0.25),
        replace(flagship, recovered=True),
        Cell("a", "random", "zero", 0.25, recovered=True),
        Cell("a", "mone", "constant", 0.5),
        replace(flagship, ratio=0.5, recovered=True),
        Cell("a", "mone", "constant", 0.75),
        Cell("a", "eep", "slice", 0.25, seed=1),
    ]
    assert sorted(set(order), key=importance) == order
    cells = grid(["b", "a"])
    assert cells == sorted(cells, key=importance)
    assert {cell.task for cell in cells[:12]} == {"a", "b"}  # tasks take turns where time is short


def test_a_method_within_experts_keeps_them_all_and_drops_the_same_share_of_weights() -> None:
    for name in WITHIN_EXPERTS & set(METHODS):
        cell = Cell("a", name, METHODS[name].semantics[0], 0.375)
        assert cell.keep == 1.0
        assert cell.options == {"pattern": "0.625"}
    assert Cell("a", "reap", "slice", 0.375).keep == 0.375


def test_options_of_the_benchmark_are_options_of_the_methods() -> None:
    for cell in grid(["a"]):
        METHODS[cell.method].read_options(cell.options)


def test_right_rows_survive_packing() -> None:
    for rows in (1, 8, 13, 200):
        right = GENERATOR.random(rows) < 0.5
        assert unpacked(packed(right), rows).tolist() == right.tolist()


def test_verdicts_follow_from_intervals_alone() -> None:
    assert Contrast(0.01, 0.001, 0.02).verdict == "ahead"
    assert Contrast(0.01, 0.0, 0.02).verdict == "tied"
    assert Contrast(0.0, 0.0, 0.0).verdict == "tied"
    assert Contrast(-0.01, -0.02, -0.001).verdict == "behind"


def test_the_interval_is_that_of_the_paired_group_bootstrap() -> None:
    """One seed each: as models.evaluate.bootstrap_mean, but for the draws."""
    other = GENERATOR.random(ROWS) < 0.8
    parent = parent_of()
    result = contrast(other[None], RIGHT[None], parent.weights)
    assert result.difference == pytest.approx(other.mean() - RIGHT.mean())
    lower, upper = bootstrap_mean(other.astype(float) - RIGHT, parent.groups, 0)
    assert (result.lower, result.upper) == pytest.approx((lower, upper), abs=0.012)
    assert contrast(RIGHT[None], RIGHT[None], parent.weights) == Contrast(0.0, 0.0, 0.0)


def test_rows_of_a_group_are_drawn_together() -> None:
    """A hundred rows that are all wrong or all right: alone they are sure, in two groups they say nothing."""
    right = np.repeat([True, False], 50)[None]
    nothing = np.zeros((1, 100), dtype=bool)
    grouped = contrast(right, nothing, Weights(["a"] * 50 + ["b"] * 50))
    alone = contrast(right, nothing, Weights([""] * 100))
    assert (grouped.lower, grouped.upper) == (0.0, 1.0)
    assert alone.lower > 0.38
    assert alone.upper < 0.62


def test_seeds_widen_the_interval() -> None:
    good, bad = np.ones((1, 400), dtype=bool), np.zeros((1, 400), dtype=bool)
    weights = Weights([""] * 400)
    result = contrast(np.concatenate((good, bad, good)), good, weights)
    assert result.difference == pytest.approx(-1 / 3)
    assert result.lower == pytest.approx(-1.0)
    assert result.upper == pytest.approx(0.0)


def test_results_are_resumed_line_by_line_and_of_this_parent_only(tmp_path: Path) -> None:
    file, parent = tmp_path / "results.jsonl", parent_of()
    cell = Cell("toys", "reap", "slice", 0.5)
    assert read(file, parent) == {}
    append(file, outcome_of(cell, 3))
    append(file, replace(outcome_of(replace(cell, seed=1), 3), parent="another"))
    append(file, outcome_of(cell, 5))
    with file.open("a") as stream:
        stream.write('{"cell": {"task": "to')
    found = read(file, parent)
    assert found == {cell: outcome_of(cell, 5)}
    save_parent(tmp_path / "parent.json", parent)
    assert read_parent(tmp_path / "parent.json") == parent


def results() -> dict[Cell, Outcome]:
    """Router-norm change under zero is ahead of chance, under slice behind; frequency has the same answers."""
    wrong = {
        ("router-norm-change", "zero"): (12,),
        ("random", "zero"): (40, 41, 42),
        ("frequency", "zero"): (12,),
        ("router-norm-change", "slice"): (40,),
        ("random", "slice"): (1, 1, 2),
        ("mone", "constant"): (30,),
    }
    cells = {
        Cell("toys", method, semantics, 0.25, seed): count
        for (method, semantics), counts in wrong.items()
        for seed, count in enumerate(counts)
    }
    cells |= {Cell("toys", "mone", "constant", 0.25, recovered=True): 4}
    cells |= {Cell("toys", "random", "zero", 0.25, recovered=True): 34}
    cells |= {Cell("toys", "router-norm-change", "zero", 0.25, recovered=True): 0}
    return {cell: outcome_of(cell, count) for cell, count in cells.items()}


def test_seeds_are_gathered_and_refusals_left_out() -> None:
    found = results()
    assert len(seeds_of(found, "toys", "random", "zero", 0.25)) == 3
    refused = Cell("toys", "random", "zero", 0.25, seed=3)
    found[refused] = Outcome(refused, "p", refused="no")
    assert len(seeds_of(found, "toys", "random", "zero", 0.25)) == 3
    change = against_parent(seeds_of(found, "toys", "mone", "constant", 0.25), parent_of())
    assert change.difference == pytest.approx(-30 / ROWS)
    assert change.verdict == "behind"


def test_the_duels_say_where_router_norm_change_loses() -> None:
    text = duels([parent_of()], results(), (0.25,))
    lines = {
        line.split(" | ")[1] + line.split(" | ")[2]: line for line in text.splitlines() if line.startswith("| toys")
    }
    assert "**ahead**" in lines["`zero`random"]
    assert "+0.00 [+0.00, +0.00] **tied**" in lines["`zero`frequency"]
    assert "**behind**" in lines["`slice`random"]
    assert "Against random under `zero`, of 1 comparisons: behind nowhere, tied nowhere, ahead in 1" in text
    assert "Against random under `slice`, of 1 comparisons: behind in 1 (toys at 0.25), tied nowhere" in text
    assert "These are 3 intervals" in text
    tie, loss = Contrast(0, -1, 1), Contrast(-1, -2, -1)
    sentence = verdict_line("random", "zero", [("a", 0.5, tie), ("b", 0.5, loss), ("a", 0.25, tie)])
    assert sentence == (
        "Against random under `zero`, of 3 comparisons: "
        "behind in 1 (b at 0.5), tied in 2 (a at 0.5, 0.25), ahead nowhere."
    )


def test_a_task_on_which_chance_loses_nothing_is_said_to_tell_nothing() -> None:
    text = duels([parent_of()], results(), (0.25,))
    assert "On toys under `slice`, random cuts themselves lose nothing" in text
    assert "On toys under `zero`, random" not in text


def test_rounding_is_nobodys_lead() -> None:
    """Thirds of a sum are not a third of it: (.9 + .9 + .9) / 3 is a little less than .9."""
    three = np.stack([RIGHT] * 3)
    assert contrast(three, RIGHT[None], parent_of().weights) == Contrast(0.0, 0.0, 0.0)
    assert str(contrast(RIGHT[None], three, parent_of().weights).lower) == "0.0"


def test_only_a_loss_of_over_a_point_is_trained_away() -> None:
    cell = Cell("toys", "reap", "slice", 0.25)
    again = replace(cell, recovered=True)
    for wrong, settled in ((0, True), (2, True), (3, False)):  # of 200 rows: 0, 1 and 1.5 points
        assert is_settled(again, {cell: outcome_of(cell, wrong)}, parent_of()) == settled
    assert is_settled(again, {cell: Outcome(cell, "p", refused="no")}, parent_of())
    assert not is_settled(again, {}, parent_of())
    assert not is_settled(cell, {}, parent_of())


def test_the_recovery_table_counts_both() -> None:
    text = recovery_table([parent_of()], results())
    assert "| toys | mone | `constant` | 0.25 | -15.0" in text
    assert "87 % | yes |" in text
    assert "15 % | NO |" in text
    assert "2 closed by half or more, 1 not." in text
    assert "Nothing was trained again" in recovery_table([parent_of()], {})


def test_sizes_say_what_still_runs_where_rows_stay() -> None:
    text = size_table([parent_of()], results(), (0.25,))
    assert "| toys | mone | `constant` | 50 % (75 %) |" in text
    assert "| toys | router-norm-change, random | `slice` | 50 % |" in text


def test_what_was_not_measured_is_named() -> None:
    cells = [*results(), Cell("toys", "reap", "slice", 0.25), Cell("toys", "reap", "slice", 0.5)]
    refused = Cell("toys", "hc-smoe", "tie", 0.25)
    outcomes = results() | {refused: Outcome(refused, "p", refused="expert 3 is protected")}
    text = left_out([*cells, refused], outcomes, ["digits"])
    assert "- digits: there was no trained parent" in text
    assert "- No time on toys for a first seed, 2 cells: reap `slice` (2)." in text
    assert "- Refused: toys hc-smoe tie keep 0.25 seed 0: expert 3 is protected" in text
    assert "Nothing was left out" in left_out(list(results()), results())


def test_the_page_names_its_command_first_and_has_the_published_figure() -> None:
    text = page("python -m benchmarks.pruning --minutes 5", [parent_of()], list(results()), results())
    assert text.splitlines()[0] == "# What pruning costs, measured by `python -m benchmarks.pruning --minutes 5`"
    assert "| 6 | 96.8 / 76.0 | 84.7 / 6.3 | 38.6 / 47.0 | " in text
    worst = min(line for line in text.splitlines() if line.startswith("| random | `zero` | 3 |"))
    assert worst.split(" | ")[3].startswith("-20.5 [")
    assert "- Ahead of router-norm change (`zero`) at 0.25, by interval: nothing." not in text
    assert "by interval: random (slice)." in text
    sixteen = replace(parent_of(), experts=(16, 16))
    assert "CIFAR-10" not in page("command", [sixteen], list(results()), results())
