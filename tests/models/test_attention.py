"""Attention over packed sequences against a loop that any reader believes.

Legend: T packed tokens, B sequences, H query heads, G key/value heads, h head width.
"""

import math

import pytest
import torch

from models.attention import attend, attend_pooled, rotary_table, rotate
from models.packed import PackedBatch

HEAD = 6
LENGTHS = {
    "one token": [1],
    "one sequence": [9],
    "a rectangle": [4, 4, 4],
    "one group, unequal": [5, 7, 6],
    "several groups, mixed order": [17, 1, 3, 40, 2, 33, 1],
    "a lone sequence in each group": [2, 4, 8, 16],
}


def by_hand(q_THh: torch.Tensor, k_TGh: torch.Tensor, v_TGh: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Each query over itself and what stands before it in its sequence; query head h reads key head h // (H / G)."""
    out_THh, start = torch.zeros_like(q_THh), 0
    share = q_THh.shape[1] // k_TGh.shape[1]
    for length in lengths:
        for t in range(start, start + length):
            for head in range(q_THh.shape[1]):
                k_Lh, v_Lh = (x[start : t + 1, head // share] for x in (k_TGh, v_TGh))
                out_THh[t, head] = torch.softmax(k_Lh @ q_THh[t, head] / math.sqrt(HEAD), dim=0) @ v_Lh
        start += length
    return out_THh


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", LENGTHS)
def test_attention_stays_within_a_sequence_and_looks_back(name: str, kv_heads: int, poison: None) -> None:
    lengths = LENGTHS[name]
    batch = PackedBatch.pack([[1] * n for n in lengths])
    q = torch.randn(sum(lengths), 4, HEAD)
    k, v = torch.randn(2, sum(lengths), kv_heads, HEAD).unbind()
    expected = by_hand(q, k, v, lengths)
    torch.testing.assert_close(attend(q, k, v, batch), expected, rtol=1e-5, atol=1e-6)
    pooled = attend_pooled(q[batch.last_B], k, v, batch)
    torch.testing.assert_close(pooled, expected[batch.last_B], rtol=1e-5, atol=1e-6)


def test_rotation_is_multiplication_by_a_unit_complex_number() -> None:
    """Pair (i, i + h/2) of position p turns by p * theta ** (-2 i / h)."""
    table = rotary_table(HEAD, 50, 100.0)
    assert table.shape == (2, 50, HEAD)
    x_TNh, position_T = torch.randn(7, 2, HEAD), torch.tensor([0, 1, 2, 10, 20, 30, 49])
    cos_T1h, sin_T1h = table[:, position_T].unsqueeze(2)
    half = HEAD // 2
    angle_Th = position_T[:, None] * torch.tensor([100.0 ** (-2 * i / HEAD) for i in range(half)])
    turned = torch.complex(x_TNh[..., :half], x_TNh[..., half:]) * torch.polar(torch.ones(()), angle_Th)[:, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x_TNh, cos_T1h, sin_T1h), expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    table = rotary_table(HEAD, 50, 10000.0)
    q, k = torch.randn(2, 1, 1, HEAD).unbind()

    def score(at: int, other: int) -> float:
        turned = [rotate(x, *table[:, p : p + 1].unsqueeze(2)) for x, p in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert score(12, 5) == pytest.approx(score(40, 33), abs=1e-5)
    assert score(12, 5) != pytest.approx(score(12, 6), abs=1e-3)
