"""Which neuron of one expert is which of another: they may stand in any order, and mixing must not blur them.

Legend: F expert inner width, D model width, G = 2F (F if not gated). A neuron is a gate row, an up row and a down
column together.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from models.pruning.plan import IntArray


def matching(
    w_in_GD: torch.Tensor, w_out_DF: torch.Tensor, reference_in_GD: torch.Tensor, reference_out_DF: torch.Tensor
) -> IntArray:
    """int64 [F]: the expert's neuron that fits the reference's neuron best, each used once.

    Maximises the sum over matched neurons of up . up + gate . gate + down . down (arXiv 2310.01334), in float64.
    """
    score_FF = reference_out_DF.double().T @ w_out_DF.double()
    width = w_out_DF.shape[1]
    for mine, theirs in zip(*(torch.split(w.double(), width) for w in (reference_in_GD, w_in_GD)), strict=True):
        score_FF = score_FF + mine @ theirs.T
    _, neuron_F = linear_sum_assignment(score_FF.cpu().numpy(), maximize=True)
    return np.asarray(neuron_F, dtype=np.int64)


def permuted(w_in_GD: torch.Tensor, w_out_DF: torch.Tensor, neuron_F: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function with its neurons in another order: gate rows, up rows and down columns move together."""
    index_F = torch.from_numpy(neuron_F).to(w_in_GD.device)
    blocks = [block[index_F] for block in torch.split(w_in_GD, w_out_DF.shape[1])]
    return torch.cat(blocks), w_out_DF[:, index_F]
