"""TSEP: shares by hand, what a dropped expert can no longer get, and that the run finds a planted useless expert."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint, load_checkpoint
from models.classifier import MoELayer
from models.dataset import label_ids, read_rows
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.method import Job
from models.pruning.methods.tsep import TSEP, DroppingRun, LayerDropping, tsep
from models.pruning.prune import prune
from models.pruning.stats import LayerStats

OPTIONS = {option.name: option.default for option in TSEP.options}
SHARES = np.array([0.5, 0.3, 0.15, 0.05])


def dropping(keep: int = 1, protect: tuple[int, ...] = ()) -> LayerDropping:
    """Four experts that did these shares of the work in the open window."""
    layer = LayerDropping(keep, protect, np.ones(4, dtype=bool))
    layer.add(np.arange(4), 8 * SHARES)
    return layer


def alive(layer: LayerDropping) -> list[int]:
    return np.flatnonzero(layer.alive_E).tolist()


def test_a_share_below_beta_over_alive_drops_an_expert() -> None:
    """Four alive: .4 / 4 = .1 drops expert 3; three alive: .4 / 3 = .1333 would spare .15 and drops .13."""
    layer = dropping()
    layer.end(False, 0.4, 4)
    assert layer.share_E == pytest.approx(SHARES)
    assert alive(layer) == [0, 1, 2]
    layer.add(np.array([0, 1, 2]), np.array([0.5, 0.35, 0.15]))
    layer.end(False, 0.4, 4)
    assert alive(layer) == [0, 1, 2]
    layer.add(np.array([0, 1, 2]), np.array([0.5, 0.37, 0.13]))
    layer.end(False, 0.4, 4)
    assert alive(layer) == [0, 1]


def test_a_window_forgets_the_one_before() -> None:
    layer = dropping()
    layer.end(False, 0.0, 4)
    layer.add(np.array([3]), np.array([1.0]))
    layer.end(False, 0.0, 4)
    assert layer.share_E.tolist() == [0, 0, 0, 1]


def test_the_least_go_first_and_never_below_the_floor() -> None:
    layer = dropping(keep=2)
    layer.end(False, 4.0, 4)  # a threshold of 1 that nobody reaches
    assert alive(layer) == [0, 1]
    layer = dropping()
    layer.end(False, None, 3)
    assert alive(layer) == [0, 1, 2]
    tied = LayerDropping(2, (), np.ones(4, dtype=bool))
    tied.end(False, None, 2)
    assert alive(tied) == [0, 1]


def test_the_protected_stay() -> None:
    layer = dropping(keep=2, protect=(3,))
    layer.end(False, None, 2)
    assert alive(layer) == [0, 3]


def test_hit_rate_weighs_gates_by_choices() -> None:
    """Gates .5 in one choice against .4 in two: 1 * .5 < 2 * .4. Slots of dropped experts are nobody's."""
    layer = LayerDropping(1, (), np.ones(2, dtype=bool))
    layer.add(np.array([0, 1, 1, -1]), np.array([0.5, 0.2, 0.2, 9.0]))
    layer.end(True, None, 2)
    assert layer.share_E == pytest.approx([0.5 / 1.3, 0.8 / 1.3])


@pytest.fixture(scope="module")
def loaded(parent: Path) -> Checkpoint:
    return load_checkpoint(parent)


def job_of(loaded: Checkpoint, rows_file: Path, keep: tuple[int, int], **changes: Any) -> Job:
    rows = read_rows(rows_file, "train")
    stats = {i: LayerStats(i, 8, 2) for i in (0, 1)}
    plain = Job(
        parent=loaded.model,
        stats=stats,
        keep=dict(enumerate(keep)),
        semantics="slice",
        options=OPTIONS | {"window": 5, "steps": 20} | changes.pop("options", {}),
        sequences=tuple(loaded.encoder.encode(row.text).ids for row in rows),
        labels=tuple(label_ids(rows, loaded.labels)),
    )
    return replace(plain, **changes)


def moe(model: Any, index: int) -> MoELayer:
    layer = model.layers[index]
    assert isinstance(layer, MoELayer)
    return layer


def test_a_dropped_expert_gets_no_token_when_all_live_logits_are_negative(loaded: Checkpoint, rows_file: Path) -> None:
    """Logits times 0 or -1e6 would send tokens to it: its logit would be the largest."""
    run = DroppingRun(job_of(loaded, rows_file, (2, 2)), {0: 2})
    alive_E = np.ones(8, dtype=bool)
    alive_E[[1, 6]] = False
    run.hide(0, alive_E)
    layer = moe(run.model, 0)
    logits_TE = -torch.rand(100, 8) - 0.5
    logits_TE[:, 1], logits_TE[:, 6] = 3.0, -1e6
    routing = layer.route(logits_TE, run.model.backend)
    assert not np.isin(routing.slot_TK.numpy(), (1, 6)).any()
    assert (routing.slot_TK >= 0).all()
    gates_T2 = torch.softmax(logits_TE[:, alive_E.tolist()], 1).topk(2).values
    assert torch.allclose(routing.weight_TK.sum(1), torch.ones(100))  # this family renormalises
    assert torch.allclose(routing.weight_TK, gates_T2 / gates_T2.sum(1, keepdim=True), atol=1e-6)


def test_one_expert_alone_has_gate_one_without_renormalisation(loaded: Checkpoint, rows_file: Path) -> None:
    run = DroppingRun(job_of(loaded, rows_file, (1, 1)), {0: 1})
    run.hide(0, np.arange(8) == 3)
    layer = moe(run.model, 0)
    layer.policy = replace(layer.policy, normalize=False, top_k=1)
    routing = layer.route(torch.randn(10, 8), run.model.backend)
    assert routing.slot_TK.tolist() == [[3]] * 10
    assert routing.weight_TK.tolist() == [[1.0]] * 10


@pytest.mark.parametrize("schedule", ["eager", "staged"])
def test_an_expert_that_nobody_chooses_is_dropped_first(
    schedule: str, loaded: Checkpoint, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expert 5 of each layer gets a row that no token likes; all windows are watched."""
    model = load_checkpoint(loaded.path).model
    bias = torch.zeros(8)
    bias[5] = -1e4
    for index in (0, 1):
        moe(model, index).route = MethodType(partial(biased, bias), moe(model, index))  # type: ignore[method-assign]
    windows: list[tuple[list[int], list[int]]] = []
    end = DroppingRun.end_window

    def watched(self: DroppingRun, share: float) -> None:
        assert all(not d.count_E[~d.alive_E].any() for d in self.dropping.values()), "a dropped expert got a token"
        end(self, share)
        windows.append((alive(self.dropping[0]), alive(self.dropping[1])))

    monkeypatch.setattr(DroppingRun, "end_window", watched)
    plans = tsep(job_of(replace(loaded, model=model), rows_file, (4, 6), options={"schedule": schedule}))
    assert [plans[i].keep for i in (0, 1)] == [4, 6]
    assert all(plans[i].route_E[5] == -1 for i in (0, 1))
    assert all(plans[i].kept == tuple(windows[-1][i]) for i in (0, 1))
    sizes = [len(first) for first, _ in windows]
    assert sizes == [7, 6, 5, 4] if schedule == "staged" else sizes[0] <= 7
    assert all(5 not in first for first, _ in windows)
    assert all(set(later) <= set(earlier) for (earlier, _), (later, _) in pairwise(windows))


def biased(bias_E: torch.Tensor, layer: MoELayer, logits_TE: torch.Tensor, backend: Any) -> Any:
    return backend.route(logits_TE + bias_E, layer.table_VE, layer.policy)


def test_the_parent_is_left_as_it_was_and_the_plan_is_its_own(loaded: Checkpoint, rows_file: Path) -> None:
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    tables = [moe(loaded.model, i).table_VE.clone() for i in (0, 1)]
    job = job_of(loaded, rows_file, (3, 8))
    plans = tsep(job)
    assert set(plans) == {0}  # a layer that keeps all stays out
    assert all(torch.equal(before[name], p) for name, p in loaded.model.named_parameters())
    assert all(torch.equal(tables[i], moe(loaded.model, i).table_VE) for i in (0, 1))
    assert plans[0].kept == tsep(job)[0].kept
    child = apply(loaded.model, plans)
    assert [layer.num_experts for layer in child.config.layers] == [3, 8]


def test_through_prune(parent: Path, rows_file: Path, tmp_path: Path) -> None:
    options = {"window": "4", "steps": "8", "schedule": "staged", "hit-rate": "true"}
    child = prune(parent, "tsep", 3, tmp_path / "child", data=rows_file, options=options)
    assert child.experts_kept == (3, 3)
    assert child.manifest is not None
    assert child.manifest.options["hit_rate"] is True
    assert child.manifest.semantics == "slice"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": (), "labels": ()}, "give --data FILE"),
        ({"options": {"window": 0}}, "window is 0"),
        ({"options": {"steps": 0}}, "steps is 0"),
        ({"options": {"beta": -0.1}}, "beta is -0.1"),
        ({"protect": {0: (0, 1, 2)}}, "layer 0 is to keep 2 experts, and 3 are protected"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, loaded: Checkpoint, rows_file: Path) -> None:
    with pytest.raises(PlanError, match=message):
        tsep(job_of(loaded, rows_file, (2, 2), **changes))
