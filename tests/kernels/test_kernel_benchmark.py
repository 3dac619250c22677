"""The kernel benchmark without a GPU: its arithmetic, its columns, its gate, its budget and its report."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_systems
from benchmarks import kernels as benchmark
from benchmarks.kernel_cases import (
    MODELS,
    Case,
    Load,
    Model,
    all_cases,
    make_layers,
    make_steps,
    measured_work,
    popularity,
    pruned_rows,
)
from benchmarks.kernel_quick import Check, small
from benchmarks.kernel_quick import table as quick_table
from benchmarks.kernel_report import (
    Row,
    figures,
    format_row,
    goals,
    plot,
    read_results,
    row_content,
    table,
    write_line,
)
from benchmarks.kernel_roofline import H100, Peaks, bound, floor_seconds, two_launch_seconds
from benchmarks.kernel_sweep import Timed, bands, candidates, code, winner
from benchmarks.kernel_systems import oracle, relative_error, systems
from benchmarks.kernel_timing import Timing, is_noise, summarize
from kernels.tiles import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COPY = Peaks(bandwidth=3.0e12, flops=790e12)
# (model, tokens): microseconds of the floor and of two launches, each full / 50 % slice / 50 % zero, and the full
# layer's bound; computed by hand from the models' sizes for a card of 3.35 TB/s (3.0 copied) and 790 TFLOP/s.
FLOORS = {
    ("OLMoE-1B-7B", 1): ((30.1, 30.1, 15.0), (33.6, 33.6, 16.8), "memory"),
    ("OLMoE-1B-7B", 16): ((212, 119, 106), (237, 133, 119), "memory"),
    ("OLMoE-1B-7B", 256): ((241, 121, 121), (278, 143, 139), "memory"),
    ("OLMoE-1B-7B", 1024): ((243, 130, 123), (305, 171, 154), "memory"),
    ("OLMoE-1B-7B", 4096): ((522, 522, 261), (522, 522, 261), "compute"),
    ("OLMoE-1B-7B", 32_768): ((4175, 4175, 2088), (4175, 4175, 2088), "compute"),
    ("Qwen3-30B-A3B", 1): ((22.5, 22.5, 11.3), (25.2, 25.2, 12.6), "memory"),
    ("Qwen3-30B-A3B", 16): ((232, 159, 116), (260, 178, 130), "memory"),
    ("Qwen3-30B-A3B", 256): ((361, 181, 181), (411, 210, 206), "memory"),
    ("Qwen3-30B-A3B", 1024): ((363, 183, 183), (436, 235, 220), "memory"),
    ("Qwen3-30B-A3B", 4096): ((391, 391, 196), (537, 391, 274), "compute"),
    ("Qwen3-30B-A3B", 32_768): ((3132, 3132, 1566), (3132, 3132, 1566), "compute"),
    ("Mixtral-8x7B", 1): ((210, 210, 105), (235, 235, 117), "memory"),
    ("Mixtral-8x7B", 16): ((833, 421, 417), (931, 471, 466), "memory"),
    ("Mixtral-8x7B", 256): ((843, 422, 422), (954, 484, 477), "memory"),
    ("Mixtral-8x7B", 1024): ((913, 913, 457), (995, 913, 501), "compute"),
    ("Mixtral-8x7B", 4096): ((3653, 3653, 1827), (3653, 3653, 1827), "compute"),
    ("Mixtral-8x7B", 32_768): ((29_228, 29_228, 14_614), (29_228, 29_228, 14_614), "compute"),
    ("DeepSeekMoE-16B", 1): ((41.3, 41.3, 25.8), (46.2, 46.2, 28.9), "memory"),
    ("DeepSeekMoE-16B", 16): ((272, 170, 141), (305, 190, 158), "memory"),
    ("DeepSeekMoE-16B", 256): ((341, 176, 176), (391, 206, 203), "memory"),
    ("DeepSeekMoE-16B", 1024): ((343, 179, 178), (421, 237, 222), "memory"),
    ("DeepSeekMoE-16B", 4096): ((718, 718, 449), (718, 718, 449), "compute"),
    ("DeepSeekMoE-16B", 32_768): ((5741, 5741, 3588), (5741, 5741, 3588), "compute"),
    ("V-MoE-B/16", 1): ((5.6, 5.6, 2.8), (6.3, 6.3, 3.2), "memory"),
    ("V-MoE-B/16", 16): ((22.3, 11.3, 11.2), (25.1, 12.8, 12.6), "memory"),
    ("V-MoE-B/16", 256): ((22.8, 11.5, 11.5), (28.0, 15.5, 14.2), "memory"),
    ("V-MoE-B/16", 1024): ((24.5, 24.5, 12.2), (36.7, 24.5, 18.9), "compute"),
    ("V-MoE-B/16", 4096): ((97.9, 97.9, 48.9), (97.9, 97.9, 48.9), "compute"),
    ("V-MoE-B/16", 32_768): ((783, 783, 391), (783, 783, 391), "compute"),
}


@pytest.mark.parametrize(("name", "tokens"), FLOORS)
def test_floors_are_those_computed_by_hand(name: str, tokens: int) -> None:
    floors, two_launches, binds = FLOORS[name, tokens]
    works = [Case(MODELS[name], tokens, semantics).expected_work() for semantics in ("full", "slice", "zero")]
    assert [floor_seconds(w, H100) * 1e6 for w in works] == pytest.approx(floors, rel=5e-3, abs=0.051)
    assert [two_launch_seconds(w, COPY) * 1e6 for w in works] == pytest.approx(two_launches, rel=5e-3, abs=0.051)
    assert bound(works[0], H100) == binds


def test_one_token_of_olmoe() -> None:
    """Eight experts of three 2048 x 1024 matrices in bfloat16, 100.7 MB, at 3.35 TB/s, and the token itself."""
    case = Case(MODELS["OLMoE-1B-7B"], 1)
    assert case.expected_work().bytes == 8 * 3 * 2048 * 1024 * 2 + 2 * 2048 * 2
    assert floor_seconds(case.expected_work(), H100) * 1e6 == pytest.approx(30.05, abs=0.005)


def test_every_case_is_listed_once_and_goals_come_first() -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.model.name for case in cases[:42]} == {"Qwen3-30B-A3B", "OLMoE-1B-7B"}
    for model in MODELS.values():
        mine = [case for case in cases if case.model is model]
        assert {case.semantics for case in mine} == {"full", "slice", "zero", "uneven"}
        assert {case.skewed for case in mine} == {False, True}
        assert {case.tokens for case in mine} == {1, 16, 64, 256, 1024, 4096, 32_768}


@pytest.mark.parametrize(
    ("name", "kept"),
    [("Qwen3-30B-A3B", (128, 96, 64, 37)), ("OLMoE-1B-7B", (64, 48, 32, 37)), ("V-MoE-B/16", (8, 6, 4, 3))],
)
def test_uneven_layers_keep_different_numbers_of_experts(name: str, kept: tuple[int, ...]) -> None:
    case = Case(MODELS[name], 4096, "uneven")
    assert case.kept == kept
    assert case.steps >= 4


def test_one_replay_reads_more_than_the_cache_holds() -> None:
    """Between two uses of a layer's weights all other layers are read; a single layer alone exceeds the cache."""
    for case in all_cases():
        assert 2 <= case.steps <= 8
        distinct = min(case.steps, case.model.layers)
        assert distinct * case.expected_work().bytes > 1.4 * 50 * 2**20, case.name


def test_the_most_popular_experts_survive() -> None:
    lean_E = [-1.0, 0.0, -3.0, -2.0]
    assert pruned_rows(lean_E, 2, "slice") == ([0, 1], [0, 1])
    assert pruned_rows(lean_E, 2, "zero") == ([0, 1, 2, 3], [0, 1, -1, -1])
    assert pruned_rows([-3.0, 0.0, 0.0], 2, "zero") == ([0, 1, 2], [-1, 0, 1])


@pytest.mark.parametrize("num_experts", [8, 64, 128])
def test_skew_is_zipf_in_some_order(num_experts: int) -> None:
    shares = sorted((torch.tensor(popularity(num_experts, skewed=True)).exp()).tolist(), reverse=True)
    assert shares == pytest.approx([1 / rank for rank in range(1, num_experts + 1)])
    assert popularity(num_experts, skewed=False) == [0.0] * num_experts


def test_padding_counts_rows_of_whole_tiles() -> None:
    load = Load(0.75, 2, (17, 0, 16))
    assert load.padded(16) == 48 / 33
    assert load.padded(1) == 1.0
    assert Load(0.0, 0, (0, 0)).padded(16) == 1.0


def tiny(name: str, tokens: int, semantics: str, skewed: bool = False) -> Case:
    return Case(small(MODELS[name]), tokens, semantics, skewed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("semantics", ["full", "slice", "zero", "uneven"])
def test_every_column_computes_the_same_layer(name: str, semantics: str) -> None:
    """In float32; widths are multiples of 16 bytes, which torch's grouped product insists on."""
    pytest.importorskip("triton")
    case = tiny(name, 20, semantics, skewed=semantics == "zero")
    chosen, skipped = systems(case)
    assert not skipped
    assert [system.name for system in chosen] == [
        "ours",
        "transformers eager",
        "transformers batched_mm",
        "transformers grouped_mm",
        "torch grouped_mm",
    ]
    with torch.no_grad():
        step = make_steps(case, make_layers(case.model, torch.float32, DEVICE))[-1]
        truth = oracle(step)
        errors = {system.name: relative_error(system.prepare(step)(), truth) for system in chosen}
    assert all(errors[system.name] <= system.bound(step) for system in chosen), errors
    assert step.load.kept_share == pytest.approx(1.0 if semantics != "zero" else step.load.kept_share)
    assert 0 < step.load.kept_share <= 1


def test_zero_drops_pairs_and_the_work_counts_only_the_rest() -> None:
    case = tiny("OLMoE-1B-7B", 64, "zero")
    step = make_steps(case, make_layers(case.model, torch.float32, torch.device("cpu")))[0]
    assert 0.3 < step.load.kept_share < 0.7
    assert measured_work(case, [step.load]).pairs == sum(step.load.rows_P) == round(64 * 3 * step.load.kept_share)
    assert step.experts.kept_share == step.load.kept_share


@pytest.mark.parametrize(("implementation", "missing"), [("eager", 0), ("batched_mm", 4), ("grouped_mm", 4)])
def test_transformers_is_told_which_pairs_to_drop(
    implementation: str, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an id past the last of four experts, so that it can save the work; eager knows no such id."""
    case = tiny("OLMoE-1B-7B", 64, "zero")
    step = make_steps(case, make_layers(case.model, torch.float32, torch.device("cpu")))[0]
    given: list[torch.Tensor] = []

    def module(x_TD: torch.Tensor, slot_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        given.extend((slot_TK, weight_TK))
        return x_TD

    monkeypatch.setattr(kernel_systems, "experts_module", lambda *_: module)
    column = next(system for system in systems(case)[0] if system.name.endswith(implementation))
    column.prepare(step)()
    slot_TK, weight_TK = given
    dropped_TK = weight_TK == 0
    assert 0.3 < dropped_TK.float().mean() < 0.7
    assert set(slot_TK[dropped_TK].tolist()) == {missing}
    assert set(slot_TK[~dropped_TK].tolist()) == {0, 1, 2, 3}


def test_copying_columns_are_skipped_above_their_limit_and_say_so() -> None:
    chosen, skipped = systems(Case(MODELS["Mixtral-8x7B"], 64))
    assert "transformers batched_mm" not in {system.name for system in chosen}
    assert skipped == {"transformers batched_mm": "copies 45 GB of weights"}


@pytest.mark.parametrize(
    ("outputs", "right"), [((1.0, 1.0), True), ((1.0, 1.01), False), ((float("nan"), 1.0), False), ((-1.0, 1.0), False)]
)
def test_the_gate_admits_only_what_is_right_in_every_step(outputs: tuple[float, ...], right: bool) -> None:
    truth = [torch.ones(2, 3, dtype=torch.float64)] * 2
    assert benchmark.gate([torch.full((2, 3), value) for value in outputs], truth, 4e-3)[1] is right


def test_the_budget_admits_what_fits_and_learns_from_what_was_spent() -> None:
    budget = benchmark.Budget(110, now=0)  # ten seconds are held back for the report
    assert budget.admits(99, now=0)
    assert not budget.admits(101, now=0)
    budget.note(estimate=20, seconds=60)  # on top of 20 seconds of right estimates: twice as slow as thought
    assert budget.admits(19, now=60)
    assert not budget.admits(21, now=60)


def test_estimates_grow_with_the_work() -> None:
    small_case, large_case = (Case(MODELS["Mixtral-8x7B"], tokens) for tokens in (4096, 32_768))
    assert 1 < benchmark.estimated_seconds(small_case) < benchmark.estimated_seconds(large_case) < 60


def timing(us: float, spread: float = 0.0) -> Timing:
    return Timing(us, us * 0.99, us * 1.02, (us, us + spread), graphed=True)


def test_samples_become_microseconds_per_step() -> None:
    result = summarize([[0.2] * 5 + [0.4] * 5, [0.4] * 10], steps=4, graphed=True)
    assert (result.median, result.p10) == (100.0, 50.0)
    assert result.medians == pytest.approx((75.0, 100.0))
    assert result.spread == pytest.approx(25.0)


def test_a_difference_below_the_spread_is_noise() -> None:
    assert is_noise(timing(100.0, spread=5.0), timing(104.0))
    assert not is_noise(timing(100.0, spread=5.0), timing(106.0))


def row(case: Case, us: float, other_us: float = 200.0, **changes: Any) -> Row:
    times = {"ours": timing(us), "transformers eager": timing(9000.0), "torch grouped_mm": timing(other_us)}
    values: dict[str, Any] = {
        "case": case.name,
        "model": case.model.name,
        "tokens": case.tokens,
        "semantics": case.semantics,
        "skewed": case.skewed,
        "kept": case.kept,
        "dtype": "bfloat16",
        "path": "pair",
        "steps": case.steps,
        "kept_share": 0.5 if case.semantics == "zero" else 1.0,
        "active": 8.0,
        "padded": 1.0,
        "times": times,
        "errors": {"ours": 0.003},
        **figures(case.expected_work(), times, Peaks(3.0e12, 790e12), H100),
    }
    return Row(**{**values, **changes})


OLMOE = MODELS["OLMoE-1B-7B"]


def test_figures_follow_from_the_times() -> None:
    """OLMoE, one token: 100.67 MB in 50 us is 2.01 TB/s, 67 % of a copy at 3.0 and 60 % of the data sheet's 3.35."""
    found = row(Case(OLMOE, 1), 50.0)
    assert found.tbps == pytest.approx(2.0134, abs=1e-3)
    assert found.share_memory == found.share_floor == pytest.approx(0.671, abs=1e-3)
    assert found.share_datasheet == pytest.approx(0.601, abs=1e-3)
    assert found.share_reachable == pytest.approx(0.672, abs=1e-3)
    assert (found.best_other, found.ratio, found.noise) == ("torch grouped_mm", 4.0, False)


def test_a_row_without_another_column_has_no_ratio() -> None:
    case = Case(OLMOE, 1)
    found = figures(case.expected_work(), {"ours": timing(50.0)}, H100, H100)
    assert found["best_other"] == ""
    assert "none" in format_row(replace(row(case, 50.0), **found))


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [row(Case(OLMOE, tokens, kind), 50.0) for tokens in (1, 16) for kind in ("full", "slice")]
    write_line(path, "setting", {"device": "a card"})
    for each in rows:
        write_line(path, "row", row_content(each))
    write_line(path, "end", {"left_out": ["x"], "refused": {}})
    assert read_results(path) == ({"device": "a card"}, rows, {"left_out": ["x"], "refused": {}})


def test_the_report_says_what_is_missing() -> None:
    rows = [row(Case(OLMOE, 1), 50.0, other={"transformers batched_mm": "ran out of memory"})]
    text = table({"device": "a card"}, rows, {"left_out": ["case a"], "refused": {"case b": "relative error 1.0"}})
    assert text.startswith("device a card\n")
    assert "OLMoE-1B-7B T=1 full: transformers batched_mm ran out of memory" in text
    assert "REFUSED, not timed: case b: relative error 1.0" in text
    assert text.endswith("left out for lack of time: case a")
    assert table({}, rows, {}).endswith("this run was cut off before its end")


def test_goals_are_held_against_the_worst_row() -> None:
    rows = [row(Case(OLMOE, 1), 45.0), row(Case(MODELS["Qwen3-30B-A3B"], 1), 50.0, other_us=60.0)]
    text = goals(rows)
    assert "1 token: 0.50 at worst (Qwen3-30B-A3B T=1 full), goal 0.65: MISSED" in text[1]
    assert "ratio to the best other column: 1.20 at worst" in text[3]
    assert text[0].endswith("not measured")
    full, half = row(Case(OLMOE, 64), 300.0), row(Case(OLMOE, 64, "slice"), 160.0)
    zero = row(Case(OLMOE, 64, "zero"), 200.0)
    text = goals([full, half, zero])
    assert "0.94 at worst (OLMoE-1B-7B T=64 slice), goal 0.91: met" in text[4]
    assert "0.75 at worst (OLMoE-1B-7B T=64 zero), goal 0.91: MISSED" in text[5]


def test_the_plot_is_drawn_from_rows(tmp_path: Path) -> None:
    rows = [
        row(Case(model, tokens, semantics), 500.0)
        for model in (OLMOE, MODELS["V-MoE-B/16"])
        for tokens in (1, 64, 4096)
        for semantics in ("full", "slice", "zero", "uneven")
    ]
    plot(rows, tmp_path / "plot.png", "a card")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_run_is_printed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    write_line(path, "setting", {"device": "a card"})
    write_line(path, "row", row_content(row(Case(OLMOE, 1), 50.0)))
    write_line(path, "end", {"left_out": [], "refused": {}})
    benchmark.show(path, tmp_path / "plot.png")
    assert "left out for lack of time: nothing" in capsys.readouterr().out
    assert (tmp_path / "plot.png").exists()


def test_a_case_that_fails_its_check_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop over cases, with the CUDA parts replaced: one refused, one left out for lack of time, one measured."""

    def run_case(case: Case, layers: object, peaks: Peaks) -> Row:
        if case.tokens == 16:
            raise benchmark.RefusedError("relative error 1.0, bound 4e-03")
        return row(case, 50.0)

    monkeypatch.setattr(benchmark, "run_case", run_case)
    monkeypatch.setattr(benchmark, "release", lambda: None)
    monkeypatch.setattr(benchmark, "make_layers", lambda model, dtype, device: [])
    monkeypatch.setattr(benchmark, "estimated_seconds", lambda case: 1000.0 if case.tokens == 64 else 0.0)
    args = benchmark.parse_args(["--out", str(tmp_path / "out.jsonl")])
    cases = [Case(OLMOE, tokens) for tokens in (1, 16, 64)]
    end = benchmark.run_all(cases, args, H100, benchmark.Budget(60, time.monotonic()))
    assert end == {
        "left_out": ["OLMoE-1B-7B T=64 full"],
        "refused": {"OLMoE-1B-7B T=16 full": "relative error 1.0, bound 4e-03"},
    }
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["case"] for line in written] == ["OLMoE-1B-7B T=1 full"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device to run on")
@pytest.mark.parametrize("mode", [[], ["--sweep"]])
def test_without_a_gpu_it_says_so(mode: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--out", str(tmp_path / "out.jsonl"), *mode]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert "no CUDA device: only --quick" in run.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_failed_check_is_shown_with_its_family() -> None:
    good = Check("down", "OLMoE-1B-7B", "float16", 1e-5, 6e-4)
    bad = replace(good, family="Mixtral-8x7B", error=float("nan"))
    assert quick_table([good]).splitlines()[1].endswith("ok")
    assert quick_table([bad, good]).splitlines()[1].endswith("FAIL: Mixtral-8x7B")


def test_the_sweep_prefers_the_rows_whose_two_products_take_least() -> None:
    tiles = {rows: Tile(rows, 64, 64, 4, 4) for rows in (16, 32, 64)}
    gate_up = [Timed(tiles[16], timing(30)), Timed(tiles[32], timing(20)), Timed(tiles[64], timing(10))]
    down = [Timed(tiles[16], timing(10)), Timed(tiles[32], timing(15))]
    best = winner(12, gate_up, down)
    assert (best.us, best.gate_up.tile.rows, best.down.tile.rows, best.second_us) == (35.0, 32, 32, 40.0)


def test_the_sweep_prints_rows_for_the_table() -> None:
    first, second = Tile(16, 64, 128, 4, 3, swap=True), Tile(64, 128, 64, 8, 4, tma=True)
    winners = [
        winner(r, [Timed(t, timing(20))], [Timed(t, timing(10))]) for r, t in ((2, first), (8, first), (32, second))
    ]
    assert bands(winners, "swept") == [
        "Band(16, GroupedTiles(Tile(16, 64, 128, 4, 3, swap=True), Tile(16, 64, 128, 4, 3, swap=True), group=1), "
        '"swept: 20.0 + 10.0 us at r = 8, next rows inf"),',
        "Band(inf, GroupedTiles(Tile(64, 128, 64, 8, 4, tma=True), Tile(64, 128, 64, 8, 4, tma=True), group=4), "
        '"swept: 20.0 + 10.0 us at r = 32, next rows inf"),',
    ]


@pytest.mark.parametrize("hopper", [False, True])
def test_the_sweep_has_candidates_of_every_height(hopper: bool) -> None:
    for accumulators in (1, 2):
        tiles = candidates(hopper, accumulators)
        assert {tile.rows for tile in tiles} == {16, 32, 64, 128}
        assert len(set(tiles)) == len(tiles) < 100
        assert hopper or not any(tile.swap or tile.tma for tile in tiles)
    assert code(Tile(16, 64, 64, 4, 3)) == "Tile(16, 64, 64, 4, 3)"


def test_small_models_keep_their_kind() -> None:
    tiny_model: Model = small(MODELS["DeepSeekMoE-16B"])
    assert (tiny_model.shared, tiny_model.top_k, tiny_model.num_experts) == (2, 3, 8)
