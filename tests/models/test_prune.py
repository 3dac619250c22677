"""Pruning end to end: from two checkpoints on disk to a verified child, held against `transformers` and the files."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
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
from models.classifier import SlotTally
from models.config import LayerShape
from models.dataset import read_rows
from models.errors import CheckpointError, PlanError, SecateurError
from models.evaluate import evaluate
from models.progress import Progress
from models.pruning import METHODS
from models.pruning.allocate import Budget, Rules
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
    ({"method": "magic"}, "method is 'magic', must be one of router-norm-change, frequency, "),
    ({"pretrained": None}, "give --pretrained"),
    ({"method": "frequency"}, "give --data"),
    ({"keep": 1}, "fewer than the top-2"),
    ({"keep": 5}, "only 4 experts"),
    ({"keep": 0.0}, "a fraction above 0"),
    ({"keep": 1.5}, "a fraction above 0"),
    ({"semantics": "tie"}, "semantics is 'tie', router-norm-change can do zero, slice"),
    ({"semantics": "delete"}, "semantics is 'delete', router-norm-change can do zero, slice"),
    ({"options": {"allow-flt": "true"}}, "router-norm-change has no option 'allow-flt': its options are allow-flat"),
    ({"options": {"allow_flat": "1"}}, "router-norm-change: option allow-flat is '1', must be true or false"),
    ({"method": "random", "options": {"seed": "1"}}, "random has no option 'seed': it has no options"),
    ({"keep": (2, 2, 2)}, "keep lists 3 counts, the model has 2 layers with experts"),
    ({"rules": Rules(exempt=(7,))}, "layer 7 has no experts; those that have are 0, 1"),
    ({"rules": Rules(protect={0: (4,)})}, "layer 0 has no expert 4, they are 0 to 3"),
    ({"rules": Rules(allocation="even")}, "allocation is 'even', must be one of uniform, global"),
    ({"rules": Rules(allocation="global")}, "ranks experts within a layer only"),
    ({"max_class_loss": 0.1}, "--max-class-loss compares parent and child on dev rows: give --data"),
    ({"stats": Path("absent.safetensors"), "method": "frequency"}, "absent.safetensors is missing"),
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


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty rows of three classes: 45 for train, 15 for dev."""
    lines = [
        {
            "text": f"w{i % 50} w{i * 7 % 50} w{i * i % 50}",
            "label": f"LABEL_{i % 3}",
            "split": "dev" if i % 4 == 1 else "train",
        }
        for i in range(60)
    ]
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


# Others keep all experts and cut weights inside them.
CUT_EXPERTS = tuple(method.name for method in METHODS.values() if not method.keeps_all)
# Where a method's own default would make a tiny test slow.
QUICK = {"eep": {"population": "4", "generations": "2"}}


@pytest.mark.parametrize("method", CUT_EXPERTS)
def test_keeping_all_experts_keeps_every_bit(
    method: str, pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    base, tuned = pair()
    child = prune(tuned, method, 4, tmp_path / "child", pretrained=base, data=rows, options=QUICK.get(method))
    old, new = (dict(load_checkpoint(path).model.named_parameters()) for path in (tuned, child.path))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(tensor.view(torch.int32), new[name].view(torch.int32)), name


@pytest.mark.parametrize("method", CUT_EXPERTS)
def test_every_method_cuts_every_family_unevenly(
    method: str, pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    family = FAMILIES[CUT_EXPERTS.index(method) % len(FAMILIES)]
    base, tuned = pair(family)
    child = prune(tuned, method, (2, 3), tmp_path / "child", pretrained=base, data=rows, options=QUICK.get(method))
    assert child.manifest is not None
    assert child.manifest.method == method
    assert child.experts_kept[0] <= 2
    assert child.experts_kept[1] <= 3
    child.verify()
    assert torch.isfinite(child.model.classify([[3, 9, 27, 1], [5]]).logits_BC).all()


def stages(calls: list[str]) -> Progress:
    def progress(done: int, total: int, message: str) -> None:
        calls.append(message)

    return progress


def test_statistics_are_written_reused_and_completed(
    pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    base, tuned = pair()
    file = tmp_path / "stats.safetensors"
    calls: list[str] = []

    def cut(name: str, method: str, **options: Any) -> Any:
        calls.clear()
        return prune(tuned, method, 2, tmp_path / name, stats=file, progress=stages(calls), **options).manifest

    first = cut("a", "frequency", data=rows)
    assert "calibrating" in calls
    first_bytes = file.read_bytes()
    again = cut("b", "reap", data=rows)
    assert "calibrating" not in calls
    assert file.read_bytes() == first_bytes
    assert again.calibration == first.calibration
    assert again.layers == prune(tuned, "reap", 2, tmp_path / "c", data=rows).manifest.layers  # type: ignore[union-attr]
    cut("d", "mone", data=rows)
    assert "calibrating" in calls
    completed = file.read_bytes()
    assert len(completed) > len(first_bytes)
    offline = cut("e", "mone")
    assert calls == []
    assert offline.calibration == first.calibration
    with pytest.raises(PlanError, match=r"stats.safetensors lacks the statistics Dense: give --data FILE"):
        cut("f", "hc-smoe")
    assert file.read_bytes() == completed
    rows.write_text(rows.read_text().replace("w7", "w8"))
    with pytest.raises(PlanError, match="of other calibration rows"):
        cut("g", "frequency", data=rows)
    with pytest.raises(PlanError, match="of another parent checkpoint"):
        prune(base, "frequency", 2, tmp_path / "h", stats=file)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("semantics", ["slice", "zero"])
def test_a_budget_is_met_and_one_expert_more_would_not_be(
    semantics: str, allocation: str, pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    _, tuned = pair()
    parent = load_checkpoint(tuned).source()
    expert = (3 * 16 * 12 + (16 if semantics == "slice" else 0)) * 4
    budget, step = parent.bytes - 3 * expert + 1, 2 if allocation == "uniform" else 1
    child = prune(
        tuned, "frequency", Budget(budget), tmp_path / "child", data=rows, semantics=semantics,
        rules=Rules(allocation=allocation),
    ).manifest  # fmt: skip
    assert child is not None
    assert child.bytes <= budget < child.bytes + step * expert
    assert child.options["keep"] == {"bytes": budget}
    assert sum(layer.num_experts for layer in child.layers) == (4 if allocation == "uniform" else 5)


def test_exempt_layers_keep_their_bits_and_protected_experts_stay(
    pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    _, tuned = pair()
    rules = Rules(exempt=(1,), keep_super=False)
    plain = prune(tuned, "frequency", 2, tmp_path / "plain", data=rows, rules=rules)
    assert plain.experts_kept == (2, 4)
    old, new = (load_torch(path / "model.safetensors") for path in (tuned, plain.path))
    for name in old:
        if ".layers.1." in name:
            assert torch.equal(old[name], new[name]), name
    assert plain.manifest is not None
    worst = min(range(4), key=lambda e: plain.manifest.layers[0].scores[e])  # type: ignore[union-attr]
    assert worst not in plain.manifest.layers[0].kept
    kept = prune(
        tuned,
        "frequency",
        2,
        tmp_path / "kept",
        data=rows,
        rules=Rules(exempt=(1,), protect={0: (worst,)}, keep_super=False),
    ).manifest
    assert kept is not None
    assert worst in kept.layers[0].kept
    assert kept.options["protected"] == {"0": [worst]}
    assert kept.options["exempt"] == [1]


def test_the_expert_with_outsize_activations_stays_unless_told_otherwise(
    pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    _, tuned = pair()
    plain = prune(tuned, "frequency", 2, tmp_path / "plain", data=rows, rules=Rules(keep_super=False)).manifest
    assert plain is not None
    cut = next(e for e in range(4) if e not in plain.layers[0].kept)
    tensors = load_torch(tuned / "model.safetensors")
    name = next(n for n in tensors if n.endswith(f"layers.0.mlp.experts.{cut}.down_proj.weight"))
    tensors[name] = tensors[name] * 1000
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    guarded = prune(tuned, "frequency", 2, tmp_path / "guarded", data=rows).manifest
    ignored = prune(tuned, "frequency", 2, tmp_path / "ignored", data=rows, rules=Rules(keep_super=False)).manifest
    assert guarded is not None
    assert ignored is not None
    assert guarded.options["protected"] == {"0": [cut]}
    assert cut in guarded.layers[0].kept
    assert cut not in ignored.layers[0].kept
    assert ignored.options["keep_super"] is False


def test_classes_are_reported_and_guarded(pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path) -> None:
    _, tuned = pair()
    # labelled as the parent answers, so that every change of a label is a loss
    parent = load_checkpoint(tuned)
    truth = evaluate(parent, read_rows(rows)).predictions
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    relabelled = (line | {"label": f"LABEL_{label}"} for line, label in zip(lines, truth, strict=True))
    rows.write_text("".join(json.dumps(line) + "\n" for line in relabelled))
    child = prune(tuned, "frequency", 2, tmp_path / "child", data=rows, semantics="zero").manifest
    assert child is not None
    assert child.accuracy is not None
    dev = read_rows(rows, "dev")
    before, after = evaluate(load_checkpoint(tuned), dev), evaluate(load_checkpoint(tmp_path / "child"), dev)
    same = np.equal(before.predictions, after.predictions).mean()
    assert child.accuracy.agreement == pytest.approx(same)
    assert [c.label for c in child.accuracy.classes] == [r.label for r in before.recalls]
    assert [c.parent for c in child.accuracy.classes] == [r.recall for r in before.recalls]
    assert [c.child for c in child.accuracy.classes] == [r.recall for r in after.recalls]
    loss = max(c.parent - c.child for c in child.accuracy.classes)
    assert loss > 0.01, "choose rows on which the cut hurts"
    prune(tuned, "frequency", 2, tmp_path / "fine", data=rows, semantics="zero", max_class_loss=loss)
    with pytest.raises(PlanError, match="points of recall, more than the"):
        prune(tuned, "frequency", 2, tmp_path / "bad", data=rows, semantics="zero", max_class_loss=loss - 0.01)
    assert not (tmp_path / "bad").exists()


def test_the_manifest_forecasts_what_serving_then_sees(
    pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    _, tuned = pair()
    child = prune(tuned, "frequency", 2, tmp_path / "child", data=rows, semantics="zero")
    assert child.manifest is not None
    sequences = [child.encoder.encode(row.text).ids for row in read_rows(rows, "train")]
    routed = sum(len(ids) for ids in sequences) * 2
    # layer 0 sees the same tokens as in calibration; layer 1 runs for each last token only
    tally = SlotTally(replace(child.model.config, layers=(child.model.config.layers[0], LayerShape.unpruned(4))))
    with torch.inference_mode():
        child.model.hidden(child.model.pack(sequences), tally)
    assert child.manifest.layers[0].kept_slots == pytest.approx(1 - int(tally.dropped) / routed)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_expert_for_every_token_if_that_is_allowed(
    family: str, pair: Callable[..., tuple[Path, Path]], oracle_class: Callable[[str], Any], tmp_path: Path
) -> None:
    _, tuned = pair(family)
    rules = Rules(allow_lower_k=True)
    child = prune(tuned, "random", 1, tmp_path / "child", rules=rules)
    assert child.model.config.top_k == 1
    assert child.manifest is not None
    assert child.manifest.options["allow_lower_k"] is True
    oracle = oracle_class(family).from_pretrained(tmp_path / "child").eval()
    with torch.no_grad():
        theirs = oracle(input_ids=torch.tensor([[3, 9, 27, 1]])).logits
    torch.testing.assert_close(child.model.classify([[3, 9, 27, 1]]).logits_BC, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="tokens choose equally many in every layer"):
        prune(tuned, "random", (1, 2), tmp_path / "uneven", rules=rules)
    zero = prune(tuned, "random", (1, 2), tmp_path / "zero", semantics="zero", rules=rules)
    assert zero.model.config.top_k == 2


def test_options_reach_the_method_and_the_manifest(
    pair: Callable[..., tuple[Path, Path]], rows: Path, tmp_path: Path
) -> None:
    _, tuned = pair()
    child = prune(tuned, "task-mass", 2, tmp_path / "child", data=rows, options={"variant": "squared"}).manifest
    plain = prune(tuned, "task-mass", 2, tmp_path / "plain", data=rows).manifest
    assert child is not None
    assert plain is not None
    assert (child.options["variant"], plain.options["variant"]) == ("squared", "linear")
    assert child.layers[0].scores != plain.layers[0].scores
