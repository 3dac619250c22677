"""Bytes saved are measured on the loaded tensors, each side served alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.errors import CheckpointError
from models.manifest import Layer, Manifest, Source
from service.deployments import Registry, State
from service.device_memory import publish_device_memory
from service.metrics import Metrics
from service.savings import alone_bytes, publish_weights, saved_bytes
from tests.service.conftest import Start
from tests.service.toys import ToyModel, toy_checkpoint, toy_loader, toy_settings

# A toy has an embedding of 4 x 8 and per expert 4 x 2, in float32.
FULL_BYTES = (32 + 4 * 8) * 4
PRUNED_BYTES = (32 + 2 * 8) * 4


def manifest(parent_parameters: int) -> Manifest:
    return Manifest(
        family="toy",
        method="router-norm-change",
        options={},
        semantics="slice",
        dtype="float32",
        parameters=48,
        bytes=PRUNED_BYTES,
        layers=(Layer(total=4, num_experts=2, kept=(0, 2), route=(0, 1)),) * 2,
        files={},
        golden=(),
        parent=Source(name="full", files={"model.safetensors": "aa"}, parameters=parent_parameters, bytes=1),
    )


def test_alone() -> None:
    assert alone_bytes(toy_checkpoint(model=ToyModel(kept=4))) == FULL_BYTES
    assert alone_bytes(toy_checkpoint(model=ToyModel(kept=2))) == PRUNED_BYTES


def test_against_the_loaded_full(start: Start) -> None:
    harness = start()
    names = {"task": "mood", "basis": "loaded"}
    assert harness.metric("memory_saved_bytes", **names, variant="mood-pruned") == FULL_BYTES - PRUNED_BYTES
    assert harness.metric("memory_saved_ratio", **names, variant="mood-pruned") == 0.25
    assert harness.metric("memory_saved_bytes", **names, variant="mood-full") == 0
    assert harness.metric("weights_bytes", variant="mood-pruned") == PRUNED_BYTES
    assert harness.metric("weights_bytes", variant="mood-pruned", part="experts") == 2 * 8 * 4
    # Two models of four experts and one of two.
    assert harness.metric("weights_unique_bytes") == 2 * FULL_BYTES + PRUNED_BYTES


def test_against_the_manifest_when_the_full_is_not_loaded(start: Start) -> None:
    loader = toy_loader()
    loader.broken["mood-full"] = CheckpointError("gone")
    loader.makers["mood-pruned"] = lambda: toy_checkpoint(model=ToyModel(kept=2), manifest=manifest(64))
    harness = start(loader)
    names = {"task": "mood", "variant": "mood-pruned"}
    assert harness.metric("memory_saved_bytes", **names, basis="manifest") == FULL_BYTES - PRUNED_BYTES
    assert harness.metric("memory_saved_bytes", **names, basis="loaded") == 0


def test_no_baseline_no_claim(start: Start) -> None:
    loader = toy_loader()
    loader.broken["mood-full"] = CheckpointError("gone")
    harness = start(loader)
    assert "# TYPE secateur_memory_saved_bytes gauge" in harness.client.get("/metrics").text
    assert 'secateur_memory_saved_bytes{basis="manifest"' not in harness.client.get("/metrics").text
    assert 'secateur_memory_saved_bytes{basis="loaded",task="mood"' not in harness.client.get("/metrics").text
    assert harness.client.get("/deployments/mood-pruned").json()["memory_saved"] is None


def test_the_basis_changes_when_the_full_arrives(tmp_path: Path) -> None:
    registry, metrics = Registry(toy_settings(tmp_path)), Metrics()
    pruned, full = registry.deployments["mood-pruned"], registry.deployments["mood-full"]
    pruned.loaded, pruned.state = toy_checkpoint(model=ToyModel(kept=2), manifest=manifest(640)), State.READY
    publish_weights(metrics, registry)
    assert saved_bytes(registry.tasks["mood"], pruned) == (2560 - PRUNED_BYTES, 2560, "manifest")
    full.loaded, full.state = toy_checkpoint(), State.READY
    publish_weights(metrics, registry)
    assert saved_bytes(registry.tasks["mood"], pruned) == (FULL_BYTES - PRUNED_BYTES, FULL_BYTES, "loaded")
    bases = {
        sample.labels["basis"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "secateur_memory_saved_bytes"
    }
    assert bases == {"loaded"}


@pytest.mark.parametrize("is_view", [True, False])
def test_a_view_keeps_its_parent_alive(tmp_path: Path, is_view: bool) -> None:
    registry, metrics = Registry(toy_settings(tmp_path)), Metrics()
    pruned = registry.deployments["mood-pruned"]
    model = ToyModel(kept=2)
    stacked = torch.zeros(100, 4, 2)
    model.w_in_PGD = nn.Parameter(stacked[:2] if is_view else stacked[:2].clone(), requires_grad=False)
    pruned.loaded, pruned.state = toy_checkpoint(model=model), State.READY
    publish_weights(metrics, registry)
    resident = metrics.registry.get_sample_value("secateur_weights_unique_bytes")
    assert (resident == alone_bytes(pruned.checkpoint)) is not is_view


@pytest.mark.parametrize(("allocated", "saved"), [(2, FULL_BYTES - PRUNED_BYTES), (4, 0)])
def test_an_expert_that_is_cut_and_still_allocated_saves_nothing(tmp_path: Path, allocated: int, saved: int) -> None:
    registry = Registry(toy_settings(tmp_path))
    pruned, full = registry.deployments["mood-pruned"], registry.deployments["mood-full"]
    full.loaded, full.state = toy_checkpoint(), State.READY
    model = ToyModel(kept=2)
    model.w_in_PGD = nn.Parameter(torch.zeros(allocated, 4, 2)[:2], requires_grad=False)
    pruned.loaded, pruned.state = toy_checkpoint(model=model), State.READY
    assert alone_bytes(pruned.checkpoint) == PRUNED_BYTES
    assert saved_bytes(registry.tasks["mood"], pruned) == (saved, FULL_BYTES, "loaded")


def test_what_the_device_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA allocator of our own, since the gauges are absent on a CPU."""
    sizes = iter([1000, 1000 + FULL_BYTES])
    monkeypatch.setattr("service.deployments.allocated_bytes", lambda device: next(sizes))
    registry, metrics = Registry(toy_settings(tmp_path)), Metrics()
    for name in ("mood-pruned", "topics-full"):
        registry.deployments.pop(name)
    registry.tasks.pop("topics")
    registry.load_all(toy_loader(), "cuda:0", "float32", "auto", lambda deployment: publish_weights(metrics, registry))
    delta = metrics.registry.get_sample_value("secateur_load_allocator_delta_bytes", {"variant": "mood-full"})
    assert delta == FULL_BYTES
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 30)
    properties = SimpleNamespace(total_memory=80)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    publish_device_memory(metrics, {torch.device("cuda:0"), torch.device("cpu")})
    found = {
        sample.name: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.labels.get("device") == "cuda:0"
    }
    assert found == {
        "secateur_device_memory_allocated_bytes": 10,
        "secateur_device_memory_reserved_bytes": 20,
        "secateur_device_memory_peak_bytes": 30,
        "secateur_device_memory_total_bytes": 80,
    }


def test_on_a_cpu_the_device_says_nothing(start: Start) -> None:
    harness = start()
    samples = [line for line in harness.client.get("/metrics").text.splitlines() if not line.startswith("#")]
    assert not [line for line in samples if "allocator" in line or "device_memory" in line]


def test_information_matches_the_manifest(start: Start) -> None:
    loader = toy_loader()
    loader.makers["mood-pruned"] = lambda: toy_checkpoint(model=ToyModel(kept=2), manifest=manifest(64))
    harness = start(loader)
    checkpoint = loader.made["mood-pruned"]
    assert checkpoint.manifest is not None
    assert harness.metric(
        "deployment_info",
        variant="mood-pruned",
        role="pruned",
        method="router-norm-change",
        artifact_sha256=checkpoint.artifact_sha256,
        parent_sha256=checkpoint.manifest.parent_sha256 or "",
        dtype="float32",
        device="cpu",
    )
    for state, count in (("kept", 2), ("total", 4)):
        assert harness.metric("layer_experts", variant="mood-pruned", layer="1", state=state) == count
        assert harness.metric("experts", variant="mood-pruned", state=state) == 2 * count
