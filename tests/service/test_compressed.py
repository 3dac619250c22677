"""Compressed checkpoints behind the service: the answers are the model's, the bytes are the manifest's."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint, load_checkpoint
from models.pruning.prune import prune
from service.settings import load_settings
from tests.service.conftest import Harness
from tests.service.test_real_model import LABELS, TEXTS, write_checkpoints

METHODS = {"moe-pruner": 4, "mc-smoe": 2}
YAML = """
version: 1
models: {root: ., dtype: float32}
deployments:
  parent: {path: parent, role: full}
  moe-pruner: {path: moe-pruner, role: pruned}
  mc-smoe: {path: mc-smoe, role: pruned}
tasks:
  colour:
    deployments: [parent, moe-pruner, mc-smoe]
    full: parent
    required: [parent, moe-pruner, mc-smoe]
engine: {max_batch_tokens: 16, max_batch_items: 3}
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed")
    write_checkpoints(path)
    rows = [{"text": f"w{i % 9 + 1} w{i % 5 + 1} w{i % 7 + 1}", "label": LABELS[i % 3]} for i in range(60)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"moe-pruner": {"pattern": "2:4"}, "mc-smoe": {"rank": "2", "row-ratio": "0.25"}}
    for name, keep in METHODS.items():
        prune(path / "parent", name, keep, path / name, data=path / "rows.jsonl", options=options[name])
    (path / "secateur.yaml").write_text(YAML, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def harness(directory: Path) -> Iterator[Harness]:
    harness = Harness(load_settings(directory / "secateur.yaml", {}), load_checkpoint)
    harness.wait_loaded()
    yield harness
    harness.close()


def stored(directory: Path, name: str) -> Checkpoint:
    return load_checkpoint(directory / name, dtype="float32")


@pytest.mark.parametrize("name", METHODS)
def test_answers_are_the_models(name: str, directory: Path, harness: Harness) -> None:
    checkpoint = stored(directory, name)
    body = {"inputs": TEXTS, "variant": name, "activation": "none"}
    response = harness.client.post("/classify", json=body)
    assert response.status_code == 200
    for text, item in zip(TEXTS, response.json()["data"], strict=True):
        alone = checkpoint.model.classify([checkpoint.encoder.encode(text).ids]).logits_BC[0]
        assert item["probs"] == pytest.approx(alone.tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_saved_bytes_are_the_manifests(name: str, directory: Path, harness: Harness) -> None:
    manifest = stored(directory, name).manifest
    assert manifest is not None
    assert manifest.parent is not None
    saved = harness.metric("memory_saved_bytes", variant=name, basis="loaded")
    assert saved == manifest.parent.bytes - manifest.bytes
    assert saved > 0
