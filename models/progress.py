"""How long work reports how far it is, without knowing who looks."""

from typing import Protocol


class Progress(Protocol):
    """Called with units done, units in all, and a short message; the message changes when a new stage begins."""

    def __call__(self, done: int, total: int, message: str) -> None: ...


def silent(done: int, total: int, message: str) -> None:
    """The progress of a caller who does not look."""
