"""The first forward passes of a model on a GPU, made before anybody waits for one.

Triton compiles a kernel when it is first used, and which kernels a layer uses depends on the number of tokens. Tiles
change where tokens per expert pass an edge; every range between two edges is at least a factor of two wide
(kernels.tiles), so batches of 1, 2, 4, 8, ... tokens meet each of them in each layer.
"""

import logging
import time
from collections.abc import Iterator

import torch

from models.classifier import Classifier

log = logging.getLogger("secateur.warmup")


def warm_up(model: Classifier, max_tokens: int, max_items: int) -> None:
    """Classify one batch of each size up to the largest that will be served; on a CPU, nothing is left to compile.

    A size that does not fit into the device's memory ends the warm-up with a warning: serving splits such batches.
    """
    if not compiles_at_first_use(model.device):
        return
    for tokens in token_buckets(max_tokens):
        started = time.monotonic()
        try:
            model.classify(model.blanks(tokens, max_items))
        except torch.OutOfMemoryError:
            log.warning("no memory for a batch of %d tokens: larger batches will be split", tokens)
            return
        log.info("warmed up", extra={"fields": {"tokens": tokens, "seconds": round(time.monotonic() - started, 3)}})


def compiles_at_first_use(device: torch.device) -> bool:
    return device.type == "cuda"


def token_buckets(max_tokens: int) -> Iterator[int]:
    """1, 2, 4, 8, ... and `max_tokens` itself."""
    tokens = 1
    while tokens < max_tokens:
        yield tokens
        tokens *= 2
    yield max_tokens
