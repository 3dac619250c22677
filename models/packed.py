"""A batch without padding: all tokens in one row, plus what attention needs to keep sequences apart.

Legend: T packed tokens, B sequences, b sequences of one group, L longest of that group, M = sum of b * L.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Group:
    """Sequences of similar length that share one attention call.

    sequences  their indices in the batch.
    row_bL     int64 [b, L]: packed row of each position; positions past a sequence's end repeat its last row, which
               is harmless because causal attention never looks to the right.
    length_b   int64 [b].
    """

    sequences: tuple[int, ...]
    row_bL: torch.Tensor
    length_b: torch.Tensor

    @property
    def is_rectangle(self) -> bool:
        return bool((self.length_b == self.row_bL.shape[1]).all())


@dataclass(frozen=True)
class PackedBatch:
    """ids_T, position_T: int64 [T]. lengths: tokens of each sequence. last_B: int64 [B], packed row of each last token.

    groups partition the sequences; source_T: int64 [T], where each token lies in the groups' results laid end to end.
    """

    ids_T: torch.Tensor
    position_T: torch.Tensor
    lengths: tuple[int, ...]
    last_B: torch.Tensor
    groups: tuple[Group, ...]
    source_T: torch.Tensor

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "PackedBatch":
        """Lay the sequences end to end. Raises ValueError if there is none or one is empty."""
        lengths = tuple(len(sequence) for sequence in sequences)
        if not lengths or min(lengths) == 0:
            raise ValueError("a batch needs at least one sequence, and every sequence at least one token")
        length_B = torch.tensor(lengths)
        end_B = length_B.cumsum(0)
        start_B = end_B - length_B
        ids_T = torch.tensor([token for sequence in sequences for token in sequence])
        position_T = torch.arange(len(ids_T)) - start_B.repeat_interleave(length_B)
        groups, source_T = _group(lengths, length_B, start_B)
        return cls(
            ids_T=ids_T.to(device),
            position_T=position_T.to(device),
            lengths=lengths,
            last_B=(end_B - 1).to(device),
            groups=tuple(Group(g.sequences, g.row_bL.to(device), g.length_b.to(device)) for g in groups),
            source_T=source_T.to(device),
        )

    @property
    def num_tokens(self) -> int:
        return int(self.ids_T.shape[0])

    @property
    def device(self) -> torch.device:
        return self.ids_T.device


def _group(lengths: tuple[int, ...], length_B: torch.Tensor, start_B: torch.Tensor) -> tuple[list[Group], torch.Tensor]:
    """Sequences whose lengths share a power of two: at most half of a group is padding, and groups are few."""
    members = defaultdict(list)
    for index, length in enumerate(lengths):
        members[length.bit_length()].append(index)
    source_T = torch.empty(int(length_B.sum()), dtype=torch.int64)
    groups, offset = [], 0
    for sequences in members.values():
        index_b = torch.tensor(sequences)
        length_b, start_b = length_B[index_b], start_B[index_b]
        longest = int(length_b.max())
        column_L = torch.arange(longest)
        row_bL = start_b[:, None] + torch.minimum(column_L, length_b[:, None] - 1)
        real_bL = column_L < length_b[:, None]
        source_T[row_bL[real_bL]] = offset + torch.nonzero(real_bL.flatten()).squeeze(1)
        groups.append(Group(tuple(sequences), row_bL, length_b))
        offset += row_bL.numel()
    return groups, source_T
