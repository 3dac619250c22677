"""The lane alone, with a clock that the test holds."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.deployments import Deployment
from service.lane import CAUTION_SECONDS, Lane
from service.schemas import Query
from service.ticket import Item, Ticket


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Setup:
    """A lane for batches of 4 items and 10 tokens, with what it dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.clock = Clock()
        self.dropped: list[Item] = []
        self.lane = Lane(4, self.clock, self.dropped.extend)
        self.mood = Deployment("mood", "mood", "full", Path("mood"), max_batch_tokens=10)

    def put(self, *lengths: int, deadline: float = 1e9) -> Ticket:
        ticket = Ticket(self.mood, Query(["x"]), "req", deadline, 0.0, self.loop.create_future())
        ticket.items = [Item(ticket, index, 1, ids=(1,) * length) for index, length in enumerate(lengths)]
        self.lane.put(self.mood, ticket.items)
        return ticket

    def launch(self) -> list[int]:
        batch = self.lane.next()
        assert batch is not None
        return [item.tokens for item in batch.items]


@pytest.fixture
def setup() -> Iterator[Setup]:
    loop = asyncio.new_event_loop()
    yield Setup(loop)
    loop.close()


def test_a_lone_item_is_launched_at_once(setup: Setup) -> None:
    setup.put(3)
    assert setup.launch() == [3]
    counts = setup.lane.counts()
    assert (counts.queued, counts.prefetched, counts.running, counts.tokens) == (0, 0, 1, 3)


def test_depth_of_the_prefetch_is_one(setup: Setup) -> None:
    for length in (6, 7, 8, 9):
        setup.put(length)
    assert setup.launch() == [6]
    counts = setup.lane.counts()
    assert (counts.queued, counts.prefetched, counts.running) == (2, 1, 1)
    assert [setup.launch() for _ in range(3)] == [[7], [8], [9]]


def test_an_arrival_while_a_batch_runs_is_formed_ahead(setup: Setup) -> None:
    setup.put(6)
    setup.launch()
    setup.put(2)
    assert setup.lane.counts().prefetched == 1
    setup.put(3)
    assert setup.lane.counts().queued == 1
    # Still in order, and filled up when it is launched.
    assert setup.launch() == [2, 3]


def test_the_dead_are_dropped_when_formed_and_before_launch(setup: Setup) -> None:
    setup.put(6)
    cancelled = setup.put(6, deadline=1e9)
    expired = setup.put(6, deadline=5.0)
    setup.put(7)
    setup.launch()
    cancelled.outcome = "cancelled"  # after it was formed ahead
    setup.clock.now = 5.0
    assert setup.launch() == [7]
    assert setup.dropped == [*cancelled.items, *expired.items]


def test_discard_takes_queued_items_only(setup: Setup) -> None:
    setup.put(6)
    ahead, queued = setup.put(6), setup.put(6, 6)
    setup.launch()
    assert setup.lane.discard(ahead) == []
    assert setup.lane.discard(queued) == queued.items
    assert setup.launch() == [6]


def test_close_returns_everything(setup: Setup) -> None:
    tickets = [setup.put(6) for _ in range(3)]
    setup.launch()
    left = setup.lane.close()
    assert {id(item) for item in left} == {id(item) for ticket in tickets for item in ticket.items}
    assert setup.lane.next() is None
    late = setup.put(1)
    assert setup.dropped == late.items


def test_lowered_limit_returns_after_a_clean_minute(setup: Setup) -> None:
    setup.lane.lower(5)
    setup.put(5, 5)
    assert setup.launch() == [5]
    assert setup.launch() == [5]
    setup.clock.now = CAUTION_SECONDS
    setup.put(5, 5)
    assert setup.launch() == [5, 5]


def test_stalled_only_while_work_waits(setup: Setup) -> None:
    setup.put(1)
    setup.clock.now = 59.0
    assert not setup.lane.is_stalled(60)
    setup.clock.now = 61.0
    assert setup.lane.is_stalled(60)
    setup.launch()
    assert not setup.lane.is_stalled(60)
    setup.lane.close()
    setup.clock.now = 1000.0
    assert not setup.lane.is_stalled(60)
