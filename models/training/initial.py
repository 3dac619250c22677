"""Models before training: from scratch by family and size, or a pretrained body under a fresh head."""

import json
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import CONFIG_FILE, new_directory
from models.config import Pooling
from models.decoder import MoEClassifier
from models.errors import CheckpointError, ConfigError
from models.families import FAMILIES
from models.hf_config import family_of, parse_config, read_json
from models.tokenizer import TOKENIZER_FILE
from models.training.config import SIZES
from models.weights import SINGLE_FILE, load_weights, save_weights, weight_files

# Token embeddings start small, and the norms' epsilon is large against them: a rare token's embedding, hardly trained,
# then stays small through the norm instead of being blown up to full size. On the demo's icd10 task this moved a bag
# of embeddings from .758 (std .02, epsilon 1e-6) to .82 on dev (8,192 tokens, 128 wide).
EMBEDDING_STD = 0.005
NORM_EPS = 0.2
WEIGHT_STD = 0.02


def new_config(family: str, size: str, vocab_size: int, max_tokens: int) -> dict[str, Any]:
    """A config.json for a model from scratch. Raises ConfigError for a family or size that we do not know."""
    if family not in FAMILIES:
        raise ConfigError(f"family is {family!r}, must be one of {', '.join(FAMILIES)}")
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}, must be one of {', '.join(SIZES)}")
    sizes = SIZES[size]
    values = {
        "vocab_size": vocab_size,
        "width": sizes.width,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.width // sizes.num_heads,
        "num_experts": sizes.num_experts,
        "top_k": sizes.top_k,
        "expert_width": sizes.expert_width,
        "shared_width": sizes.expert_width,
        "norm_eps": NORM_EPS,
        "max_tokens": max_tokens,
        "normalize_top_k": True,
        "dense_width": sizes.expert_width,
    }
    table = FAMILIES[family]
    raw = {table.keys[field][0]: value for field, value in values.items() if field in table.keys}
    return {
        "model_type": family,
        "architectures": [table.architecture.replace("ForSequenceClassification", "ForCausalLM")],
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        **raw,
    }


def initialize(model: MoEClassifier, seed: int) -> None:
    """Fill every parameter from the seed: norms 1, biases 0, matrices normal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            short = name.rsplit(".", 1)[-1]
            if short.startswith("b_"):
                parameter.zero_()
            elif "norm" in short:
                parameter.fill_(1.0)
            else:
                std = EMBEDDING_STD if short == "embedding_VD" else WEIGHT_STD
                parameter.normal_(0.0, std * (2.0 if short in ("w_in_PGD", "w_qkv") else 1.0), generator=generator)


def fresh_head(
    base: Path, labels: tuple[str, ...], pooling: Pooling, max_tokens: int, seed: int
) -> tuple[MoEClassifier, dict[str, Any]]:
    """A pretrained (or fine-tuned) checkpoint's body under a new classification head, in float32, and its config.json.

    max_tokens becomes the classifier's length: it will be served as it was trained. Raises ConfigError if the base
    reads fewer, CheckpointError if the directory is no checkpoint of a known family, or holds routers only.
    """
    raw = read_json(base / CONFIG_FILE)
    length_key = family_of(raw).keys["max_tokens"][0]
    if max_tokens > raw.get(length_key, 0):
        raise ConfigError(f"max_tokens is {max_tokens}, the model reads at most {raw.get(length_key, 0)}")
    raw |= {
        length_key: max_tokens,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "classifier_pooling": pooling,
    }
    config = parse_config(raw)
    model = MoEClassifier(config)
    initialize(model, seed)
    try:
        load_weights(model, weight_files(base), without=("score_CD",))
    except CheckpointError as error:
        raise CheckpointError(f"--base {base.name}: {error}") from None
    return model, raw


def save_base(out: Path, model: MoEClassifier, lm_head_VD: torch.Tensor, raw: dict[str, Any], tokenizer: Path) -> None:
    """Write a pretrained language model as a Hugging Face directory: body, language-model head, tokenizer, config."""
    with new_directory(out) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(raw | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
        (temporary / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
        save_weights(
            model,
            temporary / SINGLE_FILE,
            torch.float32,
            without=("score_CD",),
            extra={"lm_head.weight": lm_head_VD},
        )


def base_model(raw: dict[str, Any]) -> MoEClassifier:
    """An uninitialised model for a config.json without classes; its one-class head is never used nor saved."""
    return MoEClassifier(parse_config(raw | {"id2label": {"0": "unused"}}))
