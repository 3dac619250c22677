"""secateur.json: read strictly, hashed reproducibly, held against the weights."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import load_checkpoint
from models.errors import CheckpointError
from models.manifest import Manifest, combined_sha256, file_sha256, read_manifest


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((path / "secateur.json").read_text())
    change(value)
    (path / "secateur.json").write_text(json.dumps(value))


def test_hashes_are_those_of_the_files(saved_dir: Path) -> None:
    manifest = read_manifest(saved_dir)
    assert manifest is not None
    assert set(manifest.files) == {"config.json", "tokenizer.json", "model.safetensors"}
    for name, digest in manifest.files.items():
        assert digest == hashlib.sha256((saved_dir / name).read_bytes()).hexdigest()
        assert digest == file_sha256(saved_dir / name)


def test_the_combined_hash_does_not_depend_on_order() -> None:
    by_hand = hashlib.sha256(b"a 1\nb 2\n").hexdigest()
    assert combined_sha256({"b": "2", "a": "1"}) == combined_sha256({"a": "1", "b": "2"}) == by_hand
    assert combined_sha256({"a": "1", "b": "3"}) != by_hand


def test_a_manifest_survives_a_round_trip(saved_dir: Path) -> None:
    manifest = read_manifest(saved_dir)
    assert manifest is not None
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert (manifest.method, manifest.semantics, manifest.parent_sha256) == ("none", "none", None)
    assert manifest.bytes == 4 * manifest.parameters


def test_a_directory_without_a_manifest(pristine: Path) -> None:
    assert read_manifest(pristine) is None
    load_checkpoint(pristine).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("layers"), "layers: Field required"),
        (lambda m: m.update(layer_count=2), "layer_count: Extra inputs are not permitted"),
        (lambda m: m.update(format=2), "format: Input should be 1"),
        (lambda m: m.update(semantics="mask"), "semantics"),
        (lambda m: m["layers"][1].update(num_experts="many"), r"layers.1.num_experts: Input should be a valid integer"),
    ],
)
def test_a_bad_field_is_named(saved_dir: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(saved_dir, change)
    with pytest.raises(CheckpointError, match=f"secateur.json: .*{message}"):
        load_checkpoint(saved_dir)


def fewer_experts(manifest: dict[str, Any]) -> None:
    manifest["layers"][1] |= {"num_experts": 3, "kept": [0, 1, 2], "route": [0, 1, 2, -1]}


def more_experts(manifest: dict[str, Any]) -> None:
    manifest["layers"][1] |= {"num_experts": 5, "kept": [0, 1, 2, 3, 4], "route": [0, 1, 2, 3, 4]}


def one_layer_less(manifest: dict[str, Any]) -> None:
    manifest["layers"].pop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"model.safetensors": "0" * 64}), "model.safetensors has another sha256 than"),
        (
            lambda m: m["files"].pop("tokenizer.json"),
            r"secateur.json: files are \['config.json', 'model.safetensors'\]",
        ),
        (lambda m: m.update(parameters=m["parameters"] + 1), r"secateur.json: parameters is \d+, the weights hold \d+"),
        (lambda m: m.update(bytes=m["bytes"] - 1), r"secateur.json: bytes is \d+, the weights hold \d+"),
        (lambda m: m.update(dtype="bfloat16"), "secateur.json: dtype is bfloat16, the weights hold float32"),
        (lambda m: m.update(family="mixtral"), "family is 'mixtral', config.json says 'qwen3_moe'"),
        (fewer_experts, r"tensor model.layers.1.mlp.experts.3\S+ belongs to no parameter"),
        (more_experts, r"tensor model.layers.1.mlp.experts.4\S+ is missing|has shape \[4, 16\], must be \[5, 16\]"),
        (one_layer_less, "secateur.json lists 1 layers, config.json has 2"),
    ],
)
def test_a_manifest_that_disagrees_with_the_files(
    saved_dir: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(saved_dir, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved_dir)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_changed_after_saving(saved_dir: Path, name: str) -> None:
    content = bytearray((saved_dir / name).read_bytes())
    content[-1] ^= 1
    (saved_dir / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(saved_dir)


def test_a_weight_changed_and_resealed_fails_the_golden_answers(
    saved_dir: Path, reseal: Callable[[Path], None], edit_tensors: Callable[..., None]
) -> None:
    edit_tensors(saved_dir, lambda tensors: tensors["score.weight"].mul_(1.01))
    with pytest.raises(CheckpointError, match=r"model.safetensors has another sha256"):
        load_checkpoint(saved_dir)
    reseal(saved_dir)
    with pytest.raises(CheckpointError, match="golden input 0 is off by"):
        load_checkpoint(saved_dir).verify()


@pytest.mark.parametrize(
    ("route", "message"),
    [
        pytest.param(
            [0, 1, 2, 4], r"route must reach all 4 experts and no other, it reaches \[0, 1, 2, 4\]", id="beyond"
        ),
        pytest.param([0, 1, 2, 2], r"route must reach all 4 experts and no other, it reaches \[0, 1, 2\]", id="missed"),
        pytest.param(
            [-2, 1, 2, 0, 3], "tensor model.layers.1.mlp.constants is missing", id="a constant that is not stored"
        ),
    ],
)
def test_a_route_that_does_not_fit_the_experts(saved_dir: Path, route: list[int], message: str) -> None:
    edit(saved_dir, lambda manifest: manifest["layers"][1].update(route=route))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved_dir)
