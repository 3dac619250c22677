"""How much arithmetic a token costs."""

import math

from models import memory
from models.classifier import Classifier
from models.sparse import packed_parameters

# Experts' vectors: added, not multiplied with.
VECTORS = ("b_in_PG", "b_out_PD", "const_CD")


def flops_per_token(model: Classifier, kept_share: float, length: float) -> int:
    """Floating-point operations for one token on its way to the head: two for each weight it is multiplied with.

    kept_share: of the (token, choice) pairs, those that still run an expert; the others cost nothing, or adding up a
    constant. length: of the input, whose tokens attend to half of it on average, or all of it in an image. Norms,
    activations, the embedding and the head, which reads one vector per input, are left out; that a last layer may run
    one token of each input alone is not counted.
    """
    config = model.config
    total = 0.0
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    for name, size in (*shapes, *packed_parameters(model)):
        short = name.rsplit(".", 1)[-1]
        part = memory.PART_OF.get(short, "other")
        if part == "experts" and short not in VECTORS:
            total += 2 * math.prod(size[1:]) * config.top_k * kept_share
        elif short == "const_CD":
            total += 2 * config.width * config.top_k * (1 - kept_share)
        elif part not in ("embedding", "head", "experts") and len(size) == 2:
            total += 2 * math.prod(size)
    seen = length if config.vision is not None else (length + 1) / 2
    return round(total + config.num_layers * 4 * config.num_heads * config.head_dim * seen)
