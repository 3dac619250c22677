"""Labelled rows from a file of the user's: JSON lines (plain or gzip) or CSV of texts, or an .npz of images.

Columns or keys: text, label, and optionally split and group. Arrays: x_train, y_train, x_test, y_test and optionally
x_dev, y_dev: uint8 [N, H, W] or [N, H, W, c] and class numbers; classes: their names.
"""

import csv
import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.errors import DataError
from models.manifest import Rows

SPLITS = ("train", "dev", "test")
# The longest cell csv accepts by default is 131,072 characters, shorter than an e-mail thread.
MAX_FIELD_CHARS = 10_000_000


@dataclass(frozen=True)
class Row:
    """One labelled example, a text or an image (uint8 [H, W] or [H, W, c]). split: train, dev, test, or empty when the
    file has no such column. group: rows that share one are not independent (one mail thread, one source sentence);
    empty: on its own."""

    text: str
    label: str
    split: str = ""
    group: str = ""
    image: npt.NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    @property
    def source(self) -> str | npt.NDArray[np.uint8]:
        """What an encoder turns into an item."""
        return self.text if self.image is None else self.image


def read_rows(path: Path, split: str | None = None) -> tuple[Row, ...]:
    """All rows of a .jsonl, .jsonl.gz, .csv or .npz file, or those of one split.

    A file without splits answers for any: give it to `evaluate` whole. Raises DataError naming the line and field of
    the first bad row, or if nothing is left.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = _text_rows(path, _json_lines(path))
    elif path.suffix == ".csv":
        rows = _text_rows(path, _csv_rows(path))
    elif path.suffix == ".npz":
        rows = _image_rows(path)
    else:
        raise DataError(f"{path.name}: rows must be in a .jsonl, .jsonl.gz, .csv or .npz file")
    if split is not None and any(row.split for row in rows):
        rows = tuple(row for row in rows if row.split == split)
    if not rows:
        wanted = f" with split {split!r}" if split else ""
        raise DataError(f"{path.name} holds no rows{wanted}")
    return rows


def split_rows(rows: Sequence[Row], seed: int = 0) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Train and dev rows: by the split column if there is one, else every class gives a tenth to dev, by hash order.

    Raises DataError if a column exists but has no train rows.
    """
    if any(row.split for row in rows):
        train = tuple(row for row in rows if row.split == "train")
        if not train:
            raise DataError("no row has split 'train'")
        return train, tuple(row for row in rows if row.split == "dev")
    ordered = sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\0{row.text}".encode("utf-8", "replace")).digest())
    seen: dict[str, int] = {}
    train_rows: list[Row] = []
    dev_rows: list[Row] = []
    for row in ordered:
        seen[row.label] = seen.get(row.label, 0) + 1
        (dev_rows if seen[row.label] % 10 == 0 else train_rows).append(row)
    return tuple(train_rows), tuple(dev_rows)


def stratified(rows: Sequence[Row], limit: int) -> tuple[Row, ...]:
    """At most `limit` rows, taking the classes in turns in file order, so that rare classes are seen too."""
    queues: dict[str, list[Row]] = {}
    for row in rows:
        queues.setdefault(row.label, []).append(row)
    depth = max(len(queue) for queue in queues.values())
    in_turns = (queue[i] for i in range(depth) for queue in queues.values() if i < len(queue))
    return tuple(row for row, _ in zip(in_turns, range(limit), strict=False))


def describe(name: str, rows: Sequence[Row]) -> Rows:
    """The rows as a manifest records them: name, count, hash; never a text or an image."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.text, row.label]).encode())
        if row.image is not None:
            digest.update(row.image.tobytes())
    return Rows(name=name, rows=len(rows), sha256=digest.hexdigest())


def label_ids(rows: Iterable[Row], labels: Sequence[str]) -> list[int]:
    """Class id of each row. Raises DataError naming a label the model does not know."""
    ids = {label: index for index, label in enumerate(labels)}
    unknown = sorted({row.label for row in rows} - set(ids))
    if unknown:
        raise DataError(f"label {unknown[0]!r} is unknown to the model, which has {', '.join(labels[:8])}, ...")
    return [ids[row.label] for row in rows]


def _text_rows(path: Path, records: Iterator[tuple[int, dict[str, object]]]) -> tuple[Row, ...]:
    try:
        return tuple(_row(path, line, record) for line, record in records)
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path.name} is not readable UTF-8 text: {error}") from None


def _image_rows(path: Path) -> tuple[Row, ...]:
    """Without x_dev, the last tenth of the train images are dev rows."""
    try:
        with path.open("rb") as stream, np.load(stream) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} is not a whole .npz file: {error}") from None
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test", "classes") if name not in arrays]
    if missing:
        raise DataError(f"{path.name}: array {missing[0]} is missing")
    names = [str(name) for name in arrays["classes"].tolist()]
    rows: list[Row] = []
    for split in SPLITS:
        if f"x_{split}" not in arrays:
            continue
        x, y = arrays[f"x_{split}"], arrays.get(f"y_{split}", np.empty(0))
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise DataError(
                f"{path.name}: x_{split} is {x.dtype} {list(x.shape)} with {y.dtype} {list(y.shape)} classes, must be "
                "uint8 [N, H, W] or [N, H, W, c] with N whole numbers"
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(names):
            raise DataError(f"{path.name}: y_{split} runs to {int(y.max())}, classes has {len(names)} names")
        held = len(x) // 10 if split == "train" and "x_dev" not in arrays else 0
        for index, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            rows.append(Row("", names[label], "dev" if index >= len(x) - held else split, image=image))
    return tuple(rows)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path.name}, line {number}: not JSON: {error.msg}") from None
            if not isinstance(record, dict):
                raise DataError(f"{path.name}, line {number}: must be an object with text and label")
            yield number, record


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = {"text", "label"} - set(reader.fieldnames or ())
        if missing:
            raise DataError(f"{path.name}: column {sorted(missing)[0]!r} is missing from the header line")
        try:
            for record in reader:
                yield reader.line_num, dict(record)
        except csv.Error as error:
            raise DataError(f"{path.name}, line {reader.line_num}: {error}") from None


def _row(path: Path, line: int, record: dict[str, object]) -> Row:
    for key in ("text", "label"):
        value = record.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path.name}, line {line}: {key} is {value!r}, must be a non-empty string")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{path.name}, line {line}: {key} holds half of a surrogate pair, which is no character")
    split = record.get("split") or ""
    if split not in ("", *SPLITS):
        raise DataError(f"{path.name}, line {line}: split is {split!r}, must be one of {', '.join(SPLITS)}")
    return Row(str(record["text"]), str(record["label"]), str(split), str(record.get("group") or ""))
