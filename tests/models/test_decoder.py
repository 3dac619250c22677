"""The packed forward pass: what a batch may not change, what the shortcuts keep, what is counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.routing import ExpertWeights, Routing
from models.checkpoint import load_checkpoint
from models.classifier import Experts, SlotTally
from models.config import LayerShape, ModelConfig
from models.decoder import DecoderLayer, MoEClassifier, pool
from models.packed import PackedBatch


@pytest.fixture
def model(pristine: Path) -> MoEClassifier:
    model = load_checkpoint(pristine).model
    assert isinstance(model, MoEClassifier)
    return model


@pytest.fixture(params=["qwen3_moe", "qwen2_moe"])
def any_family(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
) -> Path:
    """A dense layer between two of experts; the second family has a shared expert in each."""
    return write_oracle(make_oracle(request.param, num_hidden_layers=3, mlp_only_layers=[1]), tmp_path / "model")


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((result - expected).norm() / expected.norm()) < 1e-5


def test_batched_equals_alone_and_order_is_kept(model: MoEClassifier, sequences: list[list[int]], poison: None) -> None:
    together = model.classify(sequences).logits_BC
    assert together.shape == (len(sequences), 3)
    assert together.dtype == torch.float32
    for i, sequence in enumerate(sequences):
        assert close(model.classify([sequence]).logits_BC[0], together[i])
    order = torch.randperm(len(sequences)).tolist()
    assert close(model.classify([sequences[i] for i in order]).logits_BC, together[order])


def test_a_sequence_does_not_feel_its_neighbours(model: MoEClassifier, sequences: list[list[int]]) -> None:
    changed = [sequences[0], *([[1] * len(s) for s in sequences[1:]])]
    assert close(model.classify(changed).logits_BC[0], model.classify(sequences).logits_BC[0])


def test_the_last_layers_short_cut_changes_nothing(model: MoEClassifier, sequences: list[list[int]]) -> None:
    batch = PackedBatch.pack(sequences)
    with torch.inference_mode():
        full_TD = model.hidden(batch)
        assert close(model.hidden(batch, pooled_only=True), full_TD[batch.last_B])


def test_gradients_run_through_the_reference_and_agree(model: MoEClassifier, sequences: list[list[int]]) -> None:
    expected = model.classify(sequences).logits_BC
    model.requires_grad_(True)
    logits_BC = model(PackedBatch.pack(sequences))
    assert close(logits_BC.detach(), expected)
    logits_BC.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_one_gradient_against_a_finite_difference(model: MoEClassifier, sequences: list[list[int]]) -> None:
    """In float64, through routing, experts, attention and norms, along a random direction of all parameters."""
    model = model.double().requires_grad_(True)
    batch = PackedBatch.pack(sequences[:4])
    directions = [torch.randn_like(p) * 1e-4 for p in model.parameters()]
    loss = model(batch).square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(d, alpha=sign)
        values.append(float(model(batch).detach().square().sum()))
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions, strict=True):
                p.sub_(d, alpha=sign)
    assert (values[0] - values[1]) / 2 == pytest.approx(slope, rel=1e-3)


class Recorder:
    """A tap that keeps what it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, torch.Size, torch.Size, torch.Size, int]] = []

    def __call__(
        self, layer: int, x_TD: torch.Tensor, logits_TE: torch.Tensor, routing: Routing, experts: Experts
    ) -> None:
        assert isinstance(experts, ExpertWeights)
        self.seen.append((layer, x_TD.shape, logits_TE.shape, routing.slot_TK.shape, len(experts.w_in_PGD)))


def test_a_tap_sees_every_moe_layer_and_changes_nothing(model: MoEClassifier, sequences: list[list[int]]) -> None:
    tap, batch = Recorder(), PackedBatch.pack(sequences)
    with torch.inference_mode():
        without, tapped = model.hidden(batch), model.hidden(batch, tap)
    assert torch.equal(without, tapped)
    tokens = batch.num_tokens
    assert tap.seen == [(i, (tokens, 16), (tokens, 4), (tokens, 2), 4) for i in range(2)]


class Silent:
    """Noise that changes nothing: training's way through a layer without its randomness."""

    def embedding(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD

    def branch(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD


class Mute(Silent):
    """Noise that silences every branch: what is left is the residual stream."""

    def branch(self, x_TD: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_TD)


def test_noise_touches_branches_and_not_the_residual(any_family: Path, sequences: list[list[int]]) -> None:
    model, batch = load_checkpoint(any_family).model, PackedBatch.pack(sequences)
    assert isinstance(model, MoEClassifier)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert close(model.hidden(batch, noise=Silent()), model.hidden(batch))
            embedded_TD = torch.nn.functional.embedding(batch.ids_T, model.embedding_VD)
            expected_TD = torch.nn.functional.rms_norm(embedded_TD, (16,), model.norm_D, model.config.norm_eps)
            assert torch.equal(model.hidden(batch, noise=Mute()), expected_TD)


def test_what_joins_the_experts_is_added_by_the_backend(any_family: Path, sequences: list[list[int]]) -> None:
    """Residual and shared expert go in, so that they are rounded once with the sum; noise needs the branch alone."""
    model = load_checkpoint(any_family).model
    plain, added = model.backend, []

    def moe_ffn(
        x_TD: torch.Tensor,
        routing: Routing,
        experts: ExpertWeights,
        residual_TD: torch.Tensor | None,
        shared_TD: torch.Tensor | None,
    ) -> torch.Tensor:
        added.append((residual_TD is not None, shared_TD is not None))
        return plain.moe_ffn(x_TD, routing, experts, residual_TD, shared_TD)

    model.backend = replace(plain, moe_ffn=moe_ffn)
    has_shared = model.config.shared_width > 0
    with torch.inference_mode():
        model.hidden(PackedBatch.pack(sequences))
        model.hidden(PackedBatch.pack(sequences), noise=Silent())
    assert added == [(True, has_shared)] * 2 + [(False, has_shared)] * 2


def test_triton_gives_what_the_reference_gives(any_family: Path) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    short = [[3, 9, 27, 1], [5], [8, 41]]
    logits_BC = load_checkpoint(any_family, device, "float32", "triton").model.classify(short).logits_BC
    assert close(logits_BC, load_checkpoint(any_family, "cpu", "float32", "reference").model.classify(short).logits_BC)


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        (LayerShape.unpruned(4), 1.0),
        (LayerShape(2, (0, -1, 1, -1)), 0.5),
        (LayerShape(2, (0, 0, 1, 1)), 1.0),
        (LayerShape(1, (0, -2, -3, -4)), 0.25),
    ],
    ids=["whole or slice", "zero", "tie", "constant"],
)
def test_the_expected_share_of_live_pairs_follows_from_the_route(
    model: MoEClassifier, shape: LayerShape, share: float
) -> None:
    config = replace(model.config, layers=(shape, LayerShape.unpruned(4)))
    layer = MoEClassifier(config).layers[0]
    assert isinstance(layer, DecoderLayer)
    assert isinstance(layer.experts, ExpertWeights)
    assert layer.experts.kept_share == share


def test_routed_slots_are_counted_as_computed(model: MoEClassifier) -> None:
    """Layer 0 routes all 3 + 2 tokens to two experts each, the last layer only the two last tokens: 10 + 4."""
    output = model.classify([[1, 2, 3], [4, 5]])
    assert (output.routed_slots, output.dropped_slots) == (14, 0)


def test_dropped_slots_are_those_that_met_a_pruned_expert(model: MoEClassifier) -> None:
    shape = LayerShape(2, (0, -1, 1, -1))
    tally = SlotTally(ModelConfig(**{**vars(model.config), "layers": (shape, LayerShape.unpruned(4))}))
    routing = Routing(torch.tensor([[0, -1], [-1, -1], [1, 0]], dtype=torch.int32), torch.zeros(3, 2))
    for layer in (0, 1):
        tally(layer, torch.zeros(3, 16), torch.zeros(3, 4), routing, model.layers[0].experts)  # type: ignore[arg-type]
    assert (tally.routed, int(tally.dropped)) == (12, 3)


def test_pooling_by_hand() -> None:
    batch = PackedBatch.pack([[1, 2], [3], [4, 5, 6]])
    x_TD = torch.arange(12.0).view(6, 2)
    assert pool(x_TD, batch, "first").tolist() == [[0, 1], [4, 5], [6, 7]]
    assert pool(x_TD, batch, "mean").tolist() == [[1, 2], [4, 5], [8, 9]]


def test_an_empty_sequence_is_refused(model: MoEClassifier) -> None:
    with pytest.raises(ValueError, match="every sequence at least one token"):
        model.classify([[1], []])


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 5e-2), ("float16", 1e-2)])
def test_half_precision_stays_near_float32(
    pristine: Path, model: MoEClassifier, dtype: str, bound: float, sequences: list[list[int]]
) -> None:
    half = load_checkpoint(pristine, dtype=dtype).model
    assert half.dtype == getattr(torch, dtype)
    expected = model.classify(sequences).logits_BC
    result = half.classify(sequences).logits_BC
    # A rounding that flips a router's choice moves that sequence far, so the median sequence is judged.
    error_B = (result - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error_B.median()) < bound
