"""True labels: what each call is told, and that labels and answers find each other in any order."""

import pytest

from service.metrics import Metrics
from service.storage.events import Feedback, FeedbackRefusedError
from service.storage.store import Store
from tests.service.storage.conftest import Open
from tests.service.storage.records import (
    exposure,
    flushed,
    label,
    label_request,
    number,
    pair,
    sample,
    send,
)


def test_the_same_label_again_is_unchanged(store: Store) -> None:
    store.record(exposure("a"))
    assert send(store, label("a"), label("a", item=1)) == ("matched", "orphan")
    assert send(store, label("a"), label("a", item=1)) == ("unchanged", "unchanged")
    assert number(store, "labelled", "small") == 1


@pytest.mark.parametrize("item", [0, 1])
def test_another_label_is_a_conflict_and_nothing_of_the_call_is_kept(store: Store, item: int) -> None:
    send(store, label("a", "no"))
    call = [label("b"), label("b", item=1)]
    call.insert(item, label("a", "yes"))
    with pytest.raises(FeedbackRefusedError) as refused:
        send(store, *call)
    assert (refused.value.code, refused.value.item) == ("feedback_conflict", item)
    assert send(store, label("b")) == ("orphan",)


def test_a_call_can_contradict_itself(store: Store) -> None:
    with pytest.raises(FeedbackRefusedError):
        send(store, label("a", "yes"), label("a", "no"))
    assert send(store, label("a", "yes"), label("a", "no"), replace=True) == ("orphan", "replaced")
    assert send(store, label("a", "no")) == ("unchanged",)


def test_a_label_waits_for_its_answer(store: Store, metrics: Metrics) -> None:
    assert send(store, label("a"), label("b")) == ("orphan", "orphan")
    store.record(exposure("a"))
    store.record(pair("b"))
    flushed(store, metrics)
    assert number(store, "right", "small") == 1
    assert send(store, label("a")) == ("unchanged",)


def test_a_label_waits_for_its_pair(store: Store, metrics: Metrics) -> None:
    store.declare("e", 1, "shadow", "full", "small")
    store.record(exposure("a", intended="full", served="full"))
    assert send(store, label("a")) == ("matched",)
    assert number(store, "labelled_pairs", predicted="both_right") == 0
    store.record(pair("a"))
    flushed(store, metrics)
    assert number(store, "labelled_pairs", predicted="both_right") == 1
    assert number(store, "labelled", "full") == 0, "a shadow is compared by pairs only"


def test_a_request_id_stands_for_its_request(store: Store) -> None:
    store.record(exposure("a", request_id="mine"))
    assert send(store, label_request("mine")) == ("matched",)
    assert send(store, label("a")) == ("unchanged",)
    store.record(exposure("b", request_id="mine"))
    with pytest.raises(FeedbackRefusedError) as refused:
        send(store, label("a"), label_request("mine"))
    assert (refused.value.code, refused.value.item) == ("ambiguous_request_id", 1)


def test_a_label_waits_for_a_request_id(store: Store, metrics: Metrics) -> None:
    assert send(store, label_request("mine", "no")) == ("orphan",)
    assert send(store, label_request("mine", "no")) == ("unchanged",)
    assert send(store, label_request("mine", "yes"), replace=True) == ("replaced",)
    for id in ("a", "b"):  # the first to come is meant
        store.record(exposure(id, request_id="mine"))
        flushed(store, metrics)
    assert number(store, "right", "small") == 1
    assert send(store, label("a"), label("b")) == ("unchanged", "matched")


def test_a_label_that_waited_for_a_request_id_finds_the_pair_that_came_first(store: Store, metrics: Metrics) -> None:
    store.declare("e", 1, "shadow", "full", "small")
    store.record(pair("a"))
    assert send(store, label_request("mine")) == ("orphan",)
    store.record(exposure("a", request_id="mine", intended="full"))
    flushed(store, metrics)
    assert number(store, "labelled_pairs", predicted="both_right") == 1


def test_who_said_so_is_kept(store: Store, open_store: Open) -> None:
    send(store, Feedback("a", None, 0, "yes", key_name="labellers"))
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT id, item, label, key_name FROM feedback").all() == [
            ("a", 0, "yes", "labellers")
        ]


def test_thousands_of_labels_in_one_call(store: Store) -> None:
    labels = [label(f"id-{number}") for number in range(5000)]
    assert send(store, *labels) == ("orphan",) * 5000
    assert send(store, *labels) == ("unchanged",) * 5000


def test_written_labels_are_counted_by_rows(store: Store, metrics: Metrics) -> None:
    send(store, label("a"), label("b"))
    send(store, label("a"))
    send(store, label("a", "no"), replace=True)
    assert sample(metrics, "events_written_total", kind="feedback") == 2
