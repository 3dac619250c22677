"""Text to ids: where the end is cut, what saved settings do (nothing), what is refused."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models.errors import CheckpointError
from models.tokenizer import TextEncoder

END = 59


@pytest.fixture
def encoder(tokenizer_file: Path) -> TextEncoder:
    return TextEncoder(tokenizer_file, max_tokens=5, vocab_size=64)


def test_a_short_text_is_kept_whole(encoder: TextEncoder) -> None:
    encoded = encoder.encode("w1 w2 w3")
    assert encoded.ids == (1, 2, 3, END)
    assert (encoded.length, encoded.truncated) == (4, False)


def test_a_long_text_loses_words_but_not_its_closing_token(encoder: TextEncoder) -> None:
    encoded = encoder.encode("w1 w2 w3 w4 w5 w6 w7")
    assert encoded.ids == (1, 2, 3, 4, END)
    assert (encoded.length, encoded.truncated) == (8, True)


def test_the_longest_text_that_fits(encoder: TextEncoder) -> None:
    assert not encoder.encode("w1 w2 w3 w4").truncated
    assert encoder.encode("w1 w2 w3 w4 w5").truncated


def test_an_unknown_word_and_an_empty_text(encoder: TextEncoder) -> None:
    assert encoder.encode("elephant").ids == (58, END)
    assert encoder.encode("").ids == (END,)


def test_a_tokenizer_without_special_tokens(tokenizer_file: Path, tmp_path: Path) -> None:
    value = json.loads(tokenizer_file.read_text())
    value["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    encoder = TextEncoder(tmp_path / "tokenizer.json", max_tokens=3, vocab_size=64)
    assert encoder.encode("w1 w2 w3 w4").ids == (1, 2, 3)


def test_saved_truncation_and_padding_are_ignored(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = TextEncoder(tmp_path / "tokenizer.json", max_tokens=5, vocab_size=64)
    assert encoder.encode("w1 w2 w3").ids == (1, 2, 3, END)


def test_more_ids_than_embeddings(tokenizer_file: Path) -> None:
    TextEncoder(tokenizer_file, max_tokens=5, vocab_size=60)
    with pytest.raises(CheckpointError, match=r"ids up to 59, but the model has only 59 embeddings"):
        TextEncoder(tokenizer_file, max_tokens=5, vocab_size=59)


@pytest.mark.parametrize("content", ["", "{}", "[]", "\0"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        TextEncoder(tmp_path / "tokenizer.json", max_tokens=5, vocab_size=64)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        TextEncoder(tmp_path / "tokenizer.json", max_tokens=5, vocab_size=64)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\u200b", "\U0001f9ea w1", "\r\n\t", "w1" * 10_000])
def test_odd_texts_are_encoded(encoder: TextEncoder, text: str) -> None:
    assert 1 <= len(encoder.encode(text).ids) <= 5


def test_threads_share_one_encoder(tokenizer_file: Path) -> None:
    """A long text switches the tokenizer to truncation for a moment in a careless implementation."""
    shared = tokenizer_file.parent / "copy.json"
    shutil.copyfile(tokenizer_file, shared)
    encoder = TextEncoder(shared, max_tokens=5, vocab_size=64)
    texts = {"w1 w2": (1, 2, END), "w3 w4 w5 w6 w7 w8": (3, 4, 5, 6, END)}
    wrong: list[object] = []

    def work(text: str) -> None:
        wrong.extend(text for _ in range(300) if encoder.encode(text).ids != texts[text])

    threads = [threading.Thread(target=work, args=(text,)) for text in (*texts, *texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_caller_may_ask_for_fewer_tokens_but_not_for_more(tokenizer_file: Path) -> None:
    encoder = TextEncoder(tokenizer_file, max_tokens=5, vocab_size=64)
    text = "w1 w2 w3 w4 w5 w6 w7"
    assert encoder.encode(text, 3).ids == (1, 2, 59)  # the closing token stays
    assert encoder.encode(text, 3).length == 8
    assert encoder.encode(text, 500) == encoder.encode(text)
