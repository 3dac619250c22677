"""Compressed checkpoints: written, read, verified, counted to the byte, trained on, and refused where spoiled."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open

from kernels.compressed import CompressedExperts
from models import memory
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, source_of
from models.classifier import Classifier, MoELayer
from models.config import Bitmask, Compression, LowRank
from models.errors import CheckpointError, PlanError
from models.images import Pixels
from models.manifest import Layer
from models.pruning import METHODS
from models.pruning.apply import apply
from models.pruning.calibrate import calibrate
from models.pruning.method import Job
from models.pruning.plan import keep_best
from models.pruning.post import Factor, Mask, Post
from models.pruning.prune import prune
from models.pruning.stats import Core, Gram, LayerStats
from models.weights import load_weights, save_weights, weight_files
from tests.models.tiny_vision import VARIANTS, images, save_vision, tiny_vision

ALL = ("gate", "up", "down")
STEPS: dict[str, Post] = {
    "2:4": Mask("2:4", ALL),
    "half": Mask("0.5", ALL),
    "down only": Mask("2:4", ("down",)),
    "rows": Factor(2, 0.25),
    "columns": Factor(2, 0.25, "col"),
    "low rank": Factor(3, 0.0),
}
# Elements of the three matrices of one expert, 12 x 16, 12 x 16 and 16 x 12, and bytes beside them.
NUMBERS = {
    "2:4": (3 * 96, 12 * 2 + 12 * 2 + 16 * 2),
    "half": (3 * 96, 12 * 2 + 12 * 2 + 16 * 2),
    "down only": (2 * 192 + 96, 16 * 2),
    "rows": (3 * (2 * 28 + 48), 4 * (3 + 3 + 4)),
    "columns": (3 * (2 * 28 + 48), 4 * (4 + 4 + 3)),
    "low rank": (3 * 3 * 28, 0),
}


def compressed(model: Classifier, name: str) -> Classifier:
    """Layer 0 loses expert 3 and has the others compressed; layer 1 stays."""
    plan = keep_best([4, 3, 2, 1], 3, "zero")
    return apply(model, {0: type(plan)(plan.mix_KE, plan.route_E, "zero", post=(STEPS[name],))})


@pytest.fixture
def written(pristine: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    """(step, dtype) -> a checkpoint directory with the tiny model compressed so."""

    def write(name: str, dtype: str = "float32") -> Checkpoint:
        source = load_checkpoint(pristine)
        child = compressed(source.model, name)
        return save_checkpoint(
            tmp_path / "child", child, source.raw_config, pristine / "tokenizer.json", dtype=dtype, semantics="zero"
        )

    return write


@pytest.mark.parametrize("name", STEPS)
def test_what_was_written_is_read_and_answers_alike(
    name: str, written: Callable[..., Checkpoint], pristine: Path, sequences: list[list[int]]
) -> None:
    child = compressed(load_checkpoint(pristine).model, name)
    stored = written(name)
    assert stored.model.config.layers == child.config.layers
    for (key, old), (again, new) in zip(
        sorted((*child.named_parameters(), *child.named_buffers())),
        sorted((*stored.model.named_parameters(), *stored.model.named_buffers())),
        strict=True,
    ):
        assert key == again
        assert torch.equal(old, new), key
    assert torch.equal(child.classify(sequences).logits_BC, stored.model.classify(sequences).logits_BC)
    stored.verify()


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("name", STEPS)
def test_bytes_on_disk_and_resident_are_the_predicted(
    name: str, dtype: str, size: int, written: Callable[..., Checkpoint], pristine: Path
) -> None:
    """By hand, from the sizes of one expert; a safetensors file adds its header only."""
    numbers, beside = NUMBERS[name]
    rest = sum(p.numel() for p in load_checkpoint(pristine).model.parameters()) - 4 * 3 * 192
    predicted = size * (rest + 3 * numbers) + 3 * beside
    stored = written(name, dtype)
    assert stored.manifest is not None
    assert stored.manifest.bytes == predicted
    assert stored.manifest.parameters == rest + 3 * numbers
    assert stored.stored_dtype == dtype
    (file,) = weight_files(stored.path)
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    assert file.stat().st_size == header + predicted
    loaded = load_checkpoint(stored.path, dtype=dtype)
    assert sum(loaded.weight_bytes().values()) == predicted
    assert loaded.weight_bytes()["experts"] == size * (4 * 3 * 192 + 3 * numbers) + 3 * beside
    rope, tables = 2 * 48 * 6 * size, 2 * 4 * 4
    assert memory.resident_bytes([loaded.model]) == predicted + rope + tables
    source = source_of(stored.path)
    assert (source.parameters, source.bytes) == (stored.manifest.parameters, predicted)


def test_bfloat16_runs_compressed(written: Callable[..., Checkpoint], sequences: list[list[int]]) -> None:
    stored = written("rows", "bfloat16")
    load_checkpoint(stored.path, dtype="bfloat16").verify()
    exact = load_checkpoint(stored.path, dtype="float32").model.classify(sequences).logits_BC
    rough = load_checkpoint(stored.path, dtype="bfloat16").model.classify(sequences).logits_BC
    assert float((rough - exact).norm() / exact.norm()) < 5e-2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_agree(backend: str, written: Callable[..., Checkpoint], sequences: list[list[int]]) -> None:
    stored = written("2:4")
    other = load_checkpoint(stored.path, backend=backend).model
    torch.testing.assert_close(
        other.classify(sequences).logits_BC, stored.model.classify(sequences).logits_BC, rtol=1e-5, atol=1e-5
    )


def test_names_in_the_file_are_the_familys(written: Callable[..., Checkpoint]) -> None:
    with safe_open(weight_files(written("rows").path)[0], framework="pt") as handle:
        names = {name for name in handle.keys() if ".layers.0.mlp.experts.1." in name}  # noqa: SIM118
    prefix = "model.layers.0.mlp.experts.1."
    assert names == {f"{prefix}{m}_proj.{part}" for m in ALL for part in ("u", "v", "rows", "index")}


def test_transformers_is_told_not_to_read_it(written: Callable[..., Checkpoint]) -> None:
    assert written("2:4").raw_config["model_type"] == "secateur"


def test_the_manifest_names_the_form(written: Callable[..., Checkpoint]) -> None:
    layers = json.loads((written("rows").path / "secateur.json").read_text())["layers"]
    form = {"rank": 2, "lines": 3, "structure": "row"}
    assert layers[0]["compression"] == {"gate": form, "up": form, "down": {**form, "lines": 4}}
    assert layers[1]["compression"] is None


def test_forms_survive_the_manifest() -> None:
    forms = Compression(Bitmask(2, 4), None, LowRank(3, 1, "col"))
    layer = Layer(total=1, num_experts=1, kept=(0,), route=(0,), compression=forms)
    assert Layer.model_validate_json(layer.model_dump_json()).shape.compression == forms


def test_cutting_compressed_experts_again_is_refused(written: Callable[..., Checkpoint], tmp_path: Path) -> None:
    stored = written("2:4")
    again = "layer 0 is compressed already: prune its parent instead"
    with pytest.raises(PlanError, match=again):
        apply(stored.model, {0: keep_best([1, 2, 3, 4], 3, "zero")})
    with pytest.raises(PlanError, match=again):
        prune(stored.path, "random", 2, tmp_path / "grandchild")
    assert not (tmp_path / "grandchild").exists()
    with pytest.raises(PlanError, match="layer 0 is compressed already: calibrate its parent"):
        calibrate(stored.model, [[1, 2]], (Core,))


def test_another_layer_may_still_be_cut(written: Callable[..., Checkpoint], sequences: list[list[int]]) -> None:
    stored = written("rows").model
    child = apply(stored, {1: keep_best([1, 2, 3, 4], 4, "zero")})
    assert torch.equal(child.classify(sequences).logits_BC, stored.classify(sequences).logits_BC)


@pytest.mark.parametrize("name", ["half", "rows"])
def test_recovery_trains_what_is_kept_and_moves_no_mask(
    name: str, written: Callable[..., Checkpoint], sequences: list[list[int]]
) -> None:
    model = written(name).model.requires_grad_(True)
    before = {key: tensor.clone() for key, tensor in model.named_buffers()}
    batch = model.pack(sequences)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(batch).float(), torch.zeros(len(sequences), dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    expected = {"half": ("value_PYM",), "rows": ("u_PYL", "v_PLX", "rows_PQX")}[name]
    assert {f"layers.0.w_{m}_{part}" for m in ALL for part in expected} <= trained
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.named_buffers())


EXPERT = "model.layers.0.mlp.experts.1.down_proj."
SPOILED: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("2:4", lambda t: t[f"{EXPERT}mask"][3].fill_(15), "layer 0, expert 1: down does not keep 2 of each 4 columns"),
    # As many values as before, but three in one group.
    ("2:4", lambda t: t[f"{EXPERT}mask"][3, 0].fill_(0b00010111), "does not keep 2 of each 4"),
    ("half", lambda t: t[f"{EXPERT}mask"][3].fill_(255), "layer 0, expert 1: down does not keep 6 of each 12 columns"),
    (
        "rows",
        lambda t: t[f"{EXPERT}index"][-1].fill_(16),
        "expert 1: down lists rows that are not ascending from 0 to 15",
    ),
    ("rows", lambda t: t[f"{EXPERT}index"][0].fill_(-1), "down lists rows that are not ascending"),
    ("rows", lambda t: t[f"{EXPERT}index"][1].copy_(t[f"{EXPERT}index"][0]), "down lists rows that are not ascending"),
    ("columns", lambda t: t[f"{EXPERT}index"][-1].fill_(12), "down lists cols that are not ascending from 0 to 11"),
    ("rows", lambda t: t.pop(f"{EXPERT}u"), f"tensor {EXPERT}u is missing"),
    ("rows", lambda t: t.update({f"{EXPERT}u": t[f"{EXPERT}u"][:, :1].contiguous()}), r"u has shape \[16, 1\]"),
    ("2:4", lambda t: t.update({f"{EXPERT}mask": t[f"{EXPERT}mask"].float()}), "mask has dtype F32, must be U8"),
    ("rows", lambda t: t.update({f"{EXPERT}index": t[f"{EXPERT}index"].long()}), "index has dtype I64, must be I32"),
    (
        "2:4",
        lambda t: t.update({f"{EXPERT}value": t[f"{EXPERT}value"].int()}),
        "value has dtype I32, must be F32, F16 or",
    ),
    ("2:4", lambda t: t[f"{EXPERT}value"][0, 0].fill_(math.nan), "holds NaN"),
]


@pytest.mark.parametrize(("name", "change", "message"), SPOILED)
def test_spoiled_tensors_are_named(
    name: str,
    change: Any,
    message: str,
    written: Callable[..., Checkpoint],
    edit_tensors: Any,
    reseal: Any,
) -> None:
    path = written(name).path
    edit_tensors(path, change)
    reseal(path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"kept": 2, "group": 5}, "layer 0: gate of 12 x 16 cannot keep 2 of each 5 columns"),
        ({"kept": 5, "group": 4}, "a group of 4 columns cannot keep 5 values"),
        ({"rank": 13, "lines": 0, "structure": "row"}, "gate of 12 x 16 has no rank 13 and 0 rows"),
        ({"rank": 2, "lines": 13, "structure": "row"}, "gate of 12 x 16 has no rank 2 and 13 rows"),
        ({"rank": 2, "lines": 17, "structure": "col"}, "gate of 12 x 16 has no rank 2 and 17 cols"),
        ({"rank": 0, "lines": 1, "structure": "row"}, r"layers.0.compression.gate"),
        ({"rank": 2, "lines": 1, "structure": "diagonal"}, r"layers.0.compression.gate"),
    ],
)
def test_forms_that_cannot_be_are_refused(
    form: dict[str, Any], message: str, written: Callable[..., Checkpoint]
) -> None:
    path = written("2:4").path
    manifest = json.loads((path / "secateur.json").read_text())
    manifest["layers"][0]["compression"]["gate"] = form
    (path / "secateur.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_masks_keep_their_dtype_whatever_the_weights_have(pristine: Path, tmp_path: Path) -> None:
    child = compressed(load_checkpoint(pristine).model, "2:4")
    save_weights(child, tmp_path / "model.safetensors", torch.float16)
    again = compressed(load_checkpoint(pristine).model, "2:4")
    load_weights(again, (tmp_path / "model.safetensors",))
    for (name, old), (_, new) in zip(child.named_buffers(), again.named_buffers(), strict=True):
        assert old.dtype == new.dtype, name
        assert torch.equal(old, new), name


@pytest.mark.parametrize("variant", ["token", "expert-choice"])
@pytest.mark.parametrize(
    ("method", "keep", "options"),
    [("moe-pruner", 4, {"pattern": "2:4"}), ("mc-smoe", 2, {"rank": "2", "row-ratio": "0.25"})],
)
def test_experts_of_images_without_a_gate_and_with_biases(
    method: str, keep: int, options: dict[str, str], variant: str, tmp_path: Path
) -> None:
    """As written, read and run, against the same experts with every zero written out."""
    parent, chosen = tiny_vision(**VARIANTS[variant]), METHODS[method]
    items = [Pixels(value_HWc, 5) for value_HWc in images(6)]
    found = calibrate(parent, items, (Core, Gram))
    config = parent.config
    job = Job(
        parent=parent,
        stats={i: LayerStats(i, config.layers[i].num_rows, config.top_k, groups=found[i]) for i in config.moe_layers},
        keep=dict.fromkeys(config.moe_layers, keep),
        semantics=chosen.semantics[0],
        options=chosen.read_options(options),
        sequences=tuple(items),
    )
    plans = chosen.plan(job)
    stored = save_vision(tmp_path / "child", cast(Any, apply(parent, plans)), **VARIANTS[variant])
    stored.verify()
    twin = apply(parent, {i: replace(plan, post=()) for i, plan in plans.items()})
    for index in config.moe_layers:
        layer = stored.model.layers[index]
        assert isinstance(layer, MoELayer)
        experts = layer.experts
        assert isinstance(experts, CompressedExperts)
        for name in ("w_in_PGD", "w_out_PDF"):
            setattr(twin.layers[index], name, torch.nn.Parameter(getattr(experts.dense(), name), requires_grad=False))
    got, want = stored.model.classify(items).logits_BC, twin.classify(items).logits_BC
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, parent.classify(items).logits_BC, rtol=1e-2, atol=1e-2)


def test_the_gate_alone_cannot_be_pruned_where_there_is_none() -> None:
    parent, chosen = tiny_vision(), METHODS["moe-pruner"]
    stats = {i: LayerStats(i, 4, 2) for i in (0, 2)}
    job = Job(parent, stats, {0: 4, 2: 4}, "zero", chosen.read_options({"targets": "gate"}))
    with pytest.raises(PlanError, match="this model's experts have up, down and no other"):
        chosen.plan(job)
