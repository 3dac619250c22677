"""Batches are cut by tokens and items, in order, with a clock that the test holds."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching import Batch, Budget, Queues, bury, fill, form
from service.deployments import Deployment
from service.schemas import Query
from service.ticket import Item, Ticket


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def deployment(name: str) -> Deployment:
    return Deployment(name, "mood", "full", Path(name), max_batch_tokens=100)


def item(
    loop: asyncio.AbstractEventLoop, owner: Deployment, tokens: int, order: int = 0, deadline: float = 1e9
) -> Item:
    ticket = Ticket(owner, Query(["x"]), "req", deadline, 0.0, loop.create_future())
    return Item(ticket, 0, 1, ids=(1,) * tokens, length=tokens, order=order)


def items(loop: asyncio.AbstractEventLoop, owner: Deployment, lengths: Sequence[int]) -> list[Item]:
    return [item(loop, owner, tokens, order) for order, tokens in enumerate(lengths)]


def drained(queues: Queues, budget: Budget, now: float = 0.0) -> list[Batch]:
    batches = []
    while (formed := form(queues, lambda _: budget, now)[0]) is not None:
        batches.append(formed)
    return batches


def lengths(batches: list[Batch]) -> list[list[int]]:
    return [[item.tokens for item in batch.items] for batch in batches]


def test_published_example(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    queues = {mood: deque(items(loop, mood, [30, 30, 40, 10]))}
    assert lengths(drained(queues, Budget(tokens=100, items=64))) == [[30, 30, 40], [10]]


def test_the_first_that_does_not_fit_ends_the_batch(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    queues = {mood: deque(items(loop, mood, [60, 50, 1, 1]))}
    assert lengths(drained(queues, Budget(tokens=100, items=64))) == [[60], [50, 1, 1]]


def test_the_limit_is_exact(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    queues = {mood: deque(items(loop, mood, [50, 50, 50, 51]))}
    assert lengths(drained(queues, Budget(tokens=100, items=64))) == [[50, 50], [50], [51]]


def test_items_are_limited_too(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    queues = {mood: deque(items(loop, mood, [1] * 5))}
    assert lengths(drained(queues, Budget(tokens=100, items=2))) == [[1, 1], [1, 1], [1]]


def test_oldest_head_first(loop: asyncio.AbstractEventLoop) -> None:
    mood, topics = deployment("mood"), deployment("topics")
    queues = {
        topics: deque([item(loop, topics, 1, order=1), item(loop, topics, 1, order=4)]),
        mood: deque([item(loop, mood, 1, order=0), item(loop, mood, 1, order=5)]),
    }
    assert [batch.deployment for batch in drained(queues, Budget(100, 1))] == [mood, topics, topics, mood]


def test_dead_items_leave_without_running(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    cancelled, expired, alive = (item(loop, mood, 10, deadline=deadline) for deadline in (1e9, 5.0, 5.1))
    cancelled.ticket.outcome = "cancelled"
    batch, dead = form({mood: deque([cancelled, expired, alive])}, lambda _: Budget(100, 64), now=5.0)
    assert batch is not None
    assert batch.items == [alive]
    assert dead == [cancelled, expired]


def test_nothing_but_the_dead(loop: asyncio.AbstractEventLoop) -> None:
    mood, topics = deployment("mood"), deployment("topics")
    queues: Queues = {mood: deque(items(loop, mood, [1])), topics: deque(items(loop, topics, [1, 1]))}
    batch, dead = form(queues, lambda _: Budget(100, 64), now=1e9)
    assert batch is None
    assert len(dead) == 3


def test_the_waiting_batch_is_freed_of_the_dead_and_filled_up(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    gone, stays, late = items(loop, mood, [60, 40, 60])
    batch = Batch(mood, [gone, stays])
    gone.ticket.outcome = "cancelled"
    assert bury(batch, now=0.0) == [gone]
    assert fill(batch, deque([late]), Budget(100, 64), now=0.0) == []
    assert batch.items == [stays, late]


def test_a_text_above_a_lowered_budget_runs_alone(loop: asyncio.AbstractEventLoop) -> None:
    mood = deployment("mood")
    queues = {mood: deque(items(loop, mood, [30, 5, 30]))}
    assert lengths(drained(queues, Budget(tokens=10, items=64))) == [[30], [5], [30]]


@given(
    arrivals=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 50), st.booleans()), max_size=60),
    tokens=st.integers(50, 200),
    limit=st.integers(1, 8),
)
def test_every_item_runs_once_in_order_within_the_limits(
    loop: asyncio.AbstractEventLoop, arrivals: list[tuple[str, int, bool]], tokens: int, limit: int
) -> None:
    owners = {name: deployment(name) for name in "abc"}
    queues: Queues = {}
    numbers = count()
    alive: dict[str, list[Item]] = {name: [] for name in "abc"}
    for name, size, is_alive in arrivals:
        arrived = item(loop, owners[name], size, next(numbers), deadline=10.0 if is_alive else 1.0)
        queues.setdefault(owners[name], deque()).append(arrived)
        if is_alive:
            alive[name].append(arrived)
    ran: dict[str, list[Item]] = {name: [] for name in "abc"}
    for batch in drained(queues, Budget(tokens, limit), now=1.0):
        assert 1 <= len(batch.items) <= limit
        assert batch.tokens <= tokens
        assert {member.ticket.deployment for member in batch.items} == {batch.deployment}
        ran[batch.deployment.name] += batch.items
    assert ran == alive
    assert not any(queues.values())
