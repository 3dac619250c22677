"""What routing means, everywhere: the policy that makes it and the slots that come out of it.

Legend: T tokens, K chosen experts per token, E router rows (experts before pruning), V variants that share a batch.
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
    """The stacked weights of one layer's surviving experts, in checkpoint layout.

    w_in_PGD   [P, 2F, D], gate rows first, then up rows.
    w_out_PDF  [P, D, F].
    const_CD   [C, D] or None: the vectors that constant slots add.
    Each expert computes w_out @ (silu(gate) * up).
    """

    w_in_PGD: torch.Tensor
    w_out_PDF: torch.Tensor
    const_CD: torch.Tensor | None = None
