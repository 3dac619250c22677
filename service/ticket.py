"""An admitted request and its items, from admission to the answer."""

import asyncio
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Literal

from service.deployments import Deployment
from service.schemas import Query

Outcome = Literal["ok", "failed", "cancelled", "timeout", "drained", "client_error"]
Way = Literal["primary", "cascade"]


@dataclass(eq=False, slots=True)
class Ticket:
    """One admitted request. Times are seconds of one monotonic clock.

    future: resolved once, with None when every row is there, or with the error. outcome: set at that moment.
    rows: the logits of each item, empty while there are none. inside: items that still hold a slot. way: `cascade` if
    another deployment has answered these items before.
    """

    deployment: Deployment
    query: Query
    request_id: str
    deadline: float
    admitted_at: float
    future: asyncio.Future[None]
    way: Way = "primary"
    items: list["Item"] = field(default_factory=list)
    outcome: Outcome | None = None
    timer: asyncio.TimerHandle | None = None
    rows: list[list[float]] = field(default_factory=list)
    missing: int = 0
    inside: int = 0
    tokenized_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of all items, special tokens included, after truncation."""
        return sum(item.tokens for item in self.items)


@dataclass(eq=False, slots=True)
class Item:
    """One input of a request. ids: what the encoder made of it, as long as it has tokens.

    order: its place in the order of arrival at the queues. failed: by its own fault. length: tokens before truncation.
    has_left: its slot has been given back. pass_seconds: of the pass that ran it. device_seconds: its share of that, by
    tokens.
    """

    ticket: Ticket
    index: int
    chars: int
    ids: Sized = ()
    length: int = 0
    order: int = 0
    failed: bool = False
    has_left: bool = False
    pass_seconds: float = 0.0
    device_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Its cost in a packed batch."""
        return len(self.ids)

    @property
    def truncated(self) -> bool:
        return self.length > len(self.ids)

    def is_dead(self, now: float) -> bool:
        """Nobody waits for it any more, or its deadline has passed."""
        return self.ticket.outcome is not None or now >= self.ticket.deadline


Clock = Callable[[], float]
