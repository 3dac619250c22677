"""A tiny random V-MoE, and images for it: a namespace import, as tests.service.toys."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.architecture import build
from models.checkpoint import Checkpoint, save_checkpoint
from models.hf_config import parse_config
from models.vision import VisionMoEClassifier

# Three blocks, experts in the first and the last; images of 8 x 8 in four patches; every sort of parameter exists.
CONFIG: dict[str, Any] = {
    "model_type": "vmoe",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "intermediate_size": 20,
    "moe_layers": [0, 2],
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "image_mean": [0.4],
    "image_std": [0.3],
    "classifier_pooling": "first",
    "expert_capacity": 0,
    "id2label": {"0": "cat", "1": "dog", "2": "owl"},
    "problem_type": "single_label_classification",
}
# A class token and routing by token, by expert; the mean over patches and routing by token, by expert.
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "mean": {"classifier_pooling": "mean"},
    "expert-choice": {"expert_capacity": 2},
    "expert-choice-mean": {"classifier_pooling": "mean", "expert_capacity": 3},
}


def tiny_vision(seed: int = 0, **changes: Any) -> VisionMoEClassifier:
    """A model of which no parameter is 0 or 1, so that none can be left out unseen."""
    model = build(parse_config(CONFIG | changes))
    assert isinstance(model, VisionMoEClassifier)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            short = name.rsplit(".", 1)[-1]
            center = 1.0 if short in ("norm_D", "attention_norm_D", "ffn_norm_D") else 0.0
            parameter.copy_(center + 0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


def save_vision(out: Path, model: VisionMoEClassifier, **changes: Any) -> Checkpoint:
    return save_checkpoint(out, model, CONFIG | changes, None)


def images(count: int, seed: int = 0, channels: int = 1, side: int = 8) -> npt.NDArray[np.uint8]:
    """uint8 [count, side, side, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)
