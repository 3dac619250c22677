"""Batches by token budget for offline work."""

from collections.abc import Iterator, Sequence


def by_length(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
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
