"""Bytes by part against arithmetic by hand, and bytes that a process really holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.checkpoint import load_checkpoint
from models.decoder import layer_parameters, outer_parameters
from models.memory import PART_OF, PARTS, held_bytes, num_parameters, resident_bytes, weight_bytes


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_parts_add_up_to_the_bytes_computed_by_hand(pristine: Path, dtype: str, size: int) -> None:
    """Width 16, 64 words, 2 layers, 4 heads and 2 key heads of 6, 4 experts of width 12, 3 classes."""
    loaded = load_checkpoint(pristine, dtype=dtype)
    by_hand = {
        "experts": 2 * 4 * 3 * 12 * 16,
        "router": 2 * 4 * 16,
        "attention": 2 * ((24 + 12 + 12) * 16 + 16 * 24 + 6 + 6),
        "embedding": 64 * 16,
        "head": 3 * 16,
        "other": 2 * 2 * 16 + 16,
    }
    assert loaded.weight_bytes() == {part: size * elements for part, elements in by_hand.items()}
    assert num_parameters(loaded.model) == sum(by_hand.values())
    assert tuple(loaded.weight_bytes()) == PARTS


def test_the_shared_and_the_dense_feed_forward_are_no_experts(
    tmp_path: Path, make_oracle: Callable[..., Any], write_oracle: Callable[..., Path]
) -> None:
    oracle = make_oracle("qwen2_moe", mlp_only_layers=[0])
    loaded = load_checkpoint(write_oracle(oracle, tmp_path / "checkpoint"))
    sizes = loaded.weight_bytes()
    assert sizes["experts"] == 4 * (4 * 3 * 12 * 16)
    dense, shared, norms = 3 * 24 * 16, 3 * 20 * 16 + 16, 2 * 2 * 16 + 16
    assert sizes["other"] == 4 * (dense + shared + norms)
    assert sum(sizes.values()) == 4 * sum(p.numel() for p in oracle.parameters())


def test_every_parameter_has_a_part(pristine: Path) -> None:
    config = load_checkpoint(pristine).model.config
    names = {*outer_parameters(config), *layer_parameters(config, 0)}
    assert {name for name in names if name not in PART_OF} == {"norm_D", "attention_norm_D", "ffn_norm_D"}


def test_resident_bytes_of_a_loaded_model(pristine: Path) -> None:
    """Parameters plus the two buffers: rope [2, 48, 6] in float32, a table of four int32 per layer."""
    loaded = load_checkpoint(pristine)
    expected = sum(loaded.weight_bytes().values()) + 4 * 2 * 48 * 6 + 2 * 4 * 4
    assert resident_bytes([loaded.model]) == expected
    assert held_bytes(loaded.model) == sum(loaded.weight_bytes().values())
    assert resident_bytes([loaded.model, loaded.model]) == expected
    assert resident_bytes([loaded.model, load_checkpoint(pristine).model]) == 2 * expected


def test_a_view_keeps_its_whole_storage() -> None:
    model = nn.Module()
    parent = torch.zeros(100, 10)
    model.kept = nn.Parameter(parent[:3])
    assert weight_bytes(model)["other"] == 3 * 10 * 4
    assert resident_bytes([model]) == held_bytes(model) == 100 * 10 * 4
    model.kept = nn.Parameter(parent[:3].clone())
    assert resident_bytes([model]) == held_bytes(model) == 3 * 10 * 4


def test_tied_parameters_count_once() -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(5, 4))
    model.second = model.first
    assert weight_bytes(model)["other"] == resident_bytes([model]) == 5 * 4 * 4
