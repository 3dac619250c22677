"""Batches by token budget for offline work, and batches with nothing in them."""

from collections.abc import Iterator, Sequence, Sized


def by_length(sequences: Sequence[Sized], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the sequences, longest first, cut whenever the next one would exceed `batch_tokens` in all.

    A sequence longer than the budget is a batch of its own. Neighbours in length share little padding.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    batch: list[int] = []
    tokens = 0
    for index in order:
        if batch and tokens + len(sequences[index]) > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += len(sequences[index])
    if batch:
        yield batch


def batch_of(tokens: int, max_items: int, max_length: int) -> list[list[int]]:
    """`tokens` tokens in up to `max_items` sequences, more if each would exceed `max_length`, of nearly equal length.

    Many sequences, because the last layer may run for one token of each: it then meets its sizes too.
    """
    items = max(min(tokens, max_items), -(-tokens // max_length))
    return [[0] * (tokens // items + (item < tokens % items)) for item in range(items)]
