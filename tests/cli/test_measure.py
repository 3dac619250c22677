"""`secateur measure`: bytes of a checkpoint as a fresh process sees them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import load_checkpoint, save_checkpoint
from models.decoder import MoEClassifier
from models.hf_config import parse_config
from models.memory import resident_bytes
from models.tokenizer import TOKENIZER_FILE
from service.measurement import SMAPS
from tests.cli.conftest import TOY_CONFIG

pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="needs Linux")


def test_a_fresh_process_agrees_with_the_tensors(toy: Any, run_cli: Callable[..., Any]) -> None:
    loaded = load_checkpoint(toy.finetuned)
    taken, again = run_cli("measure", toy.finetuned, toy.finetuned, "--json").document
    assert taken["weights"] == taken["held"] == sum(loaded.weight_bytes().values())
    assert taken["resident"] == resident_bytes([loaded.model])
    assert taken["device"] is None
    assert {key: again[key] for key in ("weights", "held", "resident")} == {
        key: taken[key] for key in ("weights", "held", "resident")
    }


def test_the_process_grows_by_what_the_weights_hold(toy: Any, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """An embedding of 64 MB instead of next to nothing; the pages that the process gains are about as many."""
    config = TOY_CONFIG | {"vocab_size": 1_000_000}
    model = MoEClassifier(parse_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    save_checkpoint(tmp_path / "larger", model, config, toy.finetuned / TOKENIZER_FILE)
    small, taken = run_cli("measure", toy.finetuned, tmp_path / "larger", "--json").document
    grown = taken["held"] - small["held"]
    assert grown > 60e6
    assert taken["process"] - small["process"] == pytest.approx(grown, rel=0.1)


def test_a_person_sees_a_table_and_a_broken_checkpoint_is_named(
    toy: Any, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    ran = run_cli("measure", toy.finetuned, toy.pretrained)
    assert ran.code == 0
    assert "process grows" in ran.out
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file({"a": torch.zeros(1)}, broken / "model.safetensors")
    ran = run_cli("measure", broken)
    assert ran.code == 1
    assert "broken could not be measured" in ran.err
    assert "Traceback" not in ran.err
