"""Packing sequences of any lengths: every token once, in order, and groups that cover the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.packed import PackedBatch

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=20)


def sequences_of(lengths: list[int]) -> list[list[int]]:
    """Tokens that say where they stand: 1000 * sequence + position."""
    return [[1000 * i + j for j in range(n)] for i, n in enumerate(lengths)]


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_tokens_positions_and_last_rows(lengths: list[int]) -> None:
    batch = PackedBatch.pack(sequences_of(lengths))
    assert batch.ids_T.tolist() == [token for s in sequences_of(lengths) for token in s]
    assert batch.position_T.tolist() == [j for n in lengths for j in range(n)]
    assert batch.ids_T[batch.last_B].tolist() == [1000 * i + n - 1 for i, n in enumerate(lengths)]
    assert batch.num_tokens == sum(lengths)
    assert batch.lengths == tuple(lengths)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_groups_hold_every_token_where_source_says(lengths: list[int]) -> None:
    batch = PackedBatch.pack(sequences_of(lengths))
    assert sorted(i for group in batch.groups for i in group.sequences) == list(range(len(lengths)))
    for group in batch.groups:
        assert group.length_b.tolist() == [lengths[i] for i in group.sequences]
        assert group.row_bL.shape == (len(group.sequences), max(group.length_b.tolist()))
        assert 2 * min(group.length_b.tolist()) > group.row_bL.shape[1], "more than half of a row is padding"
        for i, row_L in zip(group.sequences, group.row_bL.tolist(), strict=True):
            tokens = batch.ids_T[row_L].tolist()
            assert tokens[: lengths[i]] == [1000 * i + j for j in range(lengths[i])]
            assert set(tokens[lengths[i] :]) <= {1000 * i + lengths[i] - 1}, "padding of another sequence"
    end_to_end = torch.cat([group.row_bL.flatten() for group in batch.groups])
    assert torch.equal(end_to_end[batch.source_T], torch.arange(batch.num_tokens))


def test_equal_lengths_make_one_rectangle(poison: None) -> None:
    batch = PackedBatch.pack(sequences_of([5, 5, 5]))
    assert len(batch.groups) == 1
    assert batch.groups[0].is_rectangle
    assert not PackedBatch.pack(sequences_of([4, 5])).groups[0].is_rectangle


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_nothing_to_pack_is_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        PackedBatch.pack(sequences)
