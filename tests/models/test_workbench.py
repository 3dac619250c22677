"""Measuring a candidate: in its own order, only what is new, and with what it saw at the time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.manifest import Rows
from models.pruning.apply import apply
from models.pruning.candidates import PARENT, Candidate
from models.pruning.journal import Journal
from models.pruning.plan import keep_best, merge_groups
from models.pruning.prune import TaskRows
from models.pruning.stats import LayerStats
from models.pruning.workbench import DevRows, Workbench, measure_latency, score

CUT = Candidate("frequency", "zero", 0.5)


@pytest.fixture(scope="session")
def parent(pristine: Path) -> Checkpoint:
    return load_checkpoint(pristine)


@pytest.fixture
def bench(parent: Checkpoint, tmp_path: Path) -> Workbench:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (60,), generator=generator).tolist()
    sequences = tuple(tuple(torch.randint(1, 50, (n,), generator=generator).tolist()) for n in lengths)
    truth = tuple(torch.randint(0, 3, (60,), generator=generator).tolist())
    rows = TaskRows(Rows(name="rows", rows=0, sha256=""), (), (), "rows", ())
    known: dict[int, LayerStats] = {}
    made = Workbench(parent, known, rows, DevRows(sequences, truth, tuple(range(60))), Journal(tmp_path, {}))
    made.plans[CUT] = {layer: keep_best([1.0, 4.0, 2.0, 3.0], 2, "zero") for layer in (0, 1)}
    return made


def test_scores_are_those_of_each_row_alone_in_the_order_of_rows(bench: Workbench) -> None:
    model, dev = bench.child(CUT), bench.dev
    found = score(model, dev.sequences, dev.truth)
    for row in (0, 7, 59):
        logits_C = model.classify([dev.sequences[row]]).logits_BC[0]
        assert found.right_N[row] == (int(logits_C.argmax()) == dev.truth[row])
        assert found.loss_N[row] == pytest.approx(-float(logits_C.log_softmax(0)[dev.truth[row]]), abs=1e-4)
    # The last of two layers runs the token that the head reads alone.
    assert 0 < found.dropped < found.routed == 2 * (sum(map(len, dev.sequences)) + len(dev.sequences))


def test_only_new_rows_are_run(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.pruning import workbench

    asked: list[int] = []

    def counted(model: Any, sequences: Any, truth: Any) -> Any:
        asked.append(len(truth))
        return score(model, sequences, truth)

    monkeypatch.setattr(workbench, "score", counted)
    for rows in (20, 50, 30, 50):
        assert len(bench.run(CUT, rows).right_N) == rows
    assert asked == [20, 30]


def test_what_was_seen_on_fewer_rows_stays(bench: Workbench) -> None:
    early = bench.run(CUT, 10)
    late = bench.run(CUT, 60)
    again = bench.run(CUT, 10)
    assert (again.right_N == early.right_N).all()
    assert (late.right_N[:10] == early.right_N).all()
    assert (again.loss_N == early.loss_N).all()
    assert (late.loss_N[:10] == early.loss_N).all()
    # Which slots meet a cut expert depends on the rows, and with it what they cost.
    assert again.flops_per_token == early.flops_per_token != late.flops_per_token
    assert early.bytes == late.bytes < bench.run(PARENT, 10).bytes


def test_a_new_process_finds_what_the_old_one_measured(bench: Workbench, tmp_path: Path) -> None:
    before = bench.run(CUT, 40)
    reopened = Workbench(bench.parent, bench.known, bench.rows, bench.dev, Journal(tmp_path, {}))
    after = reopened.run(CUT, 40)  # without a plan: nothing has to be built
    assert (after.right_N == before.right_N).all()
    assert (after.loss_N == before.loss_N).all()
    assert (after.bytes, after.flops_per_token) == (before.bytes, before.flops_per_token)


def test_latency_is_measured_once(bench: Workbench) -> None:
    first = bench.latency(CUT)
    assert bench.latency(CUT) == first
    assert 0 < first["single_seconds"] < first["batch_seconds"] * 10
    assert np.isfinite(list(measure_latency(bench.parent.model, bench.dev.sequences[:3]).values())).all()


def test_new_weights_are_rounded_as_they_will_be_stored(bench: Workbench, tmp_path: Path) -> None:
    """A mean of bfloat16 experts is none itself; what is measured must be what a file of bfloat16 gives back."""
    whole = bench.parent
    tokenizer = whole.path / "tokenizer.json"
    half = save_checkpoint(tmp_path / "half", whole.model, whole.raw_config, tokenizer, dtype="bfloat16")
    merging = {0: merge_groups([0, 0, 1, 2], [1.0, 2.0, 1.0, 1.0], "tie")}
    rounding = Workbench(half, bench.known, bench.rows, bench.dev, bench.journal, plans={CUT: merging})

    def is_rounded(model: torch.nn.Module) -> bool:
        return all(bool((p == p.to(torch.bfloat16).to(p.dtype)).all()) for p in model.parameters())

    assert half.model.dtype == torch.float32
    assert not is_rounded(apply(half.model, merging))
    assert is_rounded(rounding.child(CUT))
    assert is_rounded(half.model)
