"""Tiny random checkpoints as `transformers` writes them, and a tokenizer to go with them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from models.checkpoint import load_checkpoint, save_checkpoint
from models.training.config import PRETRAIN_DEFAULTS
from models.training.finetune import finetune
from models.training.pretrain import pretrain
from tests.models.colours import QUICK, write_rows

WORDS = 60
VOCAB_SIZE = 64
PAD = 0

# Two layers, width 16, four experts, top-2, grouped-query attention; small, but every branch of a family is used.
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 48,
    "intermediate_size": 24,
    "initializer_range": 0.4,
    "pad_token_id": PAD,
    "num_labels": 3,
}
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 6},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20},
    "olmoe": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4},
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words w0 .. w59 as ids 0 .. 59, one closing token [END] = 59 added to every text."""
    vocab = {f"w{i}": i for i in range(WORDS - 2)} | {"[UNK]": WORDS - 2, "[END]": WORDS - 1}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", WORDS - 1)])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def oracle_class() -> Callable[[str], Any]:
    """family -> the class of `transformers` that classifies sequences with it."""
    import transformers
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.olmoe import modeling_olmoe

    # OLMoE has no such class upstream; it is put together from the same parts as the others.
    olmoe = type(
        "OlmoeForSequenceClassification",
        (GenericForSequenceClassification, modeling_olmoe.OlmoePreTrainedModel),
        {"__module__": modeling_olmoe.__name__},
    )
    classes = {
        "qwen3_moe": transformers.Qwen3MoeForSequenceClassification,
        "qwen2_moe": transformers.Qwen2MoeForSequenceClassification,
        "mixtral": transformers.MixtralForSequenceClassification,
        "olmoe": olmoe,
    }
    return classes.__getitem__


@pytest.fixture(scope="session")
def make_oracle(oracle_class: Callable[[str], Any]) -> Callable[..., Any]:
    """(family, seed=0, **config) -> a random model of `transformers` in eval mode."""

    def make(family: str, seed: int = 0, **options: Any) -> Any:
        cls = oracle_class(family)
        torch.manual_seed(seed)
        config = cls.config_class(**{**COMMON, **FAMILY_OPTIONS[family], **options})
        model = cls(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):  # all ones or zeros after initialisation: hides mistakes
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model

    return make


@pytest.fixture(scope="session")
def write_oracle(tokenizer_file: Path) -> Callable[..., Path]:
    """(model, directory, **save options) -> the directory, with weights, config and tokenizer."""

    def write(model: Any, out: Path, **options: Any) -> Path:
        model.save_pretrained(out, **options)
        shutil.copyfile(tokenizer_file, out / "tokenizer.json")
        return out

    return write


@pytest.fixture(scope="session")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, make_oracle: Callable[..., Any], write_oracle: Callable[..., Path]
) -> Path:
    """A tiny qwen3_moe checkpoint that nobody may change."""
    return write_oracle(make_oracle("qwen3_moe"), tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def checkpoint_dir(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """(file, **changes): set keys of a JSON file; None removes one."""

    def edit(file: Path, **changes: Any) -> None:
        value = json.loads(file.read_text())
        value = {key: new for key, new in {**value, **changes}.items() if new is not None or key not in changes}
        file.write_text(json.dumps(value))

    return edit


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """(directory, function): change the tensors of model.safetensors, given as a dict, in place."""

    def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.fixture(scope="session")
def pristine_saved(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as we write it, with a manifest, that nobody may change."""
    source = load_checkpoint(pristine)
    out = tmp_path_factory.mktemp("ours") / "tiny"
    save_checkpoint(out, source.model, source.raw_config, pristine / "tokenizer.json")
    return out


@pytest.fixture
def saved_dir(pristine_saved: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(pristine_saved, tmp_path / "saved"))


@pytest.fixture
def reseal() -> Callable[[Path], None]:
    """(directory): write the files' present hashes into the manifest, so that later checks are reached."""

    def write(path: Path) -> None:
        manifest = json.loads((path / "secateur.json").read_text())
        manifest["files"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["files"]}
        (path / "secateur.json").write_text(json.dumps(manifest))

    return write


@pytest.fixture(scope="session")
def sequences() -> list[list[int]]:
    """Mixed lengths, one of a single token, none with the padding id."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (7, 1, 16, 40, 3, 16, 15, 31, 32)]


@pytest.fixture(scope="session")
def oracle_logits() -> Callable[[Any, Sequence[Sequence[int]]], torch.Tensor]:
    """(model, sequences) -> logits [B, C] of one right-padded batch."""

    def run(model: Any, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        longest = max(map(len, batch))
        ids = torch.tensor([[*s, *([PAD] * (longest - len(s)))] for s in batch])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in batch])
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
        return logits

    return run


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of three classes, see tests/models/colours.py."""
    return write_rows(tmp_path_factory.mktemp("rows") / "colours.jsonl")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, rows_file: Path) -> Path:
    """A tiny language model of those sentences: two layers of eight experts, top-2."""
    out = tmp_path_factory.mktemp("base") / "base"
    pretrain([rows_file], out, replace(PRETRAIN_DEFAULTS, epochs=1, min_steps=1, batch_tokens=256), size="tiny")
    return out


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory, base: Path, rows_file: Path) -> Path:
    """It, fine-tuned on the classes. Nobody may change it."""
    out = tmp_path_factory.mktemp("parent") / "parent"
    finetune(base, rows_file, out, replace(QUICK, epochs=20))
    return out
