"""A failure stays with the item that causes it."""

import pytest
import torch

from service.forward import Failure, Ran, run
from tests.service.toys import BROKEN, HUGE, INF, NAN, POISON, ToyModel


def codes(ran: Ran) -> list[str]:
    return [result.code if isinstance(result, Failure) else "ok" for result in ran.results]


def test_one_pass() -> None:
    model = ToyModel()
    ran = run(model, [(0, 0, 2), (1,)])
    assert ran.results == [[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert (ran.outcome, ran.routed_slots, ran.dropped_slots) == ("ok", 16, 4)
    assert len(model.batches) == 1


def test_poison_fails_alone() -> None:
    model = ToyModel()
    ran = run(model, [(0,), (POISON,), (2,)])
    assert codes(ran) == ["ok", "inference_failed", "ok"]
    assert (ran.outcome, ran.lacked_memory) == ("retried", False)
    # The batch, then each item once: never again.
    assert [len(batch) for batch in model.batches] == [3, 1, 1, 1]
    # Slots of passes that succeeded only.
    assert ran.routed_slots == 8


def test_a_lone_item_is_rerun_once() -> None:
    model = ToyModel()
    ran = run(model, [(POISON,)])
    assert (codes(ran), ran.outcome, len(model.batches)) == (["inference_failed"], "failed", 2)


def test_non_finite_logits_are_never_rows() -> None:
    ran = run(ToyModel(), [(NAN, 1), (1,), (INF, 1)])
    assert codes(ran) == ["invalid_output", "ok", "invalid_output"]
    assert [result.kind for result in ran.results if isinstance(result, Failure)] == ["nan", "inf"]
    assert ran.outcome == "ok"


def test_out_of_memory_halves() -> None:
    model = ToyModel()
    ran = run(model, [(0,), (1,), (HUGE,), (2,)])
    assert codes(ran) == ["ok"] * 4
    assert (ran.outcome, ran.lacked_memory) == ("split", True)
    assert [len(batch) for batch in model.batches] == [4, 2, 2, 1, 1]


def test_out_of_memory_alone() -> None:
    class Tiny(ToyModel):
        def classify(self, sequences: object) -> object:  # type: ignore[override]
            raise MemoryError

    ran = run(Tiny(), [(0,), (1,)])
    assert (codes(ran), ran.outcome, ran.lacked_memory) == (["out_of_memory"] * 2, "failed", True)


def test_a_broken_device_is_not_retried() -> None:
    model = ToyModel()
    with pytest.raises(torch.AcceleratorError):
        run(model, [(BROKEN,), (0,)])
    assert len(model.batches) == 1


def test_a_model_that_loses_rows_fails() -> None:
    class Short(ToyModel):
        def classify(self, sequences: list[tuple[int, ...]]) -> object:  # type: ignore[override]
            return super().classify(sequences[:-1])

    assert codes(run(Short(), [(0,), (1,)])) == ["inference_failed"] * 2
