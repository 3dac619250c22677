"""Noise on token ids and images, drawn from a numpy generator so that a seed fixes every training input."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from models.images import Pixels
from models.training.config import TrainConfig

Ids = tuple[int, ...]
# An item of a row and the epoch's generator -> the item as it is trained on.
Noised = Callable[[Any, np.random.Generator], Any]


class TokenSplitter:
    """Breaks tokens in two: a seeded subword regularisation in the spirit of BPE dropout (arXiv 1910.13267).

    Every token of two or more symbols knows its splits: the encodings of its left and right part, laid side by side.
    """

    def __init__(self, tokenizer_file: Path) -> None:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.splits: dict[int, list[Ids]] = {}
        for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
            if len(token) < 2 or token in special:
                continue
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            both = [(tokenizer.model.tokenize(left), tokenizer.model.tokenize(right)) for left, right in halves]
            known = [tuple(t.id for t in (*left, *right)) for left, right in both if left and right]
            if known:
                self.splits[token_id] = known

    def __call__(self, ids: Sequence[int], probability: float, generator: np.random.Generator) -> Ids:
        """Each token is replaced with `probability` by one of its splits, chosen evenly."""
        draw_N = generator.random((len(ids), 2))
        out: list[int] = []
        for token_id, (chance, which) in zip(ids, draw_N.tolist(), strict=True):
            splits = self.splits.get(token_id) if chance < probability else None
            out.extend(splits[int(which * len(splits))] if splits else (token_id,))
        return tuple(out)


def drop_tokens(ids: Ids, probability: float, generator: np.random.Generator) -> Ids:
    """Leave out each token with `probability`; texts of up to three tokens stay whole, and one token always stays."""
    if len(ids) <= 3:
        return ids
    kept = tuple(token for token, draw in zip(ids, generator.random(len(ids)), strict=True) if draw >= probability)
    return kept or ids[:1]


def crop(ids: Ids, generator: np.random.Generator, least: float = 0.3) -> Ids:
    """A random contiguous part of at least `least` of the tokens."""
    length = max(1, int(len(ids) * generator.uniform(least, 1.0)))
    start = int(generator.integers(0, len(ids) - length + 1))
    return ids[start : start + length]


def window(ids: Ids, length: int, generator: np.random.Generator) -> Ids:
    """At most `length` tokens: of a longer text the beginning, or half of the time a random window."""
    if len(ids) <= length:
        return ids
    start = int(generator.integers(0, len(ids) - length + 1)) if generator.random() < 0.5 else 0
    return ids[start : start + length]


class TextNoise:
    """A part of the text, some tokens split (a random share per text), some dropped, cut to the length."""

    def __init__(self, splitter: TokenSplitter, config: TrainConfig) -> None:
        self.splitter = splitter
        self.config = config

    def __call__(self, ids: Ids, generator: np.random.Generator) -> Ids:
        c = self.config
        if generator.random() < c.crop:
            ids = crop(ids, generator)
        ids = self.splitter(ids, c.token_split * 2 * generator.random(), generator)
        return window(drop_tokens(ids, c.token_dropout, generator), c.max_tokens, generator)


class ImageNoise:
    """The image moved by up to `shift` pixels in each direction; what comes in is black."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __call__(self, image: Pixels, generator: np.random.Generator) -> Pixels:
        down, right = generator.integers(0, 2 * self.shift + 1, 2).tolist()
        height, width, _ = image.value_HWc.shape
        border = (self.shift, self.shift)
        padded_HWc = np.pad(image.value_HWc, (border, border, (0, 0)))
        return replace(image, value_HWc=padded_HWc[down : down + height, right : right + width])
