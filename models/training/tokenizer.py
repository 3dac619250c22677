"""A byte-level BPE of one's own: no unknown token in any language."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, BEGIN = "<pad>", "<bos>"
BEGIN_ID = 1
# A corpus of long texts must not own the vocabulary: texts give their first MAX_CHARS, small corpora are repeated up
# to MAX_REPEATS times towards the size of the largest.
MAX_CHARS = 500
MAX_REPEATS = 4


def train_tokenizer(corpora: Sequence[Sequence[str]], vocab_size: int, file: Path) -> None:
    """Train on all corpora, evened out, and write tokenizer.json. Lower-cases; the same texts give the same file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_evened(corpora), trainer)
    tokenizer.save(str(file))


def _evened(corpora: Sequence[Sequence[str]]) -> Iterator[str]:
    sizes = [sum(min(len(text), MAX_CHARS) for text in corpus) for corpus in corpora]
    for corpus, size in zip(corpora, sizes, strict=True):
        for _ in range(min(MAX_REPEATS, max(1, max(sizes) // max(size, 1)))):
            yield from (text[:MAX_CHARS] for text in corpus)
