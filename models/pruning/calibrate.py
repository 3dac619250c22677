"""One pass over task data that fills the statistics methods read.

Legend: T tokens of a batch, K chosen experts per token, N = T * K pairs sorted by expert, E experts, D model width,
F expert inner width, C classes, S sampled tokens.
"""

import copy
from collections.abc import Callable, Collection, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.moe import Backend
from kernels.routing import ExpertWeights, Routing
from models.batches import by_length
from models.classifier import Classifier, Experts
from models.config import LayerShape
from models.errors import PlanError
from models.progress import Progress, silent
from models.pruning.plan import FloatArray
from models.pruning.stats import Classes, Core, Dense, Gram, Group, Inputs, Means, Sample

BATCH_TOKENS = 4096
SAMPLE_TOKENS = 512
KeyArray = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Tokens:
    """What is known about a batch's tokens beside their ids.

    key_S uint64, sampled_S int64: the tokens that are sampled, by ascending key; size: how many are wanted of all
    batches together. label_T int64: the classes of their rows.
    """

    key_S: KeyArray
    sampled_S: torch.Tensor
    size: int
    label_T: torch.Tensor
    num_labels: int


@dataclass(frozen=True)
class Ran:
    """One layer's experts on one batch. x_TD went in, routed_TD float32 came out of the experts that were chosen.

    Sorted by expert: token_N whose pair it is, gate_N float32, h_NF what entered the down projection, y_ND the outputs.
    count_E: pairs of each expert, a list.
    """

    x_TD: torch.Tensor
    residual_TD: torch.Tensor
    routed_TD: torch.Tensor
    logits_TE: torch.Tensor
    slot_TK: torch.Tensor
    experts: ExpertWeights
    backend: Backend
    token_N: torch.Tensor
    gate_N: torch.Tensor
    h_NF: torch.Tensor
    y_ND: torch.Tensor
    count_E: list[int]


class Recorder:
    """Stands in for a model's experts: runs each pair once, as the backend would, and adds up what it sees.

    The layer calls it twice: as a tap, which says which layer it is, and then for the product itself.
    """

    def __init__(self, backend: Backend, groups: Collection[type]) -> None:
        self.backend = replace(backend, moe_ffn=self.moe_ffn)
        self.groups = {group: COLLECTORS[group] for group in groups}
        self.sums: dict[int, dict[type, Any]] = {}
        self._plain = backend
        self._tokens: Tokens | None = None
        self._layer = 0
        self._logits_TE = torch.empty(0)

    def begin(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None:
        self._layer, self._logits_TE = layer, logits_TE

    def moe_ffn(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        experts: ExpertWeights,
        residual_TD: torch.Tensor,
        shared_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `kernels.reference.moe_ffn`: the statistics are a by-product."""
        assert self._tokens is not None
        slot_TK = routing.slot_TK
        # Where experts choose their tokens, a slot of -1 is what no expert took; these sort first and are left out.
        count_M = torch.bincount(slot_TK.flatten() + 1, minlength=experts.w_in_PGD.shape[0] + 1).tolist()
        order_N, count_E = torch.argsort(slot_TK.flatten(), stable=True)[count_M[0] :], count_M[1:]
        token_N = order_N // slot_TK.shape[1]
        h_NF, y_ND = self._run(x_TD.index_select(0, token_N), experts, count_E)
        position_M = torch.zeros(slot_TK.numel(), dtype=torch.int64, device=order_N.device).index_copy_(
            0, order_N, torch.arange(len(order_N), device=order_N.device)
        )
        routed_TD = F.embedding_bag(
            position_M.view_as(slot_TK), y_ND.float(), per_sample_weights=routing.weight_TK, mode="sum"
        )
        ran = Ran(
            x_TD=x_TD,
            residual_TD=residual_TD,
            routed_TD=routed_TD,
            logits_TE=self._logits_TE,
            slot_TK=slot_TK,
            experts=experts,
            backend=self._plain,
            token_N=token_N,
            gate_N=routing.weight_TK.flatten()[order_N],
            h_NF=h_NF,
            y_ND=y_ND,
            count_E=count_E,
        )
        sums = self.sums.setdefault(self._layer, {})
        for group, collect in self.groups.items():
            new = collect(ran, self._tokens)
            sums[group] = sums[group] + new if group in sums else new
        out_TD = routed_TD + residual_TD
        return (out_TD if shared_TD is None else out_TD + shared_TD).to(x_TD.dtype)

    def _run(self, x_ND: torch.Tensor, experts: ExpertWeights, count_E: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        h_NF = x_ND.new_empty(x_ND.shape[0], experts.w_out_PDF.shape[2])
        y_ND = torch.empty_like(x_ND)
        for expert, rows in enumerate(_slices(count_E)):
            if count_E[expert]:
                h_NF[rows] = _first_half(x_ND[rows], experts, expert, self._plain)
                y_ND[rows] = _second_half(h_NF[rows], experts, expert, self._plain)
        return h_NF, y_ND


@torch.inference_mode()
def calibrate(
    model: Classifier,
    sequences: Sequence[Sized],
    groups: Collection[type] = (Core,),
    labels: Sequence[int] = (),
    seed: int = 0,
    sample: int = SAMPLE_TOKENS,
    first_row: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> dict[int, tuple[Group, ...]]:
    """The asked groups of statistics per MoE layer, over all tokens of all sequences; batching does not change them.

    Every layer counts every token, also the last layer of a model that classifies by the last token and, when it
    serves, skips the others there. labels: class of each sequence, for Classes. sample: tokens that Sample holds, drawn
    by the seed, the row's number (counted from first_row, so that shards of a file differ) and the position.
    Raises PlanError for a pruned model, whose slots are no longer its experts, for a group that is no sum over tokens,
    and for Classes without labels.
    """
    _refuse_pruned(model)
    unknown = [group.__name__ for group in groups if group not in COLLECTORS]
    if unknown:
        raise PlanError(f"{unknown[0]} is not collected from data")
    if Classes in groups and len(labels) != len(sequences):
        raise PlanError(f"statistics by class need a label per row, found {len(labels)} for {len(sequences)} rows")
    recorder = Recorder(model.backend, groups)
    watched = copy.copy(model)  # the parameters are shared, the backend is its own
    watched.backend = recorder.backend
    keys = [token_keys(seed, first_row + row, len(ids)) for row, ids in enumerate(sequences)]
    # Known before the pass, so that all experts run on the sampled tokens only.
    limit = np.sort(np.concatenate(keys))[:sample].max(initial=0) if keys else 0
    done = 0
    for rows in by_length(sequences, batch_tokens):
        batch = model.pack([sequences[row] for row in rows])
        key_T = np.concatenate([keys[row] for row in rows])
        sampled_S = np.flatnonzero(key_T <= limit)
        sampled_S = sampled_S[np.argsort(key_T[sampled_S], kind="stable")]
        label_B = torch.tensor([labels[row] for row in rows] if Classes in groups else [0] * len(rows))
        recorder.begin(
            Tokens(
                key_S=key_T[sampled_S],
                sampled_S=torch.from_numpy(sampled_S).to(model.device),
                size=sample,
                label_T=label_B.repeat_interleave(torch.tensor(batch.lengths)).to(model.device),
                num_labels=model.config.num_labels,
            )
        )
        watched.hidden(batch, recorder)
        done += len(rows)
        progress(done, len(sequences), "calibrating")
    return {layer: tuple(found.values()) for layer, found in recorder.sums.items()}


def token_keys(seed: int, row: int, length: int) -> KeyArray:
    """uint64 [length]: a hash of the seed, the row's number and each position (splitmix64, chained)."""
    key = _splitmix(np.full(length, seed, dtype=np.uint64))
    for value in (np.full(length, row, dtype=np.uint64), np.arange(length, dtype=np.uint64)):
        key = _splitmix(key ^ value)
    return key


def _splitmix(x: KeyArray) -> KeyArray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _refuse_pruned(model: Classifier) -> None:
    for index in model.config.moe_layers:
        shape = model.config.layers[index]
        if shape.compression is not None:
            raise PlanError(f"layer {index} is compressed already: calibrate its parent")
        if shape != LayerShape.unpruned(shape.num_experts):
            raise PlanError(f"layer {index} was pruned before with router rows left in place: calibrate its parent")


def _slices(count_E: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *count_E]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


def _first_half(x_ND: torch.Tensor, experts: ExpertWeights, expert: int, backend: Backend) -> torch.Tensor:
    """One expert up to its down projection: [N, D] -> [N, F]."""
    b_in_G = None if experts.b_in_PG is None else experts.b_in_PG[expert]
    inner_NG = backend.linear(x_ND, experts.w_in_PGD[expert], b_in_G)
    if not experts.gated:
        return reference.activate(inner_NG, experts.activation)
    gate_NF, up_NF = inner_NG.chunk(2, dim=-1)
    return reference.activate(gate_NF, experts.activation).mul_(up_NF)


def _second_half(h_NF: torch.Tensor, experts: ExpertWeights, expert: int, backend: Backend) -> torch.Tensor:
    b_out_D = None if experts.b_out_PD is None else experts.b_out_PD[expert]
    return backend.linear(h_NF, experts.w_out_PDF[expert], b_out_D)


def _by_expert(value_N: torch.Tensor, count_E: list[int]) -> FloatArray:
    """Sums of each expert's rows in float64, zero where there are none: [N, ...] -> [E, ...]."""
    parts = [value_N[rows].sum(0, dtype=torch.float64) for rows in _slices(count_E)]
    sums: FloatArray = torch.stack(parts).cpu().numpy()
    return sums


def turned(r_TD: torch.Tensor, m_TD: torch.Tensor) -> torch.Tensor:
    """float64 [T]: 1 - cos(r, r + m), 0 where both are zero; from float32 inputs, however small the angle.

    With p the part of m that is perpendicular to r, sin^2 = |p|^2 / |r + m|^2 and 1 - cos = sin^2 / (1 + cos): the
    subtraction itself would leave rounding noise only.
    """
    rr_T = r_TD.square().sum(1)
    along_T = (r_TD * m_TD).sum(1) / rr_T.clamp(min=torch.finfo(torch.float32).tiny)
    pp_T = torch.addcmul(m_TD, r_TD, along_T[:, None], value=-1).square().sum(1).double()
    scale_T = rr_T.double().sqrt() * (1 + along_T.double())
    square_T = (scale_T**2 + pp_T).clamp(min=torch.finfo(torch.float64).tiny)
    cosine_T, sine_T = scale_T / square_T.sqrt(), pp_T / square_T
    return torch.where(cosine_T >= 0, sine_T / (1 + cosine_T), 1 - cosine_T)


def _expert_of(ran: Ran) -> torch.Tensor:
    """int64 [N]: the expert of each pair."""
    count_E = torch.tensor(ran.count_E, device=ran.token_N.device)
    return torch.arange(len(ran.count_E), device=count_E.device).repeat_interleave(count_E)


def _core(ran: Ran, tokens: Tokens) -> Core:
    norm_N = torch.linalg.vector_norm(ran.y_ND, dim=1, dtype=torch.float32).double()
    gate_N = ran.gate_N.double()
    change_N = turned(ran.residual_TD.float(), ran.routed_TD)[ran.token_N]
    terms = (gate_N, norm_N, norm_N**2, gate_N * norm_N, (gate_N * norm_N) ** 2, change_N * gate_N * norm_N)
    sums_EX = _by_expert(torch.stack(terms, dim=1), ran.count_E)
    g_E, f_E, f2_E, gf_E, gf2_E, wgf_E = sums_EX.T.copy()
    top_N = ran.y_ND.abs().amax(1).float()  # 0.15 ms for [8192, 128]; as a norm of order infinity 7.7 ms
    top = [top_N[rows].amax() if rows.start < rows.stop else top_N.new_zeros(()) for rows in _slices(ran.count_E)]
    return Core(
        tokens=np.array(len(ran.x_TD)),
        n_E=np.array(ran.count_E),
        g_E=g_E,
        f_E=f_E,
        f2_E=f2_E,
        gf_E=gf_E,
        gf2_E=gf2_E,
        wgf_E=wgf_E,
        fmax_E=torch.stack(top).cpu().numpy(),
        p_E=torch.softmax(ran.logits_TE.float(), dim=1).sum(0, dtype=torch.float64).cpu().numpy(),
    )


def _means(ran: Ran, tokens: Tokens) -> Means:
    return Means(_by_expert(ran.y_ND, ran.count_E))


def _gram(ran: Ran, tokens: Tokens) -> Gram:
    logits_TE = ran.logits_TE.double()
    chosen_TE = torch.zeros_like(logits_TE)
    chosen_TE.index_put_((ran.token_N, _expert_of(ran)), torch.ones((), dtype=torch.float64, device=logits_TE.device))
    return Gram(
        hgram_EE=(logits_TE.T @ logits_TE).cpu().numpy(),
        hsum_E=logits_TE.sum(0).cpu().numpy(),
        coact_EE=(chosen_TE.T @ chosen_TE).long().cpu().numpy(),
    )


def _dense(ran: Ran, tokens: Tokens) -> Dense:
    """The down projection is linear, so that it needs to see the sum over tokens only."""
    total, sums = len(ran.x_TD), []
    for expert in range(len(ran.count_E)):
        h_F = _first_half(ran.x_TD, ran.experts, expert, ran.backend).sum(0, dtype=torch.float64)
        sum_D = ran.experts.w_out_PDF[expert].double() @ h_F
        if ran.experts.b_out_PD is not None:
            sum_D += total * ran.experts.b_out_PD[expert].double()
        sums.append(sum_D)
    return Dense(dsum_ED=torch.stack(sums).cpu().numpy(), dtokens=np.array(total))


def _inputs(ran: Ran, tokens: Tokens) -> Inputs:
    gate_N1 = ran.gate_N.unsqueeze(1)
    return Inputs(
        xg2_ED=_by_expert((ran.x_TD.index_select(0, ran.token_N).float() * gate_N1).square_(), ran.count_E),
        ag2_EF=_by_expert((ran.h_NF.float() * gate_N1).square_(), ran.count_E),
    )


def _classes(ran: Ran, tokens: Tokens) -> Classes:
    num_experts = len(ran.count_E)
    cell_N = tokens.label_T[ran.token_N] * num_experts + _expert_of(ran)
    n_CE = torch.bincount(cell_N, minlength=tokens.num_labels * num_experts).view(-1, num_experts)
    tokens_C = torch.bincount(tokens.label_T, minlength=tokens.num_labels)
    return Classes(n_CE=n_CE.cpu().numpy(), tokens_C=tokens_C.cpu().numpy())


def _sample(ran: Ran, tokens: Tokens) -> Sample:
    x_SD = ran.x_TD.index_select(0, tokens.sampled_S)
    outputs = [
        _second_half(_first_half(x_SD, ran.experts, expert, ran.backend), ran.experts, expert, ran.backend)
        for expert in range(len(ran.count_E))
    ]
    return Sample(
        size=tokens.size,
        key_S=tokens.key_S,
        x_SD=x_SD.float().cpu().numpy(),
        h_SE=ran.logits_TE.index_select(0, tokens.sampled_S).float().cpu().numpy(),
        f_SED=torch.stack(outputs, dim=1).float().cpu().numpy(),
    )


COLLECTORS: dict[type, Callable[[Ran, Tokens], Any]] = {
    Core: _core,
    Means: _means,
    Gram: _gram,
    Dense: _dense,
    Inputs: _inputs,
    Classes: _classes,
    Sample: _sample,
}
