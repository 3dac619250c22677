"""Dropout for packed items: of activations, and of whole branches per item (arXiv 1603.09382)."""

import torch
import torch.nn.functional as F

from models.classifier import Batch


class Dropout:
    """The noise of one training step; draws from torch's generator, which the loop seeds per step."""

    def __init__(self, batch: Batch, activation: float, path: float) -> None:
        self.activation = activation
        self.path = path
        self.length_B = torch.tensor(batch.lengths, device=batch.device)

    def embedding(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_TD, self.activation) if self.activation else x_TD

    def branch(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Zero activations, then all of a sequence's activations; survivors are scaled to keep the mean."""
        x_TD = self.embedding(x_TD)
        if not self.path:
            return x_TD
        keep_B = (torch.rand(len(self.length_B), device=x_TD.device) >= self.path).to(x_TD.dtype) / (1 - self.path)
        return x_TD * keep_B.repeat_interleave(self.length_B).unsqueeze(1)
