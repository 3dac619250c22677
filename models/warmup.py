"""The first forward passes of a model on a GPU, made before anybody waits for one.

Triton compiles a kernel when it is first used, and which kernels a layer uses depends on the number of tokens. Tiles
change where tokens per expert pass an edge; every range between two edges is at least a factor of two wide
(kernels.tiles), so batches of 1, 2, 4, 8, ... tokens meet each of them in each layer.
"""

import logging
import time
from collections.abc import Iterator

import torch

from models.decoder import MoEClassifier

log = logging.getLogger("secateur.warmup")


def warm_up(model: MoEClassifier, max_tokens: int, max_items: int) -> None:
    """Classify one batch of each size up to the largest that will be served; on a CPU, nothing is left to compile.

    A size that does not fit into the device's memory ends the warm-up with a warning: serving splits such batches.
    """
    if not compiles_at_first_use(model.device):
        return
    for tokens in token_buckets(max_tokens):
        started = time.monotonic()
        try:
            model.classify(batch_of(tokens, max_items, model.config.max_tokens))
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


def batch_of(tokens: int, max_items: int, max_length: int) -> list[list[int]]:
    """`tokens` tokens in up to `max_items` sequences, more if each would exceed `max_length`, of nearly equal length.

    Many sequences, because the last layer may run for one token of each: it then meets its sizes too.
    """
    items = max(min(tokens, max_items), -(-tokens // max_length))
    return [[0] * (tokens // items + (item < tokens % items)) for item in range(items)]
