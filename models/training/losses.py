"""Losses on routers, and distillation.

Legend: T tokens, K chosen experts per token, E experts, P physical experts, D model width, R rows given to one expert,
B texts, C classes, G corpora, L layers.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from kernels import reference
from kernels.compressed import CompressedExperts
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


class ExpertTap(RouterTap):
    """Collects, per layer, how far the experts are from their teachers'. teachers: those of each layer."""

    def __init__(self, teachers: Mapping[int, Experts]) -> None:
        super().__init__()
        self.teachers = teachers
        self.losses: list[torch.Tensor] = []

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None:
        super().__call__(layer, x_TD, logits_TE, routing, experts)
        self.losses.append(expert_loss(x_TD, routing.slot_TK, experts, self.teachers[layer]))

    @property
    def loss(self) -> torch.Tensor:
        """Sum over layers."""
        return torch.stack(self.losses).sum()


def expert_loss(x_TD: torch.Tensor, slot_TK: torch.Tensor, student: Experts, teacher: Experts) -> torch.Tensor:
    """Sum over experts of the mean squared difference between its outputs and its teacher's (arXiv 2410.12013).

    Both run on the tokens that the student's router sends to the expert, and on what enters the student's layer, which
    gets no gradient: which inputs the paper takes was not to be found. Experts without tokens add nothing.
    """
    terms = [x_TD.new_zeros(())]
    for expert in range(count_experts(student)):
        x_RD = x_TD.detach()[(slot_TK == expert).any(1)]
        if len(x_RD):
            with torch.no_grad():
                wanted_RD = _run(teacher, x_RD, expert)
            terms.append(F.mse_loss(_run(student, x_RD, expert), wanted_RD))
    return torch.stack(terms).sum()


def _run(experts: Experts, x_RD: torch.Tensor, expert: int) -> torch.Tensor:
    """One expert's outputs before any gate: [R, D] -> [R, D]."""
    if isinstance(experts, CompressedExperts):
        return experts.run(x_RD, expert, reference.linear)
    b_in_PG, b_out_PD = experts.b_in_PG, experts.b_out_PD
    h_RF = reference.expert_in(
        x_RD,
        experts.w_in_PGD[expert],
        None if b_in_PG is None else b_in_PG[expert],
        experts.activation,
        experts.gated,
    )
    return reference.expert_out(h_RF, experts.w_out_PDF[expert], None if b_out_PD is None else b_out_PD[expert])


def count_experts(experts: Experts) -> int:
    return experts.num_experts if isinstance(experts, CompressedExperts) else len(experts.w_in_PGD)


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
