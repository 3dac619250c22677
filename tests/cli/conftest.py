"""A fine-tuned toy and what it was fine-tuned from, and a way to run the command line in this process."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.checkpoint import save_checkpoint
from models.decoder import MoEClassifier
from models.hf_config import parse_config
from service.cli import main

NUM_WORDS = 20
LABELS = ("red", "green", "[bold]blue")
TOY_CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": NUM_WORDS,
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


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What `--json` printed; fails unless standard output is exactly one document."""
        return json.loads(self.out)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run_cli("inspect", directory, ...) -> Ran; arguments are turned into strings."""

    def run_cli(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = left.value.code
        assert code is None or isinstance(code, int)
        return Ran(code or 0, captured.out, captured.err)

    return run_cli


@dataclass(frozen=True)
class Toy:
    """Checkpoint directories: `finetuned` differs from `pretrained` in its routers only."""

    pretrained: Path
    finetuned: Path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Random weights; expert e's router row is scaled by 1 + e/4 in fine-tuning, so the last experts grew most."""
    folder = tmp_path_factory.mktemp("toy")
    vocabulary = {"[UNK]": 0, **{f"w{i}": i for i in range(1, NUM_WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = MoEClassifier(parse_config(TOY_CONFIG))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        save_checkpoint(folder / "pretrained", model, TOY_CONFIG, folder / "tokenizer.json")
        for name, parameter in model.named_parameters():
            if name.endswith("w_router_ED"):
                parameter.mul_(1 + torch.arange(4)[:, None] / 4)
    save_checkpoint(folder / "finetuned", model, TOY_CONFIG, folder / "tokenizer.json")
    return Toy(folder / "pretrained", folder / "finetuned")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows: eight for train, four for test."""
    rows = [
        {"text": f"w{i} w{i + 1}", "label": LABELS[i % 3], "split": "test" if i % 3 == 2 else "train"}
        for i in range(1, 13)
    ]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
