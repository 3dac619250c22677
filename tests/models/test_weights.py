"""Safetensors in and out, and each way a file can be wrong: the message names the tensor or file and the fix."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config import LayerShape, ModelConfig
from models.decoder import MoEClassifier
from models.errors import CheckpointError
from models.hf_config import parse_config, read_json
from models.weights import (
    choose_dtype,
    load_weights,
    places,
    read_tensors,
    save_weights,
    stored_dtype,
    tensor_headers,
    weight_files,
)

Edit = Callable[[Path, Callable[[dict[str, torch.Tensor]], object]], None]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


def load(path: Path) -> MoEClassifier:
    model = MoEClassifier(parse_config(read_json(path / "config.json")))
    load_weights(model, weight_files(path))
    return model


def test_every_tensor_lands_in_its_rows(pristine: Path) -> None:
    model, stored = load(pristine), load_file(pristine / "model.safetensors")
    layer = model.get_parameter("layers.1.w_in_PGD")
    assert torch.equal(layer[2, 12:], stored[UP])
    assert torch.equal(layer[2, :12], stored[UP.replace("up_proj", "gate_proj")])
    qkv = model.get_parameter("layers.0.w_qkv")
    parts = [stored[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert [len(part) for part in parts] == [24, 12, 12]
    assert torch.equal(qkv, torch.cat(parts))


def test_places_cover_every_parameter_exactly_once(pristine: Path) -> None:
    config = parse_config(read_json(pristine / "config.json"))
    layers = (LayerShape(2, (0, -2, 1, -3)), LayerShape.unpruned(4))  # constants take part too
    model = MoEClassifier(ModelConfig(**{**vars(config), "layers": layers}))
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for place in places(model.config):
            view = place.view(parameters)
            assert view.shape == place.shape
            view += 1
    assert all((parameter == 1).all() for parameter in parameters.values())
    names = [place.name for place in places(model.config)]
    assert len(set(names)) == len(names)


def remove(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.9.up_proj.weight"] = torch.zeros(12, 16)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].t().contiguous()


def poison_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 4] = torch.nan


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 4] = torch.inf


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, f"tensor {UP} is missing: the checkpoint is incomplete"),
        (dict.clear, r"tensor model.embed_tokens.weight is missing \(and \d+ more\)"),
        (add, r"tensor model.layers.0.mlp.experts.9.up_proj.weight belongs to no parameter of this model"),
        (reshape, rf"tensor {UP} has shape \[16, 12\], must be \[12, 16\]"),
        (poison_one, f"tensor {UP} holds NaN or infinite values"),
        (overflow, f"tensor {UP} holds NaN or infinite values"),
        (quantise, f"tensor {UP} has dtype I8, must be F32, F16 or BF16"),
    ],
)
def test_a_wrong_tensor_is_named(
    checkpoint_dir: Path, edit_tensors: Edit, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    edit_tensors(checkpoint_dir, change)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint_dir)


def test_leftovers_of_old_writers_are_ignored(checkpoint_dir: Path, edit_tensors: Edit) -> None:
    def leave(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(64, 16)

    edit_tensors(checkpoint_dir, leave)
    load(checkpoint_dir)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 20_000, -1])
def test_a_truncated_file(checkpoint_dir: Path, keep: int) -> None:
    file = checkpoint_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        load(checkpoint_dir)


@pytest.mark.parametrize("length", [2**62, 2**31, 10**9, 120_000_000])
def test_a_header_that_claims_to_be_huge(checkpoint_dir: Path, length: int) -> None:
    file = checkpoint_dir / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        load(checkpoint_dir)


def test_a_header_that_points_past_the_end(checkpoint_dir: Path) -> None:
    header = json.dumps({UP: {"dtype": "F32", "shape": [12, 16], "data_offsets": [0, 768]}}).encode()
    (checkpoint_dir / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a whole safetensors file"):
        load(checkpoint_dir)


def test_a_pickle_is_refused_unopened(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "model.safetensors").unlink()
    (checkpoint_dir / "pytorch_model.bin").write_bytes(b"\x80\x04boom")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle .* convert the weights to model.safet"):
        weight_files(checkpoint_dir)


def test_no_weights_at_all(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tiny holds neither model.safetensors nor model.safetensors.index.json"):
        weight_files(checkpoint_dir)


def shard(path: Path) -> None:
    """Split the single file into two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(checkpoint_dir: Path) -> None:
    shard(checkpoint_dir)
    load(checkpoint_dir)
    (checkpoint_dir / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names b.safetensors, which is missing"):
        weight_files(checkpoint_dir)


def test_a_tensor_in_two_shards(checkpoint_dir: Path) -> None:
    shard(checkpoint_dir)
    tensors = load_file(checkpoint_dir / "b.safetensors")
    save_file(
        {**tensors, "model.norm.weight": torch.ones(16), "score.weight": torch.ones(3, 16)},
        checkpoint_dir / "b.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"stands in two files: a.safetensors and b.safetensors"):
        load(checkpoint_dir)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map is missing or empty"),
        ({"weight_map": {}}, "weight_map is missing or empty"),
        ({"weight_map": ["a"]}, "weight_map is missing or empty"),
        ({"weight_map": {"x": "../secret.safetensors"}}, "'../secret.safetensors' is not a safetensors file beside"),
        ({"weight_map": {"x": "/etc/passwd"}}, "'/etc/passwd' is not a safetensors file beside"),
        ({"weight_map": {"x": "weights.bin"}}, "'weights.bin' is not a safetensors file beside"),
    ],
)
def test_an_index_that_leads_nowhere(checkpoint_dir: Path, index: dict[str, object], message: str) -> None:
    (checkpoint_dir / "model.safetensors").unlink()
    (checkpoint_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        weight_files(checkpoint_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_read_back(pristine: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = load(pristine)
    save_weights(model, tmp_path / "model.safetensors", dtype)
    again = MoEClassifier(model.config, dtype)
    load_weights(again, weight_files(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.to(dtype)), name
    assert {kind for _, _, kind in tensor_headers(weight_files(tmp_path)).values()} == {
        {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    }


def test_some_tensors_by_name(pristine: Path) -> None:
    tensors = read_tensors(weight_files(pristine), (UP, "score.weight"))
    assert [tuple(t.shape) for t in tensors.values()] == [(12, 16), (3, 16)]
    with pytest.raises(CheckpointError, match="tensor nobody is missing"):
        read_tensors(weight_files(pristine), ("nobody",))


def test_dtypes(pristine: Path, tmp_path: Path) -> None:
    assert stored_dtype(weight_files(pristine)) == "float32"
    save_weights(load(pristine), tmp_path / "model.safetensors", torch.bfloat16)
    assert stored_dtype(weight_files(tmp_path)) == "bfloat16"
    assert choose_dtype("auto", "float32", "cpu") == torch.float32
    assert choose_dtype("auto", "float16", "cpu") == torch.float32
    assert choose_dtype("auto", "float16", "cuda") == torch.float16
    assert choose_dtype("bfloat16", "float32", "cpu") == torch.bfloat16
    with pytest.raises(CheckpointError, match="dtype is 'int8', must be auto or one of float32, float16, bfloat16"):
        choose_dtype("int8", "float32", "cpu")
