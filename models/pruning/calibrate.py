"""One pass over task data that fills the statistics methods read."""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.routing import ExpertWeights, Routing
from models.batches import by_length
from models.decoder import MoEClassifier
from models.packed import PackedBatch
from models.progress import Progress, silent
from models.pruning.stats import RoutingCounts


class CountingTap:
    """Counts how often each physical expert is chosen, per layer, on the routing the model really used."""

    def __init__(self, model: MoEClassifier) -> None:
        self.counts = {
            i: RoutingCounts(0, np.zeros(model.config.layers[i].num_experts, dtype=np.int64))
            for i in model.config.moe_layers
        }

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: ExpertWeights
    ) -> None:
        slot_N = routing.slot_TK[routing.slot_TK >= 0].long()
        count_E = torch.bincount(slot_N, minlength=experts.w_in_PGD.shape[0]).cpu().numpy()
        self.counts[layer] = self.counts[layer] + RoutingCounts(x_TD.shape[0], count_E)


@torch.inference_mode()
def calibrate(
    model: MoEClassifier, sequences: Sequence[Sequence[int]], batch_tokens: int = 4096, progress: Progress = silent
) -> dict[int, RoutingCounts]:
    """Routing counts per MoE layer over all tokens of all sequences; batching does not change them."""
    tap = CountingTap(model)
    done = 0
    for indices in by_length(sequences, batch_tokens):
        model.hidden(PackedBatch.pack([sequences[i] for i in indices], model.device), tap)
        done += len(indices)
        progress(done, len(sequences), "calibrating")
    return tap.counts
