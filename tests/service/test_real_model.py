"""Real checkpoints behind the service: the answers are the model's, the savings are the manifest's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.decoder import MoEClassifier
from models.hf_config import parse_config
from models.manifest import MANIFEST_FILE
from models.pruning.prune import prune
from service.settings import Settings, load_settings
from tests.service.conftest import Harness

LABELS = ("red", "green", "blue")
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "id2label": dict(enumerate(LABELS)),
    "problem_type": "single_label_classification",
}
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w1 w1 w1 w1 w1 w1 w1 w1 w1 w1"]
YAML = """
version: 1
models: {root: ., dtype: float32}
deployments:
  parent: {path: parent, role: full}
  slice: {path: slice, role: pruned}
  zero: {path: zero, role: pruned}
tasks:
  colour: {deployments: [parent, slice, zero], full: parent, required: [parent, slice, zero]}
engine: {max_batch_tokens: 16, max_batch_items: 3}
"""


@dataclass(frozen=True)
class Served:
    """A server over real checkpoints, and the same checkpoints loaded beside it."""

    harness: Harness
    directory: Path

    def checkpoint(self, name: str) -> Checkpoint:
        return load_checkpoint(self.directory / name, dtype="float32")

    def logits(self, name: str, texts: list[str]) -> list[list[float]]:
        body = {"inputs": texts, "variant": name, "activation": "none"}
        response = self.harness.client.post("/classify", json=body)
        assert response.status_code == 200
        return [item["probs"] for item in response.json()["data"]]


def write_checkpoints(directory: Path) -> None:
    vocabulary = {"[UNK]": 0, **{f"w{i}": i for i in range(1, CONFIG["vocab_size"])}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    model = MoEClassifier(parse_config(CONFIG))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    save_checkpoint(directory / "parent", model, CONFIG, directory / "tokenizer.json")
    for semantics in ("slice", "zero"):
        prune(directory / "parent", "random", 2, directory / semantics, semantics=semantics)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("real")
    write_checkpoints(directory)
    harness = Harness(_settings(directory), load_checkpoint)
    harness.wait_loaded()
    assert harness.client.get("/readyz").json()["status"] == "ready"
    yield Served(harness, directory)
    harness.close()


def _settings(directory: Path) -> Settings:
    file = directory / "secateur.yaml"
    file.write_text(YAML, encoding="utf-8")
    return load_settings(file, {})


@pytest.mark.parametrize("name", ["parent", "slice", "zero"])
def test_logits_are_the_models(served: Served, name: str) -> None:
    checkpoint = served.checkpoint(name)
    alone = [checkpoint.model.classify([checkpoint.encoder.encode(text).ids]).logits_BC[0] for text in TEXTS]
    for got, want in zip(served.logits(name, TEXTS), alone, strict=True):
        assert got == pytest.approx(want.tolist(), rel=1e-4, abs=1e-5)
    for text, want in zip(TEXTS, alone, strict=True):
        assert served.logits(name, [text])[0] == pytest.approx(want.tolist(), rel=1e-4, abs=1e-5)


def test_savings_are_the_manifests(served: Served) -> None:
    for name in ("slice", "zero"):
        manifest = served.checkpoint(name).manifest
        assert manifest is not None
        assert manifest.parent is not None
        saved = served.harness.metric("memory_saved_bytes", variant=name, basis="loaded")
        assert saved == manifest.parent.bytes - manifest.bytes
    # Two of four experts in each of two layers: three matrices of 8 x 16, and with `slice` a router row of 16.
    expert = 3 * 8 * 16 * 4
    assert served.harness.metric("memory_saved_bytes", variant="zero") == 4 * expert
    assert served.harness.metric("memory_saved_bytes", variant="slice") == 4 * (expert + 16 * 4)


def test_experts_per_layer(served: Served) -> None:
    document = served.harness.client.get("/deployments/zero").json()
    assert (document["experts_kept"], document["experts_total"]) == ([2, 2], [4, 4])
    assert document["method"] == "random"
    assert served.harness.metric("experts", variant="zero", state="kept") == 4


def test_routed_slots(served: Served) -> None:
    def slots(variant: str, outcome: str) -> float:
        return served.harness.metric("routed_slots_total", variant=variant, outcome=outcome)

    before = {key: slots(*key) for key in ((v, o) for v in ("slice", "zero") for o in ("kept", "pruned"))}
    for variant in ("slice", "zero"):
        served.logits(variant, ["w1 w2 w3"])
    after = {key: slots(*key) - before[key] for key in before}
    # Two choices for three tokens, then, in the last layer, for the last token. Only `zero` keeps rows of lost experts.
    assert after["slice", "kept"] == 8
    assert after["slice", "pruned"] == 0
    assert after["zero", "kept"] + after["zero", "pruned"] == 8
    assert after["zero", "pruned"] > 0


def test_lengths(served: Served) -> None:
    item = served.harness.classify(TEXTS[3]).json()["data"][0]
    assert (item["tokens"], item["truncated"]) == (8, True)
    assert served.harness.classify(TEXTS[3], truncate=False).status_code == 422


def test_nul_reaches_the_tokenizer(served: Served) -> None:
    assert served.harness.classify("w1\x00 \x07 \U0001f642 \u202eabc").status_code == 200


def test_a_changed_weight_is_not_served(tmp_path: Path) -> None:
    write_checkpoints(tmp_path)
    manifest = json.loads((tmp_path / "slice" / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest["golden"][0]["logits"][0] += 1.0
    (tmp_path / "slice" / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "zero" / "model.safetensors").write_bytes(b"not weights")
    harness = Harness(_settings(tmp_path), load_checkpoint)
    try:
        harness.wait_loaded()
        errors = {d["name"]: d["error"] for d in harness.client.get("/deployments").json()["data"]}
        assert errors == {"parent": None, "slice": "golden_mismatch", "zero": "invalid_checkpoint"}
        assert harness.client.get("/readyz").status_code == 503
        response: httpx.Response = harness.classify("w1", variant="slice")
        assert response.status_code == 503
    finally:
        harness.close()
