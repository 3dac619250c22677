"""Models before training: from scratch by family and size, or a pretrained body under a fresh head."""

import json
from pathlib import Path
from typing import Any

import torch

from models.architecture import build
from models.checkpoint import CONFIG_FILE, new_directory
from models.classifier import Classifier
from models.config import Pooling
from models.decoder import MoEClassifier
from models.errors import CheckpointError, ConfigError
from models.families import FAMILIES
from models.hf_config import family_of, parse_config, read_json
from models.tokenizer import TOKENIZER_FILE
from models.training.config import SIZES, VISION_SIZES
from models.weights import SINGLE_FILE, load_weights, save_weights, weight_files

# Token embeddings start small, and the norms' epsilon is large against them: a rare token's embedding, hardly trained,
# then stays small through the norm instead of being blown up to full size. On the demo's icd10 task this moved a bag
# of embeddings from .758 (std .02, epsilon 1e-6) to .82 on dev (8,192 tokens, 128 wide).
EMBEDDING_STD = 0.005
NORM_EPS = 0.2
WEIGHT_STD = 0.02
HEAD = ("score_CD", "b_score_C")
# Of a model of images, what starts near 0: the original's head starts at 0, its positions at .02.
SMALL = ("w_router_ED", "position_LD", "class_1D", "score_CD")


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


def new_image_config(size: str, image_size: tuple[int, int], channels: int, labels: tuple[str, ...]) -> dict[str, Any]:
    """A config.json for a V-MoE from scratch. Raises ConfigError for a size that we do not know."""
    if size not in VISION_SIZES:
        raise ConfigError(f"size is {size!r}, must be one of {', '.join(VISION_SIZES)}")
    sizes = VISION_SIZES[size]
    return {
        "model_type": "vmoe",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "expert_capacity": 0,
        "moe_intermediate_size": sizes.expert_width,
        "intermediate_size": sizes.dense_width,
        "moe_layers": list(sizes.moe_layers),
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_size": list(image_size),
        "patch_size": sizes.patch,
        "num_channels": channels,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
        "classifier_pooling": "first",
        **_labelled(labels),
    }


def initialize(model: Classifier, seed: int) -> None:
    """Fill every parameter from the seed: norms 1, biases 0, matrices normal.

    In models of images, matrices are scaled by the number of inputs, so that patches, which have no table to look
    themselves up in, reach the head at full size.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            short = name.rsplit(".", 1)[-1]
            if short.startswith("b_"):
                parameter.zero_()
            elif "norm" in short:
                parameter.fill_(1.0)
            elif model.config.vision is not None and short not in SMALL:
                fan_in = parameter[0].numel() if short in ("w_patch", "w_qkv", "w_o") else parameter.shape[-1]
                parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            else:
                std = EMBEDDING_STD if short == "embedding_VD" else WEIGHT_STD
                parameter.normal_(0.0, std * (2.0 if short in ("w_in_PGD", "w_qkv") else 1.0), generator=generator)


def fresh_head(
    base: Path, labels: tuple[str, ...], pooling: Pooling | None, max_tokens: int, seed: int
) -> tuple[Classifier, dict[str, Any]]:
    """A pretrained (or fine-tuned) checkpoint's body under a new classification head, in float32, and its config.json.

    max_tokens becomes the classifier's length: it will be served as it was trained. pooling: None for the mean over a
    text; what the head sees of an image is the base's choice. Raises ConfigError if the base reads fewer tokens, or
    images and pooling is given, CheckpointError if the directory is no checkpoint of a known family, or holds routers
    only.
    """
    raw = read_json(base / CONFIG_FILE)
    if family_of(raw).reads_images:
        if pooling is not None:
            raise ConfigError("pooling is the base's choice for images: leave it out")
        raw |= _labelled(labels)
    else:
        length_key = family_of(raw).keys["max_tokens"][0]
        if max_tokens > raw.get(length_key, 0):
            raise ConfigError(f"max_tokens is {max_tokens}, the model reads at most {raw.get(length_key, 0)}")
        raw |= {length_key: max_tokens, "classifier_pooling": pooling or "mean", **_labelled(labels)}
    model = build(parse_config(raw))
    initialize(model, seed)
    try:
        load_weights(model, weight_files(base), without=HEAD)
    except CheckpointError as error:
        raise CheckpointError(f"--base {base.name}: {error}") from None
    return model, raw


def _labelled(labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def save_base(out: Path, model: Classifier, lm_head_VD: torch.Tensor, raw: dict[str, Any], tokenizer: Path) -> None:
    """Write a pretrained language model as a Hugging Face directory: body, language-model head, tokenizer, config."""
    with new_directory(out) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(raw | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
        (temporary / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
        save_weights(
            model,
            temporary / SINGLE_FILE,
            torch.float32,
            without=HEAD,
            extra={"lm_head.weight": lm_head_VD},
        )


def base_model(raw: dict[str, Any]) -> MoEClassifier:
    """An uninitialised model for a config.json without classes; its one-class head is never used nor saved."""
    return MoEClassifier(parse_config(raw | {"id2label": {"0": "unused"}}))
