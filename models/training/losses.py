"""Losses on routers, and distillation. Legend: T tokens, E experts, B texts, C classes, G corpora, L layers."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.routing import Routing
from models.classifier import Experts


class RouterTap:
    """Collects, per layer, the router's probabilities and the experts it chose, with gradients."""

    def __init__(self) -> None:
        self.probability_TE: list[torch.Tensor] = []
        self.slot_TK: list[torch.Tensor] = []

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None:
        self.probability_TE.append(torch.softmax(logits_TE.float(), dim=-1))
        self.slot_TK.append(routing.slot_TK)


def balance_loss(tap: RouterTap) -> torch.Tensor:
    """Load balancing of arXiv 2101.03961, mean over layers: E * sum_e (share of slots)_e * (mean probability)_e; 1 when
    even. Slots of pruned experts count for nobody."""
    terms = []
    for probability_TE, slot_TK in zip(tap.probability_TE, tap.slot_TK, strict=True):
        num_experts = probability_TE.shape[1]
        slot_N = slot_TK[slot_TK >= 0].long()
        share_E = torch.bincount(slot_N, minlength=num_experts)[:num_experts] / max(slot_N.numel(), 1)
        terms.append(num_experts * (share_E * probability_TE.mean(0)).sum())
    return torch.stack(terms).mean()


def router_entropy(tap: RouterTap) -> torch.Tensor:
    """Mean over layers and tokens of the entropy of the router's probabilities, in nats: low when it is decided."""
    return torch.stack([entropy(probability_TE).mean() for probability_TE in tap.probability_TE]).mean()


class DomainLoss(nn.Module):
    """Rewards experts that serve few corpora: entropy of use within a corpus minus entropy of use over all of them.

    A running mean over steps stands in for corpora that a batch does not hold; gradients flow through the batch only.
    """

    MEMORY = 0.9
    use_LGE: torch.Tensor

    def __init__(self, num_layers: int, num_corpora: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("use_LGE", torch.full((num_layers, num_corpora, num_experts), 1.0 / num_experts))

    def forward(self, tap: RouterTap, corpus_T: torch.Tensor) -> torch.Tensor:
        """tap of one step and the corpus of each of its tokens -> a scalar, lower when experts specialise."""
        terms = []
        for layer, probability_TE in enumerate(tap.probability_TE):
            rows = []
            for corpus in range(self.use_LGE.shape[1]):
                old_E = self.use_LGE[layer, corpus]
                here_T = corpus_T == corpus
                if not here_T.any():
                    rows.append(old_E)
                    continue
                batch_E = probability_TE[here_T].mean(0)
                new_E = (self.MEMORY * old_E + (1 - self.MEMORY) * batch_E).detach()
                self.use_LGE[layer, corpus] = new_E
                rows.append(new_E + batch_E - batch_E.detach())  # the running value, with the batch's gradient
            use_GE = torch.stack(rows)
            terms.append(entropy(use_GE).mean() - entropy(use_GE.mean(0)))
        return torch.stack(terms).mean()


def entropy(p: torch.Tensor) -> torch.Tensor:
    """Over the last axis, in nats."""
    return -(p * p.clamp_min(1e-6).log()).sum(-1)


def distillation_loss(logits_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """KL from the teacher's softened probabilities, times temperature squared (arXiv 1503.02531)."""
    student = F.log_softmax(logits_BC / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BC / temperature, dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
