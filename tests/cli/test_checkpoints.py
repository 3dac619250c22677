"""`secateur classify` and `secateur inspect`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoint import load_checkpoint, save_checkpoint
from models.manifest import MANIFEST_FILE
from models.pruning.apply import apply
from models.pruning.plan import LayerPlan
from models.pruning.post import Mask


def test_classify_answers_what_the_model_answers(toy: Any, run_cli: Callable[..., Any]) -> None:
    loaded = load_checkpoint(toy.finetuned)
    texts = ["w1 w2 w3", "w4"]
    logits_BC = loaded.model.classify([loaded.encoder.encode(text).ids for text in texts]).logits_BC
    answer = run_cli("classify", toy.finetuned, *texts, "--json").document
    assert answer["checkpoint"] == "finetuned"
    for item, probs_C in zip(answer["data"], logits_BC.softmax(1), strict=True):
        assert item["label"] == loaded.labels[int(probs_C.argmax())]
        assert item["score"] == pytest.approx(float(probs_C.max()), abs=1e-6)
        assert sum(entry["score"] for entry in item["scores"]) == pytest.approx(1)
    assert [item["tokens"] for item in answer["data"]] == [3, 1]


def test_classify_says_when_a_text_was_cut(toy: Any, run_cli: Callable[..., Any]) -> None:
    long = "w1 " * 9  # the toy reads eight tokens
    assert run_cli("classify", toy.finetuned, long, "w1", "--json").document["data"][0]["truncated"] is True
    assert "cut to 8 tokens" in run_cli("classify", toy.finetuned, long).out


def test_classify_prints_labels_as_they_are(toy: Any, run_cli: Callable[..., Any]) -> None:
    assert "[bold]blue" in run_cli("classify", toy.finetuned, "w1").out


@pytest.mark.parametrize(
    ("text", "problem"), [("", "INPUT 2 is empty"), (" \t", "INPUT 2 is empty"), ("\udcff", "UTF-8")]
)
def test_classify_refuses_texts_that_say_nothing(
    text: str, problem: str, toy: Any, run_cli: Callable[..., Any]
) -> None:
    ran = run_cli("classify", toy.finetuned, "w1", text, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert problem in ran.err


def test_inspect_counts_what_the_files_hold(toy: Any, run_cli: Callable[..., Any]) -> None:
    facts = run_cli("inspect", toy.finetuned, "--verify", "--json").document
    assert facts["verified"] is True
    assert facts["experts_kept"] == facts["experts_total"] == [4, 4]
    # float32 and nothing tied: every parameter is four bytes, in one part.
    assert facts["resident_bytes"] == sum(facts["resident_bytes_by_part"].values()) == 4 * facts["parameters"]
    # 2 layers x 4 experts x 3 matrices of 16 x 8
    assert facts["resident_bytes_by_part"]["experts"] == 4 * 2 * 4 * 3 * 16 * 8
    assert facts["manifest"]["method"] == "none"
    assert facts["labels"] == ["red", "green", "[bold]blue"]


def test_inspect_shows_a_person_the_same(toy: Any, run_cli: Callable[..., Any]) -> None:
    ran = run_cli("inspect", toy.finetuned)
    assert ran.code == 0
    for word in ("qwen3_moe", "red, green, [bold]blue", "12.3 kB", "experts"):
        assert word in ran.out


def test_a_checkpoint_that_fails_its_golden_answers_is_a_failure(
    toy: Any, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    spoilt = Path(shutil.copytree(toy.finetuned, tmp_path / "spoilt"))
    manifest = json.loads((spoilt / MANIFEST_FILE).read_text())
    manifest["golden"][0]["logits"][0] += 1
    (spoilt / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert run_cli("inspect", spoilt).code == 0
    ran = run_cli("inspect", spoilt, "--verify", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: golden input 0 is off by")
    assert ran.err.count("\n") == 1


def test_a_plain_checkpoint_has_nothing_to_verify_and_says_so(
    toy: Any, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    plain = Path(shutil.copytree(toy.finetuned, tmp_path / "plain"))
    (plain / MANIFEST_FILE).unlink()
    ran = run_cli("inspect", plain, "--verify")
    assert ran.code == 0
    assert "nothing to verify" in ran.err
    facts = run_cli("inspect", plain, "--verify", "--json").document
    assert (facts["verified"], facts["manifest"]) == (False, None)


def test_inspect_says_how_experts_are_compressed(toy: Any, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    source = load_checkpoint(toy.finetuned)
    step = Mask("2:4", ("gate", "down"))
    plan = LayerPlan(np.eye(4), np.arange(4), "zero", post=(step,))
    child = apply(source.model, {1: plan})
    save_checkpoint(tmp_path / "child", child, source.raw_config, toy.finetuned / "tokenizer.json", semantics="zero")
    out = run_cli("inspect", tmp_path / "child", "--verify").out
    assert "gate 2 of 4 columns, down 2 of 4 columns" in out
    facts = run_cli("inspect", tmp_path / "child", "--json").document
    # Of 4 experts' 3 matrices of 8 x 16 floats, two lose half their values; their masks take a bit for each.
    dense = 4 * 2 * 4 * 3 * 128
    assert facts["resident_bytes_by_part"]["experts"] == dense - 4 * 4 * 2 * 64 + 4 * 2 * 128 // 8
    assert facts["resident_bytes"] == facts["manifest"]["bytes"]
    assert facts["manifest"]["layers"][1]["compression"]["up"] is None
