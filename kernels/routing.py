"""What routing means, everywhere: the policy that makes it and the slots that come out of it.

Legend: T tokens, K chosen experts per token, E router rows (experts before pruning), V variants that share a batch,
N = T * K pairs; pair n = t * K + j is token t's choice j. P physical experts, M tiles.
A slot is the one currency between router, kernels, calibration and metrics:
  slot >= 0    run the physical expert with that index
  slot == -1   skip: no work, adds nothing, weight 0
  slot <= -2   constant row j = -2 - slot: no work, adds weight * const_CD[j]
"""

from dataclasses import dataclass
from typing import Literal

import torch

SKIP = -1
FIRST_CONSTANT = -2

ScoreFunction = Literal["softmax", "sigmoid"]
Survivors = Literal["keep", "old_sum", "one"]
Activation = Literal["silu", "gelu_erf", "gelu_tanh", "relu", "relu_squared"]


@dataclass(frozen=True)
class RouterPolicy:
    """How router logits become slots and weights.

    top_k      experts chosen per token.
    score      softmax over the visible rows, or an elementwise sigmoid.
    normalize  divide the chosen scores by their sum, kept or pruned alike (Mixtral, Qwen3-MoE with norm_topk_prob).
    scale      multiplies every weight (DeepSeek's routed_scaling_factor).
    slice      rows whose table entry is -1 are hidden before the softmax and the choice, so top-k refills.
    survivors  keep: weights of pruned choices are lost. old_sum: survivors are scaled up to the old sum.
               one: survivors are scaled to sum 1.
    """

    top_k: int
    score: ScoreFunction = "softmax"
    normalize: bool = False
    scale: float = 1.0
    slice: bool = False
    survivors: Survivors = "keep"


@dataclass(frozen=True)
class Routing:
    """slot_TK: int32 [T, K], see the module's legend. weight_TK: float32 [T, K], 0 wherever the slot is -1."""

    slot_TK: torch.Tensor
    weight_TK: torch.Tensor


@dataclass(frozen=True)
class ExpertWeights:
    """The stacked weights of one layer's surviving experts, in checkpoint layout; D is the model's width.

    w_in_PGD   [P, G, D]: G = 2F, gate rows first, then up rows; G = F where experts are not gated.
    w_out_PDF  [P, D, F].
    const_CD   [C, D] or None: the vectors that constant slots add.
    b_in_PG    [P, G] or None, b_out_PD [P, D] or None: what the two products add.
    Each expert computes w_out @ (act(gate) * up) + b_out, or w_out @ act(w_in @ x + b_in) + b_out if not gated.
    kept_share  the expected share of pairs that run an expert, in (0, 1]; only the choice of a tile size reads it.
    """

    w_in_PGD: torch.Tensor
    w_out_PDF: torch.Tensor
    const_CD: torch.Tensor | None = None
    b_in_PG: torch.Tensor | None = None
    b_out_PD: torch.Tensor | None = None
    activation: Activation = "silu"
    gated: bool = True
    kept_share: float = 1.0


@dataclass(frozen=True)
class SortedPairs:
    """The live pairs in order of their experts, cut into tiles of at most BM rows that one weight tile serves.

    order_N        int32 [N]: pair indices sorted by slot, stable; only the first offset_Q[P] entries are defined.
    offset_Q       int32 [Q = P + 1]: expert p owns the sorted rows offset_Q[p] .. offset_Q[p + 1].
    tile_expert_M  int32 [M]: the expert of each tile.
    tile_row_M     int32 [M]: its first sorted row.
    tile_rows_M    int32 [M]: how many rows it has, 1 .. BM.
    num_tiles_1    int32 [1]: how many tiles are defined. M is the largest number that any routing could need.
    block_rows     BM, which the products that walk these tiles must use too.
    """

    order_N: torch.Tensor
    offset_Q: torch.Tensor
    tile_expert_M: torch.Tensor
    tile_row_M: torch.Tensor
    tile_rows_M: torch.Tensor
    num_tiles_1: torch.Tensor
    block_rows: int


def max_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """The largest sum of ceil(count / block_rows) over experts that any routing of so many pairs can give."""
    return (num_pairs + min(num_experts, num_pairs) * (block_rows - 1)) // block_rows
