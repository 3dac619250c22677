"""Statistics of one pass against sums worked out token by token, in float64, from what each layer was given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.moe import BACKENDS
from kernels.routing import ExpertWeights, Routing
from models.checkpoint import load_checkpoint
from models.classifier import Classifier, Experts
from models.errors import PlanError
from models.pruning.apply import apply
from models.pruning.calibrate import COLLECTORS, Ran, Tokens, calibrate, token_keys, turned
from models.pruning.plan import keep_best
from models.pruning.stats import DATA_GROUPS, Classes, Core, Dense, Gram, Inputs, Means, RouterPair, Sample
from tests.models.golden import TOKENS, golden

GROUPS = (Core, Means, Gram, Dense, Inputs, Classes, Sample)
FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")  # gates as they are, with a shared expert, renormalised


@pytest.fixture
def model(pristine: Path) -> Classifier:
    return load_checkpoint(pristine).model


@pytest.fixture
def labels(sequences: list[list[int]]) -> list[int]:
    return [i % 3 for i in range(len(sequences))]


def group(found: Mapping[int, Sequence[Any]], layer: int, kind: type) -> Any:
    return next(g for g in found[layer] if isinstance(g, kind))


class Watcher:
    """What each layer's experts are given when the sequences run one by one: lists by layer."""

    def __init__(self, model: Classifier) -> None:
        self.model = model
        self.seen: dict[int, list[tuple[torch.Tensor, ...]]] = {i: [] for i in model.config.moe_layers}
        self.experts: dict[int, ExpertWeights] = {}

    def run(self, sequences: Sequence[Sequence[int]]) -> "Watcher":
        plain = self.model.backend
        self.model.backend = replace(BACKENDS["reference"](), moe_ffn=self.moe_ffn)
        with torch.inference_mode():
            for ids in sequences:
                self.model.hidden(self.model.pack([ids]), self)
        self.model.backend = plain
        return self

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None:
        self.layer, self.logits_TE = layer, logits_TE

    def moe_ffn(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertWeights, residual_TD: Any, shared_TD: Any
    ) -> torch.Tensor:
        self.experts[self.layer] = experts
        self.seen[self.layer].append((x_TD, residual_TD, self.logits_TE, routing.slot_TK, routing.weight_TK))
        return reference.moe_ffn(x_TD, routing, experts, residual_TD, shared_TD)

    def outputs(self, layer: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Everything the layer saw, in float64; outputs f_TED and inner activations a_TEF of all experts."""
        seen = [torch.cat(parts).double() for parts in zip(*self.seen[layer], strict=True)]
        experts = self.experts[layer]
        a_TEF = torch.stack([reference.expert_in(seen[0], w) for w in experts.w_in_PGD], dim=1)
        f_TED = torch.stack([reference.expert_out(a_TEF[:, e], w) for e, w in enumerate(experts.w_out_PDF)], dim=1)
        return seen, a_TEF, f_TED


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_equals_sums_over_single_tokens(
    family: str,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    sequences: list[list[int]],
    labels: list[int],
    tmp_path: Path,
) -> None:
    model = load_checkpoint(write_oracle(make_oracle(family), tmp_path / family)).model
    found = calibrate(model, sequences, GROUPS, labels)
    watcher = Watcher(model).run(sequences)
    token_label = [label for ids, label in zip(sequences, labels, strict=True) for _ in ids]
    for layer in model.config.moe_layers:
        (x_TD, r_TD, h_TE, slot_TK, gate_TK), a_TEF, f_TED = watcher.outputs(layer)
        want: dict[str, Any] = {name: np.zeros(4) for name in CORE_SUMS}
        fmax, fsum, coact, n_CE = np.zeros(4), np.zeros((4, 16)), np.zeros((4, 4)), np.zeros((3, 4))
        xg2, ag2 = np.zeros((4, 16)), np.zeros((4, a_TEF.shape[2]))
        for t in range(len(x_TD)):
            chosen = slot_TK[t].long().tolist()
            m_D = sum(g * f_TED[t, e] for e, g in zip(chosen, gate_TK[t], strict=True))
            after_D = r_TD[t] + m_D
            w = max(0.0, 1 - float(r_TD[t] @ after_D / (r_TD[t].norm() * after_D.norm())))
            for e, gate in zip(chosen, gate_TK[t].tolist(), strict=True):
                f_D, norm = f_TED[t, e].numpy(), float(f_TED[t, e].norm())
                terms = (1, gate, norm, norm**2, gate * norm, (gate * norm) ** 2, w * gate * norm)
                for name, term in zip(CORE_SUMS, terms, strict=True):
                    want[name][e] += term
                fmax[e] = max(fmax[e], np.abs(f_D).max())
                fsum[e] += f_D
                xg2[e] += (gate * x_TD[t].numpy()) ** 2
                ag2[e] += (gate * a_TEF[t, e].numpy()) ** 2
                n_CE[token_label[t], e] += 1
                for other in chosen:
                    coact[e, other] += 1
        core = group(found, layer, Core)
        assert core.tokens == len(x_TD) == sum(map(len, sequences))
        for name in CORE_SUMS:
            np.testing.assert_allclose(getattr(core, name), want[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(core.fmax_E, fmax, rtol=1e-5)
        np.testing.assert_allclose(core.p_E, torch.softmax(h_TE, 1).sum(0), rtol=1e-5)
        np.testing.assert_allclose(group(found, layer, Means).fsum_ED, fsum, rtol=1e-4, atol=1e-5)
        gram, dense = group(found, layer, Gram), group(found, layer, Dense)
        np.testing.assert_allclose(gram.hgram_EE, h_TE.T @ h_TE, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(gram.hsum_E, h_TE.sum(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(gram.coact_EE, coact)
        np.testing.assert_allclose(dense.dsum_ED, f_TED.sum(0), rtol=1e-4, atol=1e-4)
        assert dense.dtokens == len(x_TD)
        np.testing.assert_allclose(group(found, layer, Inputs).xg2_ED, xg2, rtol=1e-5)
        np.testing.assert_allclose(group(found, layer, Inputs).ag2_EF, ag2, rtol=1e-5)
        np.testing.assert_array_equal(group(found, layer, Classes).n_CE, n_CE)
        np.testing.assert_array_equal(group(found, layer, Classes).tokens_C, np.bincount(token_label, minlength=3))
        sample = group(found, layer, Sample)
        keys = np.concatenate([token_keys(0, row, len(ids)) for row, ids in enumerate(sequences)])
        order = np.argsort(keys)
        np.testing.assert_array_equal(sample.key_S, keys[order])
        np.testing.assert_allclose(sample.x_SD, x_TD[order], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(sample.h_SE, h_TE[order], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sample.f_SED, f_TED[order], rtol=1e-3, atol=1e-4)
        if model.config.normalize_top_k:
            assert core.g_E.sum() == pytest.approx(len(x_TD), rel=1e-6)


CORE_SUMS = ("n_E", "g_E", "f_E", "f2_E", "gf_E", "gf2_E", "wgf_E")


def test_the_golden_fixture_comes_out_of_the_collector() -> None:
    """Outputs and gates by hand; residuals such that 1 - cos is 0 (parallel), 1 (right angle), .5 (60 degrees), .2."""
    m_TD = torch.stack([sum((g * torch.tensor(f) for _, g, f in c), torch.zeros(2)) for c, _ in TOKENS])
    cos, sin = -0.5, 3**0.5 / 2
    residual_TD = torch.stack(
        [
            m_TD[0],
            torch.tensor([-3.0, 0.0]),
            torch.stack([cos * m_TD[2, 0] - sin * m_TD[2, 1], sin * m_TD[2, 0] + cos * m_TD[2, 1]]),
            torch.stack([-m_TD[3, 1], m_TD[3, 0]]) / 0.75,
        ]
    )
    pairs = sorted((e, t, g, f) for t, (chosen, _) in enumerate(TOKENS) for e, g, f in chosen)
    weights = ExpertWeights(torch.zeros(4, 2, 2), torch.zeros(4, 2, 1))
    ran = Ran(
        x_TD=torch.zeros(4, 2),
        residual_TD=residual_TD,
        routed_TD=m_TD,
        logits_TE=torch.zeros(4, 4),
        slot_TK=torch.tensor([[e for e, _, _ in chosen] for chosen, _ in TOKENS]),
        experts=weights,
        backend=BACKENDS["reference"](),
        token_N=torch.tensor([t for _, t, _, _ in pairs]),
        gate_N=torch.tensor([g for _, _, g, _ in pairs]),
        h_NF=torch.zeros(8, 1),
        y_ND=torch.tensor([f for _, _, _, f in pairs], dtype=torch.float32),
        count_E=[3, 3, 2, 0],
    )
    tokens = Tokens(np.zeros(0, dtype=np.uint64), torch.zeros(0, dtype=torch.int64), 1, torch.zeros(4), 1)
    want = golden()
    for kind in (Core, Means):
        got = COLLECTORS[kind](ran, tokens)
        for f in fields(kind):
            if f.name != "p_E":
                np.testing.assert_allclose(getattr(got, f.name), getattr(want.need(kind), f.name), rtol=1e-6)
    assert COLLECTORS[Core](ran, tokens).wgf_E == pytest.approx([5.5, 5.0, 2.9, 0], rel=1e-6)
    np.testing.assert_array_equal(COLLECTORS[Gram](ran, tokens).coact_EE, want.need(Gram).coact_EE)


def test_a_tiny_turn_of_the_residual_is_not_lost_in_rounding() -> None:
    r_TD, m_TD = torch.tensor([[1e4, 0.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 0.0], [-3.0, 1.0]])
    exact = 1 - np.cos(np.arctan2(1.0, 10003.0)), 0.0, 1 + 2 / 5**0.5
    # the first is 5e-9, of which float32 would make 0
    assert turned(r_TD, m_TD).tolist() == pytest.approx(exact, rel=1e-6)


def test_batches_do_not_change_the_sums(model: Classifier, sequences: list[list[int]], labels: list[int]) -> None:
    whole = calibrate(model, sequences, GROUPS, labels, sample=20)
    for batch_tokens in (1, 40):
        parts = calibrate(model, sequences, GROUPS, labels, sample=20, batch_tokens=batch_tokens)
        for layer in whole:
            for kind in GROUPS:
                for f in fields(kind):
                    mine, theirs = (np.asarray(getattr(group(g, layer, kind), f.name)) for g in (whole, parts))
                    # against the largest of the array: sums of signed numbers may nearly cancel
                    scale = np.abs(mine.astype(np.float64)).max()
                    assert np.abs(mine - theirs.astype(mine.dtype)).max() <= 1e-6 * scale, (kind.__name__, f.name)


def test_shards_add_up_to_the_whole(model: Classifier, sequences: list[list[int]], labels: list[int]) -> None:
    whole = calibrate(model, sequences, GROUPS, labels, sample=30)
    a = calibrate(model, sequences[:4], GROUPS, labels[:4], sample=30)
    b = calibrate(model, sequences[4:], GROUPS, labels[4:], sample=30, first_row=4)
    for layer in whole:
        for kind in GROUPS:
            joined, expected = group(a, layer, kind) + group(b, layer, kind), group(whole, layer, kind)
            swapped = group(b, layer, kind) + group(a, layer, kind)
            for f in fields(kind):
                want = np.asarray(getattr(expected, f.name), dtype=np.float64)
                for got in (joined, swapped):
                    np.testing.assert_allclose(
                        np.asarray(getattr(got, f.name), dtype=np.float64),
                        want,
                        rtol=1e-5,
                        atol=1e-5 * np.abs(want).max(),
                        err_msg=f.name,
                    )


def test_the_sample_is_the_smallest_keys_of_all_tokens(model: Classifier, sequences: list[list[int]]) -> None:
    found = calibrate(model, sequences, (Sample,), sample=20, batch_tokens=30, seed=3)
    keys = np.sort(np.concatenate([token_keys(3, row, len(ids)) for row, ids in enumerate(sequences)]))
    assert np.unique(keys).size == keys.size
    for layer in (0, 1):
        sample = group(found, layer, Sample)
        assert sample.key_S.tolist() == keys[:20].tolist()
        assert sample.f_SED.shape == (20, 4, 16)
    other = group(calibrate(model, sequences, (Sample,), sample=20, seed=4), 0, Sample)
    assert set(other.key_S.tolist()).isdisjoint(keys.tolist())


def test_keys_spread_evenly() -> None:
    keys = np.concatenate([token_keys(0, row, 50) for row in range(400)])
    counts = np.bincount((keys >> np.uint64(60)).astype(np.int64), minlength=16)
    # 1250 expected each, deviation 34: six deviations
    assert np.abs(counts - 1250).max() < 206


def test_an_expert_that_no_token_chose_has_zeros(model: Classifier, sequences: list[list[int]]) -> None:
    with torch.no_grad():
        for layer in model.layers:
            layer.w_router_ED.zero_()  # type: ignore[operator]
    # all logits are 0: ties go to experts 0 and 1
    found = calibrate(model, sequences, (Core, Means, Gram, Inputs))
    core = group(found, 0, Core)
    total = sum(map(len, sequences))
    assert core.n_E.tolist() == [total, total, 0, 0]
    for kind in (Core, Means, Inputs):
        for f in fields(kind):
            value = np.asarray(getattr(group(found, 0, kind), f.name))
            assert np.isfinite(value).all()
            if value.ndim and f.name != "p_E":
                assert (value[2:] == 0).all(), f.name
    assert core.p_E == pytest.approx([total / 4] * 4)


def test_doubling_the_rows_doubles_the_sums(model: Classifier, sequences: list[list[int]]) -> None:
    once, twice = (group(calibrate(model, rows), 0, Core) for rows in (sequences, sequences * 2))
    for name in CORE_SUMS:
        np.testing.assert_allclose(getattr(twice, name), 2 * getattr(once, name), rtol=1e-6)
    np.testing.assert_allclose(twice.fmax_E, once.fmax_E, rtol=1e-6)


def test_the_model_is_left_as_it_was(model: Classifier, sequences: list[list[int]], labels: list[int]) -> None:
    before, backend = model.classify(sequences).logits_BC, model.backend
    calibrate(model, sequences, GROUPS, labels)
    assert model.backend is backend
    assert torch.equal(model.classify(sequences).logits_BC, before)


def test_progress_ends_at_the_last_row(model: Classifier, sequences: list[list[int]]) -> None:
    calls: list[tuple[int, int]] = []
    calibrate(model, sequences, batch_tokens=40, progress=lambda done, total, message: calls.append((done, total)))
    assert len(calls) > 2
    assert calls[-1] == (len(sequences), len(sequences))


def test_every_group_of_data_has_a_collector() -> None:
    assert set(COLLECTORS) == set(DATA_GROUPS) == set(GROUPS)


def test_what_cannot_be_calibrated_is_refused(model: Classifier, sequences: list[list[int]]) -> None:
    with pytest.raises(PlanError, match="a label per row, found 0 for 9 rows"):
        calibrate(model, sequences, (Classes,))
    with pytest.raises(PlanError, match="RouterPair is not collected from data"):
        calibrate(model, sequences, (RouterPair,))
    pruned = apply(model, {1: keep_best([1, 2, 3, 4], 3, "zero")})
    with pytest.raises(PlanError, match="layer 1 was pruned before"):
        calibrate(pruned, sequences)
    calibrate(apply(model, {1: keep_best([1, 2, 3, 4], 3, "slice")}), sequences)
