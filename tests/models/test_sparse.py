"""Loaded models whose 2:4 experts stay packed: which matrices, the same answers, and every byte counted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.compressed import CompressedExperts, Dense, Masked, Sparse
from models import memory, sparse
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.classifier import Classifier, MoELayer
from models.flops import flops_per_token
from models.pruning.apply import apply
from models.pruning.plan import keep_best
from models.pruning.post import Mask, Post
from models.sparse import use_sparse_products
from tests.kernels.fake_sparse import FAKE, unpack

ALL = ("gate", "up", "down")


@pytest.fixture
def stored(make_oracle: Callable[..., Any], write_oracle: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """(step, expert width) -> a checkpoint with layer 0 of the tiny model, width 16, cut to 3 experts and masked."""

    def write(step: Post, inner: int = 32) -> Path:
        whole = write_oracle(make_oracle("qwen3_moe", moe_intermediate_size=inner), tmp_path / "whole")
        source, plan = load_checkpoint(whole), keep_best([4, 3, 2, 1], 3, "zero")
        child = apply(source.model, {0: type(plan)(plan.mix_KE, plan.route_E, "zero", post=(step,))})
        file = whole / "tokenizer.json"
        out = save_checkpoint(tmp_path / "child", child, source.raw_config, file, dtype="bfloat16", semantics="zero")
        return out.path

    return write


def experts_of(model: Classifier, index: int = 0) -> CompressedExperts:
    layer = model.layers[index]
    assert isinstance(layer, MoELayer)
    experts = layer.experts
    assert isinstance(experts, CompressedExperts)
    return experts


def loaded(path: Path, **options: str) -> Checkpoint:
    return load_checkpoint(path, dtype="bfloat16", **options)


def test_a_packed_model_answers_alike_in_as_many_bytes(stored: Callable[..., Path], sequences: list[list[int]]) -> None:
    """By hand: 3 experts of three matrices of 32 x 16, each element 9/16 of 2 bytes."""
    path = stored(Mask("2:4", ALL))
    before, after = loaded(path), loaded(path)
    use_sparse_products(after.model, FAKE)
    experts = experts_of(after.model)
    dense = experts_of(before.model).dense()
    for stack in (experts.gate, experts.up, experts.down):
        assert isinstance(stack, Sparse)
        assert stack.packed_PYZ.untyped_storage().nbytes() == 3 * 32 * 16 * 2 * 9 // 16
    assert experts.down.matrix(2).shape == (16, 32)
    assert torch.equal(experts.dense().w_in_PGD, dense.w_in_PGD)
    assert torch.equal(experts.dense().w_out_PDF, dense.w_out_PDF)
    assert torch.equal(unpack(experts.down.packed_PYZ[1], (16, 32)), dense.w_out_PDF[1])  # type: ignore[union-attr]
    torch.testing.assert_close(
        after.model.classify(sequences).logits_BC, before.model.classify(sequences).logits_BC, rtol=2e-2, atol=2e-2
    )
    after.verify()

    assert after.weight_bytes() == before.weight_bytes()
    assert after.weight_bytes()["experts"] == 4 * 3 * 32 * 16 * 2 + 3 * 3 * 32 * 16 * 2 * 9 // 16
    assert memory.held_bytes(after.model) == memory.held_bytes(before.model) == sum(after.weight_bytes().values())
    assert memory.resident_bytes([after.model]) == memory.resident_bytes([before.model])
    assert before.manifest is not None
    assert memory.num_parameters(after.model) == before.manifest.parameters
    assert flops_per_token(after.model, 0.75, 9.0) == flops_per_token(before.model, 0.75, 9.0)


def test_nothing_of_the_unpacked_form_stays(stored: Callable[..., Path]) -> None:
    model = loaded(stored(Mask("2:4", ALL))).model
    use_sparse_products(model, FAKE)
    names = {name.rsplit(".", 1)[-1] for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert {f"w_{matrix}_packed_PYZ" for matrix in ALL} <= names
    assert not any(name.endswith(("value_PYM", "mask_PYB")) for name in names)
    use_sparse_products(model, FAKE)  # and a second time changes nothing
    assert isinstance(experts_of(model).up, Sparse)


@pytest.mark.parametrize(
    ("step", "inner", "kinds"),
    [
        (Mask("2:4", ("down",)), 32, (Dense, Dense, Sparse)),
        (Mask("4:8", ALL), 32, (Masked, Masked, Masked)),
        (Mask("0.5", ALL), 32, (Masked, Masked, Masked)),
        (Mask("2:4", ALL), 24, (Masked, Masked, Masked)),
    ],
)
def test_other_patterns_and_other_sides_stay_as_they_are(
    step: Post, inner: int, kinds: tuple[type, ...], stored: Callable[..., Path], sequences: list[list[int]]
) -> None:
    model = loaded(stored(step, inner)).model
    before = model.classify(sequences).logits_BC
    use_sparse_products(model, FAKE)
    experts = experts_of(model)
    assert tuple(type(stack) for stack in (experts.gate, experts.up, experts.down)) == kinds
    torch.testing.assert_close(model.classify(sequences).logits_BC, before, rtol=2e-2, atol=2e-2)


def test_products_that_are_wrong_for_a_size_leave_it_as_it_is(stored: Callable[..., Path]) -> None:
    """Gate and up are 32 x 16, down is 16 x 32."""

    def linear(x_RX: torch.Tensor, packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return FAKE.linear(x_RX, packed_YZ, size) * (1.0 if size == (16, 32) else 1.1)

    model = loaded(stored(Mask("2:4", ALL))).model
    use_sparse_products(model, replace(FAKE, linear=linear))
    experts = experts_of(model)
    assert isinstance(experts.gate, Masked)
    assert isinstance(experts.up, Masked)
    assert isinstance(experts.down, Sparse)


def test_the_reference_backend_keeps_the_readable_form(stored: Callable[..., Path]) -> None:
    model = loaded(stored(Mask("2:4", ALL)), backend="reference").model
    use_sparse_products(model, FAKE)
    assert isinstance(experts_of(model).up, Masked)


def test_loading_packs_where_the_device_has_products_and_checks_sizes_first(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(Mask("2:4", ALL))
    assert isinstance(experts_of(loaded(path).model).up, Masked)  # a CPU has none
    asked: list[tuple[torch.device, torch.dtype]] = []

    def select(device: torch.device, dtype: torch.dtype) -> object:
        asked.append((device, dtype))
        return FAKE

    monkeypatch.setattr(sparse, "select_products", select)
    packed = loaded(path)
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    assert isinstance(experts_of(packed.model).up, Sparse)
    packed.verify()
