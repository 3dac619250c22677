"""Which waiting items run together: pure functions over queues, no clock, no timer, no lock.

The worker takes whatever waits whenever it is free, so a lone request never waits for company and a crowd is batched.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from service.deployments import Deployment
from service.ticket import Item

Queues = dict[Deployment, deque[Item]]


@dataclass(frozen=True)
class Budget:
    """The greatest batch: tokens of a packed batch, and items."""

    tokens: int
    items: int


@dataclass(eq=False)
class Batch:
    """Items of one deployment that run in one forward pass."""

    deployment: Deployment
    items: list[Item] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)


def fill(batch: Batch, queue: deque[Item], budget: Budget, now: float) -> list[Item]:
    """Move items from the front of the queue into the batch, in order, until the first that does not fit.

    Dead items leave the queue without joining; they are returned. A batch's first item always fits: the budget is at
    least the model's length, except after an out-of-memory error lowered it.
    """
    dead: list[Item] = []
    tokens = batch.tokens
    while queue:
        head = queue[0]
        if head.is_dead(now):
            dead.append(queue.popleft())
            continue
        if batch.items and (len(batch.items) >= budget.items or tokens + head.tokens > budget.tokens):
            break
        batch.items.append(queue.popleft())
        tokens += head.tokens
    return dead


def form(queues: Queues, budget_of: Callable[[Deployment], Budget], now: float) -> tuple[Batch | None, list[Item]]:
    """Take a batch from the deployment whose head has waited longest. Returns (batch or None, dead items dropped)."""
    dead: list[Item] = []
    while waiting := [deployment for deployment, queue in queues.items() if queue]:
        oldest = min(waiting, key=lambda deployment: queues[deployment][0].order)
        batch = Batch(oldest)
        dead += fill(batch, queues[oldest], budget_of(oldest), now)
        if batch.items:
            return batch, dead
    return None, dead


def bury(batch: Batch, now: float) -> list[Item]:
    """Take the dead items out of a batch that waited, just before it is launched."""
    dead = [item for item in batch.items if item.is_dead(now)]
    if dead:
        batch.items = [item for item in batch.items if not item.is_dead(now)]
    return dead


def count_tokens(items: Iterable[Item]) -> int:
    """Tokens of some items."""
    return sum(item.tokens for item in items)
