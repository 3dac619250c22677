"""Admission: how many items, and how many characters of text, may be inside the engine at once.

Only the event loop touches slots, so a reservation is a comparison and an addition.
"""


class Slots:
    """One slot per item, from admission until the item has left the engine."""

    def __init__(self, limit_items: int, limit_chars: int) -> None:
        self.limit_items = limit_items
        self.limit_chars = limit_chars
        self.items = 0
        self.chars = 0

    def reserve(self, items: int, chars: int) -> bool:
        """Take slots for all of a request's items or for none; return whether they were taken."""
        if self.items + items > self.limit_items or self.chars + chars > self.limit_chars:
            return False
        self.items += items
        self.chars += chars
        return True

    def release(self, items: int, chars: int) -> None:
        """Give slots back. Raises RuntimeError if more are given back than were taken."""
        self.items -= items
        self.chars -= chars
        if self.items < 0 or self.chars < 0:
            raise RuntimeError("a slot was released twice")
