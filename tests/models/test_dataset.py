"""Rows from files: what is read, what is refused and how it is said."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.dataset import Row, describe, label_ids, read_rows, split_rows, stratified
from models.errors import DataError

DEMO_DATA = Path(__file__).resolve().parents[2] / "demo" / "data"


def test_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    rows = (Row("one, two", "a", "train"), Row("zwei\nlines", "b", "test"))
    lines = "".join(json.dumps({"text": r.text, "label": r.label, "split": r.split}) + "\n" for r in rows)
    (tmp_path / "r.jsonl").write_text(lines)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "r.csv").write_text('text,label,split\n"one, two",a,train\n"zwei\nlines",b,test\n')
    for name in ("r.jsonl", "r.jsonl.gz", "r.csv"):
        assert read_rows(tmp_path / name) == rows
        assert read_rows(tmp_path / name, "test") == rows[1:]


def test_csv_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes("\ufefftext,label\nhello,a\n".encode())
    assert read_rows(tmp_path / "r.csv") == (Row("hello", "a"),)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", '{"text": "a", "label": "x"}\nnot json\n', "line 2: not JSON"),
        ("r.jsonl", "[1]\n", "line 1: must be an object"),
        ("r.jsonl", '{"text": "  ", "label": "x"}\n', "line 1: text is '  ', must be a non-empty string"),
        ("r.jsonl", '{"text": "a", "label": 3}\n', "label is 3, must be a non-empty string"),
        ("r.jsonl", '{"text": "a"}\n', "label is None"),
        ("r.jsonl", '{"text": "a", "label": "x", "split": "val"}\n', "split is 'val', must be one of train, dev, test"),
        ("r.jsonl", '{"text": "a\\ud800b", "label": "x"}\n', "line 1: text holds half of a surrogate pair"),
        ("r.jsonl", "", "holds no rows"),
        ("r.csv", "text,class\na,b\n", "column 'label' is missing"),
        ("r.csv", "", "is missing from the header"),
        ("r.parquet", "", "must be in a .jsonl, .jsonl.gz, .csv or .npz file"),
    ],
)
def test_bad_files_name_the_line_and_the_field(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_broken_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"text,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match="not readable UTF-8"):
        read_rows(tmp_path / "r.csv")
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b'{"text":"a","label":"b"}\n' * 100)[:-9])
    with pytest.raises(DataError, match="not readable"):
        read_rows(tmp_path / "r.jsonl.gz")


def test_missing_file_and_missing_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "r.csv").write_text("text,label,split\na,b,train\n")
    with pytest.raises(DataError, match="no rows with split 'dev'"):
        read_rows(tmp_path / "r.csv", "dev")


def test_without_splits_every_class_gives_a_tenth_to_dev() -> None:
    rows = [Row(f"text {i}", "ab"[i % 2]) for i in range(200)]
    train, dev = split_rows(rows)
    assert Counter(row.label for row in dev) == {"a": 10, "b": 10}
    assert set(train) | set(dev) == set(rows)
    assert not set(train) & set(dev)
    assert split_rows(rows[::-1]) == (train, dev)


def test_stratified_takes_classes_in_turns() -> None:
    rows = [Row(str(i), "common") for i in range(50)] + [Row("r", "rare")]
    assert [row.label for row in stratified(rows, 4)] == ["common", "rare", "common", "common"]
    assert len(stratified(rows, 1000)) == 51


def test_description_depends_on_rows_and_holds_no_text() -> None:
    rows = [Row("secret", "a")]
    assert describe("d", rows).sha256 != describe("d", [Row("secrets", "a")]).sha256
    assert "secret" not in describe("d", rows).model_dump_json()


def test_unknown_label_is_named() -> None:
    with pytest.raises(DataError, match="label 'z' is unknown"):
        label_ids([Row("t", "z")], ("a", "b"))


@pytest.mark.parametrize(("name", "counts"), [("spam", 5847), ("icd10", 46133), ("language", 9264)])
def test_vendored_rows_do_not_leak_between_splits(name: str, counts: int) -> None:
    rows = read_rows(DEMO_DATA / f"{name}.jsonl.gz")
    assert len(rows) == counts
    assert leaks(rows) == (0, 0)
    every = {split: {row.label for row in rows if row.split == split} for split in ("train", "dev", "test")}
    assert every["train"] == every["dev"] == every["test"]
    moved = next(i for i, row in enumerate(rows) if row.split == "test" and sum(r.group == row.group for r in rows) > 1)
    flipped = [*rows[:moved], Row(rows[moved].text, rows[moved].label, "train", rows[moved].group), *rows[moved + 1 :]]
    assert leaks(flipped) != (0, 0)


def leaks(rows: list[Row] | tuple[Row, ...]) -> tuple[int, int]:
    """Groups and texts that stand in more than one split."""
    by_group: dict[str, set[str]] = {}
    by_text: dict[str, set[str]] = {}
    for row in rows:
        by_group.setdefault(row.group, set()).add(row.split)
        by_text.setdefault(row.text.casefold(), set()).add(row.split)
    return sum(len(s) > 1 for s in by_group.values()), sum(len(s) > 1 for s in by_text.values())


def write_images(file: Path, **changes: Any) -> Path:
    """20 train, 5 test images of two classes in turns; a change of None leaves an array out."""
    x = np.arange(25 * 4, dtype=np.uint8).reshape(25, 2, 2)
    arrays: dict[str, Any] = {
        "x_train": x[:20],
        "y_train": np.arange(20) % 2,
        "x_test": x[20:],
        "y_test": np.arange(5) % 2,
    }
    arrays |= {"classes": np.array(["cat", "dog"])} | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def test_images_come_from_arrays(tmp_path: Path) -> None:
    rows = read_rows(write_images(tmp_path / "pets.npz"))
    assert [row.split for row in rows] == ["train"] * 18 + ["dev"] * 2 + ["test"] * 5
    assert [row.label for row in rows[:3]] == ["cat", "dog", "cat"]
    np.testing.assert_array_equal(rows[1].source, [[4, 5], [6, 7]])
    assert len(read_rows(tmp_path / "pets.npz", "test")) == 5
    given = write_images(tmp_path / "dev.npz", x_dev=np.zeros((3, 2, 2), np.uint8), y_dev=np.array([1, 1, 0]))
    assert [row.split for row in read_rows(given)].count("train") == 20
    assert [row.label for row in read_rows(given, "dev")] == ["dog", "dog", "cat"]


def test_a_description_depends_on_every_pixel(tmp_path: Path) -> None:
    rows = read_rows(write_images(tmp_path / "pets.npz"))
    assert rows[3].image is not None
    before = describe("pets", rows)
    rows[3].image[0, 0] ^= 1
    assert describe("pets", rows).sha256 != before.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "array classes is missing"),
        ({"y_test": None}, "array y_test is missing"),
        ({"x_train": np.zeros((20, 2, 2))}, r"x_train is float64 \[20, 2, 2\]"),
        ({"x_train": np.zeros((20, 2), np.uint8)}, "must be uint8"),
        ({"y_train": np.zeros(19, np.uint8)}, r"x_train is .* with uint8 \[19\] classes"),
        ({"y_train": np.full(20, 2)}, "y_train runs to 2, classes has 2 names"),
        ({"y_train": np.full(20, -1)}, "y_train runs to -1"),
        ({"y_train": np.zeros(20)}, "float64"),
        ({"classes": np.array([{}], dtype=object)}, r"is not a whole \.npz file"),
    ],
)
def test_arrays_that_are_no_rows(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write_images(tmp_path / "pets.npz", **changes))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"is not a whole \.npz file"):
        read_rows(tmp_path / "cut.npz")
