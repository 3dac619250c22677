"""Text to token ids, through the checkpoint's own tokenizer.json."""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from tokenizers import Tokenizer

from models.errors import CheckpointError, DataError

TOKENIZER_FILE = "tokenizer.json"
Item = TypeVar("Item", bound=Sized, covariant=True)


@dataclass(frozen=True)
class Encoded(Generic[Item]):
    """ids: the item as the model reads it, after truncation; for text its token ids, special tokens included.

    length: tokens before truncation.
    """

    ids: Item
    length: int

    @property
    def truncated(self) -> bool:
        return self.length > len(self.ids)


class TextEncoder:
    """A thread-safe tokenizer that cuts at the model's length.

    Saved padding and truncation settings are reset: the model's length decides, and a packed batch has no padding.
    Raises CheckpointError if the file is unreadable or knows more ids than the model has embeddings.
    """

    reads: Literal["text"] = "text"

    def __init__(self, file: Path, max_tokens: int, vocab_size: int) -> None:
        if not file.is_file():
            raise CheckpointError(f"{TOKENIZER_FILE} is missing in {file.parent.name}")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{TOKENIZER_FILE} cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_tokens = max_tokens
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise CheckpointError(
                f"{TOKENIZER_FILE} has ids up to {highest}, but the model has only {vocab_size} embeddings"
            )

    def encode(self, text: object, max_tokens: int | None = None) -> Encoded[tuple[int, ...]]:
        """Token ids of a text, at most `max_tokens` if that is less than the model's length.

        Special tokens are kept when the end is cut. Raises ValueError on lone surrogates, DataError for no text.
        """
        if not isinstance(text, str):
            raise DataError("this model reads text, not images")
        limit = self.max_tokens if max_tokens is None else min(self.max_tokens, max_tokens)
        ids = self._tokenizer.encode(text).ids
        if len(ids) <= limit:
            return Encoded(tuple(ids), len(ids))
        specials = self._tokenizer.num_special_tokens_to_add(False)
        if specials:
            body = self._tokenizer.encode(text, add_special_tokens=False)
            body.truncate(max(limit - specials, 0))
            return Encoded(tuple(self._tokenizer.post_process(body).ids), len(ids))
        return Encoded(tuple(ids[:limit]), len(ids))
