"""Pruning end to end: from two checkpoints on disk to a verified child, held against `transformers` and the files."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from models import memory
from models.checkpoint import load_checkpoint, save_checkpoint
from models.dataset import read_rows
from models.errors import CheckpointError, PlanError, SecateurError
from models.evaluate import evaluate
from models.pruning.prune import prune

FAMILIES = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral")
ROUTER = {"mixtral": "model.layers.{}.block_sparse_moe.gate.weight"}


def router_name(family: str, layer: int) -> str:
    return ROUTER.get(family, "model.layers.{}.mlp.gate.weight").format(layer)


@pytest.fixture
def pair(
    make_oracle: Callable[..., Any], write_oracle: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Path, Path]]:
    """(family) -> a base and a copy of it whose routers were moved, as two directories."""

    def make(family: str = "qwen3_moe", **options: Any) -> tuple[Path, Path]:
        base = write_oracle(make_oracle(family, **options), tmp_path / f"{family}-base")
        tuned = tmp_path / f"{family}-tuned"
        shutil.copytree(base, tuned)
        tensors = load_torch(tuned / "model.safetensors")
        for name, tensor in tensors.items():
            if "gate.weight" in name and "shared" not in name:
                tensors[name] = tensor + 0.5 * torch.randn_like(tensor)
        save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
        return base, tuned

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_experts_follow_from_the_files_alone(
    family: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pair(family)
    child = prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=base)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    recorded = json.loads((tmp_path / "child" / "secateur.json").read_text())["layers"]
    for layer in (0, 1):
        name = router_name(family, layer)
        change = np.linalg.norm(after[name], axis=1) - np.linalg.norm(before[name], axis=1)
        assert recorded[layer]["kept"] == sorted(np.argsort(change)[-2:].tolist())
        assert recorded[layer]["scores"] == pytest.approx(change.tolist(), rel=1e-4)
    assert child.experts_kept == (2, 2)
    assert child.experts_total == (4, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_slice_is_a_hugging_face_checkpoint_with_the_same_logits(
    family: str, pair: Callable[..., tuple[Path, Path]], oracle_class: Callable[[str], Any], tmp_path: Path
) -> None:
    base, tuned = pair(family)
    child = prune(tuned, "router-norm-change", 3, tmp_path / "child", pretrained=base, semantics="slice")
    oracle = oracle_class(family).from_pretrained(tmp_path / "child").eval()
    sequences = [[3, 9, 27, 1], [5], [8, 8, 8, 41, 2, 7, 13]]
    ours = child.model.classify(sequences).logits_BC
    with torch.no_grad():
        theirs = torch.cat([oracle(input_ids=torch.tensor([ids])).logits for ids in sequences])
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_zero_child_is_refused_by_transformers_instead_of_misread(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    base, tuned = pair()
    prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=base, semantics="zero")
    with pytest.raises(ValueError, match="secateur"):
        AutoConfig.from_pretrained(tmp_path / "child")


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("semantics", ["slice", "zero"])
def test_resident_bytes_fall_by_exactly_what_the_manifest_says(
    semantics: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pair()
    child = prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=base, semantics=semantics)
    manifest = child.manifest
    assert manifest is not None
    assert manifest.parent is not None
    parent = load_checkpoint(tuned)
    fallen = sum(parent.weight_bytes().values()) - sum(child.weight_bytes().values())
    assert fallen == manifest.parent.bytes - manifest.bytes
    # 2 layers, 2 experts each, 3 matrices 16 x 12 (and two router rows of 16 under slice), float32
    assert fallen == 2 * 2 * (3 * 16 * 12 + (16 if semantics == "slice" else 0)) * 4
    weights = [p for c in (parent, child) for p in c.model.parameters()]
    assert bytes_of(weights) == sum(memory.resident_bytes([c.model]) for c in (parent, child)) - sum(
        bytes_of(c.model.buffers()) for c in (parent, child)
    )


def test_same_request_same_bytes(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair()
    for name in ("a", "b"):
        prune(tuned, "router-norm-change", 0.5, tmp_path / name, pretrained=base)
    for file in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_frequency_calibrates_on_train_rows_and_records_them(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    _, tuned = pair()
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "label": "LABEL_0", "split": "train"} for i in range(30)]
    rows.append({"text": "w1", "label": "LABEL_1", "split": "test"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    child = prune(tuned, "frequency", 3, tmp_path / "child", data=data, semantics="zero")
    assert child.manifest is not None
    assert child.manifest.calibration is not None
    assert child.manifest.calibration.rows == 30
    # every text has 3 words and a closing token, top-2, per layer
    assert sum(child.manifest.layers[0].scores) == 30 * 4 * 2


def test_dev_rows_judge_parent_and_child(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair()
    rows = [{"text": f"w{i} w{i * 7 % 50}", "label": f"LABEL_{i % 3}", "split": "dev"} for i in range(40)]
    rows += [{"text": "w1", "label": "LABEL_0", "split": "train"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    child = prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=base, data=data)
    assert child.manifest is not None
    accuracy = child.manifest.accuracy
    assert accuracy is not None
    assert accuracy.data.rows == 40
    dev = read_rows(data, "dev")
    assert accuracy.child == evaluate(child, dev).accuracy
    assert accuracy.parent == evaluate(load_checkpoint(tuned), dev).accuracy


def test_routers_trained_by_adam_are_warned_about(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, tuned = pair()
    parent = load_checkpoint(tuned)
    for name, optimizer, warnings in (("sgd", "sgd", 0), ("adam", "adamw", 1)):
        caplog.clear()
        written = tmp_path / f"parent-{name}"
        training = {"router_optimizer": optimizer}
        save_checkpoint(written, parent.model, parent.raw_config, tuned / "tokenizer.json", training=training)
        prune(written, "router-norm-change", 2, tmp_path / name, pretrained=base)
        assert len([r for r in caplog.records if "fine-tuned by AdamW" in r.message]) == warnings


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"method": "magic"}, "method is 'magic', must be one of router-norm-change, frequency, random"),
    ({"pretrained": None}, "give --pretrained"),
    ({"method": "frequency"}, "give --data"),
    ({"keep": 1}, "fewer than the top-2"),
    ({"keep": 5}, "only 4 experts"),
    ({"keep": 0.0}, "a fraction above 0"),
    ({"keep": 1.5}, "a fraction above 0"),
    ({"semantics": "tie"}, "use slice or zero"),
    ({"semantics": "delete"}, "must be slice or zero"),
]


@pytest.mark.parametrize(("change", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused_and_nothing_is_written(
    change: dict[str, Any], message: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pair()
    request = {"method": "router-norm-change", "keep": 2, "pretrained": base, **change}
    before = set(tmp_path.iterdir())
    with pytest.raises(SecateurError, match=message):
        prune(tuned, out=tmp_path / "child", **request)
    assert set(tmp_path.iterdir()) == before


def test_routers_that_did_not_move_are_refused(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, _ = pair()
    with pytest.raises(PlanError, match="router was frozen"):
        prune(base, "router-norm-change", 2, tmp_path / "child", pretrained=base)


def test_different_families_are_refused(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, tuned = pair("qwen3_moe")
    other, _ = pair("mixtral")
    with pytest.raises(PlanError, match="pretrained checkpoint is a mixtral, the fine-tuned one a qwen3_moe"):
        prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=other)


def test_routers_of_another_shape_are_refused(
    pair: Callable[..., tuple[Path, Path]],
    make_oracle: Callable[..., Any],
    write_oracle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    _, tuned = pair()
    wide = write_oracle(make_oracle("qwen3_moe", num_experts=6), tmp_path / "wide")
    with pytest.raises(PlanError, match="rows do not correspond"):
        prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=wide)


def test_an_existing_directory_is_not_overwritten(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair()
    (tmp_path / "child").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        prune(tuned, "router-norm-change", 2, tmp_path / "child", pretrained=base)


def test_a_base_may_hold_routers_only(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    base, tuned = pair()
    whole = prune(tuned, "router-norm-change", 2, tmp_path / "a", pretrained=base)
    tensors = {n: t for n, t in load_torch(base / "model.safetensors").items() if n.endswith("mlp.gate.weight")}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    routers = prune(tuned, "router-norm-change", 2, tmp_path / "b", pretrained=base)
    assert whole.manifest is not None
    assert routers.manifest is not None
    assert whole.manifest.layers == routers.manifest.layers
