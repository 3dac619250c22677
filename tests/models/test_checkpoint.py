"""A directory as one value: loaded whole, written whole or not at all, verified by its golden answers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import checkpoint as module
from models.checkpoint import Checkpoint, load_checkpoint, new_directory, save_checkpoint
from models.errors import CheckpointError
from models.manifest import GOLDEN_TEXTS, Golden


def save(source: Checkpoint, out: Path, **options: Any) -> Checkpoint:
    return save_checkpoint(out, source.model, source.raw_config, source.path / "tokenizer.json", **options)


def test_a_plain_hugging_face_directory(pristine: Path) -> None:
    loaded = load_checkpoint(pristine)
    assert loaded.manifest is None
    assert loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert loaded.problem_type == "single_label_classification"
    assert loaded.experts_kept == loaded.experts_total == (4, 4)
    assert loaded.encoder.max_tokens == 48
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert load_checkpoint(str(pristine)).artifact_sha256 == loaded.artifact_sha256


def test_written_and_loaded_gives_the_same_logits(pristine: Path, tmp_path: Path, sequences: list[list[int]]) -> None:
    source = load_checkpoint(pristine)
    written = save(source, tmp_path / "out")
    assert written.path == tmp_path / "out"
    assert torch.equal(written.model.classify(sequences).logits_BC, source.model.classify(sequences).logits_BC)
    assert written.manifest is not None
    assert [golden.text for golden in written.manifest.golden] == list(GOLDEN_TEXTS)
    assert not list(tmp_path.glob(".out*")), "a temporary directory was left behind"


def test_saved_in_bfloat16(pristine: Path, tmp_path: Path, sequences: list[list[int]]) -> None:
    source = load_checkpoint(pristine)
    written = save(source, tmp_path / "out", dtype="bfloat16")
    assert written.stored_dtype == "bfloat16"
    assert written.manifest is not None
    assert written.manifest.bytes == 2 * written.manifest.parameters
    wide = load_checkpoint(tmp_path / "out", dtype="float32")
    rounded = [p.to(torch.bfloat16).float() for p in source.model.parameters()]
    assert all(torch.equal(p, r) for p, r in zip(wide.model.parameters(), rounded, strict=True))
    wide.verify()
    load_checkpoint(tmp_path / "out", dtype="bfloat16").verify()
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written.manifest.bytes < size < written.manifest.bytes + 20_000


def test_provenance_is_recorded(pristine: Path, tmp_path: Path) -> None:
    parent = load_checkpoint(pristine)
    child = save(parent, tmp_path / "out", method="random", options={"seed": 3}, parent=parent.source())
    assert child.manifest is not None
    assert (child.manifest.method, child.manifest.options) == ("random", {"seed": 3})
    assert child.manifest.parent_sha256 == parent.artifact_sha256
    assert child.manifest.parent_bytes == sum(p.numel() * 4 for p in parent.model.parameters())


def test_an_existing_directory_is_never_touched(pristine: Path, saved_dir: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved_dir.iterdir()}
    with pytest.raises(CheckpointError, match="exists already: choose another --out or remove it"):
        save(load_checkpoint(pristine), saved_dir)
    assert {file.name: file.read_bytes() for file in saved_dir.iterdir()} == before


@pytest.mark.parametrize("step", ["save_weights", "golden_answers", "write_manifest"])
def test_a_crash_half_way_leaves_nothing(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = load_checkpoint(pristine)

    def crash(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, crash)
    (tmp_path / "work").mkdir()
    with pytest.raises(KeyboardInterrupt):
        save(source, tmp_path / "work" / "out")
    assert not list((tmp_path / "work").iterdir())


def test_a_new_directory_appears_at_the_end(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "out") as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"


def test_golden_answers_hold_and_catch_tampering(saved_dir: Path) -> None:
    loaded = load_checkpoint(saved_dir)
    loaded.verify()
    assert loaded.manifest is not None
    golden = loaded.manifest.golden

    def with_golden(*changed: Golden) -> Checkpoint:
        assert loaded.manifest is not None
        return replace(loaded, manifest=loaded.manifest.model_copy(update={"golden": changed}))

    def shifted(by: float) -> Golden:
        return golden[1].model_copy(update={"logits": (golden[1].logits[0] + by, *golden[1].logits[1:])})

    with pytest.raises(CheckpointError, match="golden input 1 is off by"):
        with_golden(golden[0], shifted(0.01)).verify()
    with pytest.raises(CheckpointError, match="golden input 1 is off by nan"):
        with_golden(golden[0], shifted(float("nan"))).verify()
    with pytest.raises(CheckpointError, match="golden input 0 has 2 logits, the model gives 3"):
        with_golden(golden[0].model_copy(update={"logits": (0.0, 1.0)})).verify()
    with pytest.raises(CheckpointError, match="golden is empty, so nothing can be verified"):
        with_golden().verify()


def test_a_model_that_answers_nan_fails(saved_dir: Path) -> None:
    loaded = load_checkpoint(saved_dir)
    with torch.no_grad():
        loaded.model.get_parameter("score_CD").fill_(torch.nan)
    with pytest.raises(CheckpointError, match="golden input 0 is off by nan"):
        loaded.verify()


def test_what_is_missing_is_named(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing in tiny"):
        load_checkpoint(checkpoint_dir)
    (checkpoint_dir / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing in tiny: not a checkpoint directory"):
        load_checkpoint(checkpoint_dir)
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        load_checkpoint(checkpoint_dir / "nowhere")


def test_labels_of_the_head_and_of_the_config_must_agree(checkpoint_dir: Path, edit_json: Callable[..., None]) -> None:
    edit_json(checkpoint_dir / "config.json", id2label={"0": "ham", "1": "spam"})
    with pytest.raises(CheckpointError, match=r"tensor score.weight has shape \[3, 16\], must be \[2, 16\]"):
        load_checkpoint(checkpoint_dir)


def test_hashes_follow_the_content(checkpoint_dir: Path, edit_json: Callable[..., None]) -> None:
    before = load_checkpoint(checkpoint_dir)
    edit_json(checkpoint_dir / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    after = load_checkpoint(checkpoint_dir)
    assert after.labels == ("a", "b", "c")
    assert after.artifact_sha256 != before.artifact_sha256
    assert after.tokenizer_sha256 == before.tokenizer_sha256


def test_a_manifest_in_readable_json(saved_dir: Path) -> None:
    text = (saved_dir / "secateur.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["layers"][0] == {
        "total": 4, "num_experts": 4, "kept": [0, 1, 2, 3], "route": [0, 1, 2, 3], "scores": [],
        "kept_slots": None, "lost_tokens": None, "compression": None,
    }  # fmt: skip
