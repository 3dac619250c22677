"""Which class runs a configuration, and which parameters it has."""

import torch

from models import decoder, vision
from models.classifier import Classifier
from models.config import ModelConfig
from models.decoder import MoEClassifier
from models.vision import VisionMoEClassifier


def build(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Classifier:
    """An uninitialised model."""
    return (MoEClassifier if config.vision is None else VisionMoEClassifier)(config, dtype, device, backend)


def outer_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters outside the layers."""
    return decoder.outer_parameters(config) if config.vision is None else vision.outer_parameters(config)


def layer_parameters(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's parameters; which exist follows from the family and the layer's shape."""
    if config.vision is None:
        return decoder.layer_parameters(config, index)
    return vision.layer_parameters(config, index)
