"""Causal self-attention over packed sequences, through torch's scaled_dot_product_attention.

Legend: T packed tokens, B sequences, b sequences of one group, L longest of that group, H query heads, G key/value
heads, h head width. Rotary positions follow arXiv 2104.09864 in the half-rotation layout of Hugging Face checkpoints.
"""

import torch
import torch.nn.functional as F

from models.packed import Group, PackedBatch


def rotary_table(head_dim: int, max_tokens: int, theta: float) -> torch.Tensor:
    """cos and sin of every position: float32 [2, max_tokens, head_dim]."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(max_tokens, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_TNh: torch.Tensor, cos_T1h: torch.Tensor, sin_T1h: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + h/2) of every head by the token's angle."""
    left, right = x_TNh.chunk(2, dim=-1)
    return x_TNh * cos_T1h + torch.cat((-right, left), dim=-1) * sin_T1h


def attend(q_THh: torch.Tensor, k_TGh: torch.Tensor, v_TGh: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Every token over itself and the earlier tokens of its sequence: [T, H, h] -> [T, H, h]."""
    results = []
    for group in batch.groups:
        q, k, v = (_rows(x, group) for x in (q_THh, k_TGh, v_TGh))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        results.append(out.transpose(1, 2).flatten(0, 1))
    if len(results) == 1 and batch.groups[0].is_rectangle:
        return results[0]
    return torch.cat(results).index_select(0, batch.source_T)


def attend_pooled(q_BHh: torch.Tensor, k_TGh: torch.Tensor, v_TGh: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """One query per sequence, standing at its last token, over the whole sequence: [B, H, h] -> [B, H, h]."""
    out_BHh = torch.empty_like(q_BHh)
    for group in batch.groups:
        index_b = torch.tensor(group.sequences, device=q_BHh.device)
        mask = None
        if not group.is_rectangle:
            column_L = torch.arange(group.row_bL.shape[1], device=q_BHh.device)
            mask = (column_L < group.length_b[:, None])[:, None, None, :]
        q = q_BHh[index_b].unsqueeze(2)
        k, v = _rows(k_TGh, group), _rows(v_TGh, group)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        out_BHh[index_b] = out.squeeze(2)
    return out_BHh


def _rows(x_TNh: torch.Tensor, group: Group) -> torch.Tensor:
    """[T, N, h] -> [b, N, L, h]; a lone sequence is a view."""
    if len(group.sequences) == 1 and group.row_bL.shape[1] == x_TNh.shape[0]:
        return x_TNh.transpose(0, 1).unsqueeze(0)
    shape = (*group.row_bL.shape, *x_TNh.shape[1:])
    return x_TNh.index_select(0, group.row_bL.flatten()).view(shape).transpose(1, 2)
