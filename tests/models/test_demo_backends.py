"""The shipped demo answers the same through every implementation: full, and cut under each meaning of a lost expert."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import load_checkpoint
from models.classifier import Classifier, Output
from models.config import SEMANTICS, Semantics
from models.dataset import read_rows
from models.pruning.apply import apply
from models.pruning.plan import LayerPlan, keep_best

DEMO = Path(__file__).parents[2] / "demo"
TASKS = ("spam", "icd10", "language")
NUM_ROWS = 36
# Largest difference of a logit, relative to the largest logit. Measured on a CPU: 1.5e-7.
TOLERANCE = 1e-5
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = [pytest.param("cpu", "cpu", id="cpu"), pytest.param("triton", "cuda", id="triton", marks=on_a_gpu)]


def classify(task: str, model: Classifier) -> Output:
    path = DEMO / "checkpoints" / task / "full"
    encoder = load_checkpoint(path).encoder
    rows = read_rows(DEMO / "data" / f"{task}.jsonl.gz", "dev")
    return model.classify([encoder.encode(row.text).ids for row in rows[:: len(rows) // NUM_ROWS]])


def loaded(task: str, device: str, backend: str) -> Classifier:
    return load_checkpoint(DEMO / "checkpoints" / task / "full", device, "float32", backend).model


def cut(model: Classifier, semantics: Semantics) -> Classifier:
    """A different half, or a few more, of each layer's experts."""
    plans = {}
    for index in model.config.moe_layers:
        count = model.config.layers[index].num_experts
        if semantics == "tie":  # neighbours become one
            mix_KE = np.repeat(np.eye(count // 2), 2, axis=1) / 2
            plans[index] = LayerPlan(mix_KE, np.arange(count) // 2, semantics)
            continue
        generator = np.random.default_rng(index)
        plan = keep_best(generator.random(count), count // 2 + index, "zero")
        const_ED = generator.normal(size=(count, model.config.width)).astype(np.float32)
        plans[index] = LayerPlan(plan.mix_KE, plan.route_E, semantics, const_ED=const_ED)
    return apply(model, plans)


def assert_same(ours: Output, reference: Output) -> None:
    assert torch.equal(ours.logits_BC.argmax(1), reference.logits_BC.argmax(1))
    difference = (ours.logits_BC - reference.logits_BC).abs().max() / reference.logits_BC.abs().max()
    assert float(difference) < TOLERANCE
    assert (ours.routed_slots, ours.dropped_slots) == (reference.routed_slots, reference.dropped_slots)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("task", TASKS)
def test_full(task: str, backend: str, device: str) -> None:
    ours = classify(task, loaded(task, device, backend))
    assert len(ours.logits_BC) >= NUM_ROWS
    assert_same(ours, classify(task, loaded(task, device, "reference")))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_pruned(semantics: Semantics, backend: str, device: str) -> None:
    ours = classify("language", cut(loaded("language", device, backend), semantics))
    reference = classify("language", cut(loaded("language", device, "reference"), semantics))
    assert (ours.dropped_slots > 0) == (semantics in ("zero", "constant"))
    assert_same(ours, reference)
