"""A checkpoint directory as one value: load it, verify it, write it whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models import memory
from models.architecture import build
from models.classifier import Classifier
from models.compressed import check_forms
from models.config import ModelConfig
from models.errors import CheckpointError
from models.hf_config import family_of, parse_config, parse_labels, parse_problem_type, read_json, write_config
from models.images import GOLDEN_IMAGES, ImageEncoder, golden_image
from models.manifest import (
    GOLDEN_TEXTS,
    MANIFEST_FILE,
    Golden,
    Layer,
    Manifest,
    Source,
    combined_sha256,
    file_sha256,
    read_manifest,
)
from models.sparse import use_sparse_products
from models.tokenizer import TOKENIZER_FILE, TextEncoder
from models.weights import (
    DTYPES,
    FLOATS,
    ITEM_BYTES,
    SINGLE_FILE,
    choose_dtype,
    load_weights,
    save_weights,
    stored_dtype,
    tensor_headers,
    weight_files,
)

CONFIG_FILE = "config.json"
# Largest absolute difference of a golden logit, relative to the largest golden logit. float32 measured 2e-6 between
# thread counts and batch shapes; bfloat16 rounds every activation, hence the wide bound.
GOLDEN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


Encoder = TextEncoder | ImageEncoder


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with what it needs to answer: its encoder of inputs, class names, problem type and provenance."""

    path: Path
    model: Classifier
    encoder: Encoder
    labels: tuple[str, ...]
    problem_type: str
    manifest: Manifest | None
    raw_config: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def artifact_sha256(self) -> str:
        """One hash over the names and hashes of config, tokenizer (where there is one) and weights."""
        return combined_sha256(dict(self.files))

    @property
    def tokenizer_sha256(self) -> str | None:
        """None for a model that reads images."""
        return self.files.get(TOKENIZER_FILE)

    @property
    def stored_dtype(self) -> str:
        return stored_dtype(weight_files(self.path))

    @property
    def experts_kept(self) -> tuple[int, ...]:
        """Physical experts of each layer; 0 for a dense layer."""
        return tuple(layer.num_experts for layer in self.model.config.layers)

    @property
    def experts_total(self) -> tuple[int, ...]:
        """Experts of each layer before pruning."""
        if self.manifest is not None:
            return tuple(layer.total for layer in self.manifest.layers)
        return tuple(layer.num_rows for layer in self.model.config.layers)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes per part (models.memory.PARTS) that this checkpoint needs when served alone."""
        return memory.weight_bytes(self.model)

    def source(self) -> Source:
        """This checkpoint as somebody's parent, for a manifest."""
        size = DTYPES[self.stored_dtype].itemsize
        parameters = memory.num_parameters(self.model)
        return Source(name=self.path.name, files=dict(self.files), parameters=parameters, bytes=parameters * size)

    def golden(self) -> tuple[Golden, ...]:
        """The answers of this model to the golden inputs."""
        return golden_answers(self.model, self.encoder)

    def with_manifest(self, **changes: Any) -> "Checkpoint":
        """This checkpoint with fields of secateur.json changed, on disk too. Raises CheckpointError if it has none."""
        if self.manifest is None:
            raise CheckpointError(f"{self.path.name} has no {MANIFEST_FILE}")
        manifest = self.manifest.model_copy(update=changes)
        write_manifest(self.path, manifest)
        return replace(self, manifest=manifest)

    def verify(self) -> None:
        """Recompute the golden answers. Raises CheckpointError if a logit is off, a label differs or none is recorded.

        A plain Hugging Face checkpoint has nothing to be held against and passes.
        """
        if self.manifest is None:
            return
        if not self.manifest.golden:
            raise CheckpointError(f"{MANIFEST_FILE}: golden is empty, so nothing can be verified")
        bound = GOLDEN_TOLERANCE[self.model.dtype]
        for number, golden in enumerate(self.manifest.golden):
            got = self.model.classify([_golden_item(golden, self.encoder)]).logits_BC[0]
            want = torch.tensor(golden.logits)
            if want.shape != got.shape:
                raise CheckpointError(f"golden input {number} has {len(want)} logits, the model gives {len(got)}")
            error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))
            if not error <= bound:  # also true for NaN
                raise CheckpointError(f"golden input {number} is off by {error:.2e}, more than {bound:.0e} allowed")
            if self.model.dtype == torch.float32 and int(got.argmax()) != int(want.argmax()):
                raise CheckpointError(f"golden input {number} gives another label than recorded")


def golden_answers(model: Classifier, encoder: Encoder) -> tuple[Golden, ...]:
    names, field = (GOLDEN_TEXTS, "text") if encoder.reads == "text" else (tuple(GOLDEN_IMAGES), "image")
    inputs = [Golden(logits=(), **{field: name}) for name in names]
    answers = [model.classify([_golden_item(golden, encoder)]).logits_BC[0] for golden in inputs]
    return tuple(
        golden.model_copy(update={"logits": tuple(logits.tolist())})
        for golden, logits in zip(inputs, answers, strict=True)
    )


def _golden_item(golden: Golden, encoder: Encoder) -> Any:
    if encoder.reads == "text":
        return encoder.encode(golden.text).ids
    if golden.image not in GOLDEN_IMAGES:
        raise CheckpointError(f"{MANIFEST_FILE}: there is no golden image {golden.image!r}")
    return encoder.encode(golden_image(golden.image, encoder.vision)).ids


def encoder_of(config: ModelConfig, path: Path) -> Encoder:
    """What turns inputs into the model's items; for text, read from the directory's tokenizer."""
    if config.vision is not None:
        return ImageEncoder(config.vision, config.max_tokens)
    return TextEncoder(path / TOKENIZER_FILE, config.max_tokens, config.vocab_size)


def load_checkpoint(path: Path | str, device: str = "cpu", dtype: str = "auto", backend: str = "auto") -> Checkpoint:
    """Read a checkpoint directory: a Hugging Face classifier of a known family, with or without our manifest.

    dtype: auto, float32, float16 or bfloat16. backend: auto or one of `kernels.moe.BACKENDS`. Raises CheckpointError if
    anything is missing, malformed or contradicts the manifest (file hashes, layers, counts, sizes), ValueError if the
    backend cannot run on the device.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    raw = read_json(path / CONFIG_FILE)
    manifest = read_manifest(path)
    weights = weight_files(path)
    files = {file.name: file_sha256(file) for file in _content_files(path, weights, family_of(raw).reads_images)}
    if manifest is not None:
        _check_files(manifest, files)
    config = parse_config(raw, tuple(layer.shape for layer in manifest.layers) if manifest else None)
    check_forms(config)
    if manifest is not None and manifest.family != config.family:
        raise CheckpointError(f"{MANIFEST_FILE}: family is {manifest.family!r}, config.json says {config.family!r}")
    encoder = encoder_of(config, path)
    chosen_backend = None if backend == "auto" else backend
    model = build(config, choose_dtype(dtype, stored_dtype(weights), device), device, chosen_backend)
    load_weights(model, weights)
    model.requires_grad_(False).eval()
    if manifest is not None:
        _check_sizes(manifest, model, stored_dtype(weights))
    use_sparse_products(model)
    return Checkpoint(path, model, encoder, parse_labels(raw), parse_problem_type(raw), manifest, raw, files)


def save_checkpoint(
    out: Path,
    model: Classifier,
    raw_config: Mapping[str, Any],
    tokenizer_file: Path | None,
    layers: tuple[Layer, ...] | None = None,
    dtype: str = "float32",
    **provenance: Any,
) -> Checkpoint:
    """Write config, tokenizer, weights and manifest as a new directory, verify it, and return it loaded.

    tokenizer_file: not read for a model of images. layers: the manifest's layers, default: unpruned. provenance: other
    manifest fields (method, options, semantics, parent, ...). The directory appears whole or not at all. Raises
    CheckpointError if `out` exists.
    """
    if layers is None:
        layers = tuple(
            Layer(
                total=shape.num_rows,
                num_experts=shape.num_experts,
                kept=shape.route_E,
                route=shape.route_E,
                compression=shape.compression,
            )
            for shape in model.config.layers
        )
    fields = {"method": "none", "options": {}, "semantics": "none", **provenance}
    with new_directory(out) as temporary:
        config = write_config(raw_config, model.config, dtype)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if model.config.vision is None and tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, temporary / TOKENIZER_FILE)
        save_weights(model, temporary / SINGLE_FILE, DTYPES[dtype])
        # Golden answers come from the weights as stored, not as they were before rounding to `dtype`.
        stored = build(model.config)
        load_weights(stored, (temporary / SINGLE_FILE,))
        encoder = encoder_of(model.config, temporary)
        reads_images = model.config.vision is not None
        content = _content_files(temporary, weight_files(temporary), reads_images)
        parameters = memory.num_parameters(model)
        manifest = Manifest(
            family=model.config.family,
            dtype=dtype,
            parameters=parameters,
            bytes=memory.stored_bytes(model, DTYPES[dtype].itemsize),
            layers=layers,
            files={file.name: file_sha256(file) for file in content},
            golden=golden_answers(stored, encoder),
            **fields,
        )
        write_manifest(temporary, manifest)
        load_checkpoint(temporary).verify()
    return load_checkpoint(out)


def source_of(path: Path) -> Source:
    """A checkpoint directory, whole or routers only, as a manifest names it."""
    weights = weight_files(path)
    headers = tensor_headers(weights)
    parameters = sum(math.prod(shape) for _, shape, dtype in headers.values() if dtype in FLOATS)
    size = sum(math.prod(shape) * ITEM_BYTES.get(dtype, 2) for _, shape, dtype in headers.values())
    files = {file.name: file_sha256(file) for file in (path / CONFIG_FILE, *weights)}
    return Source(name=path.name, files=files, parameters=parameters, bytes=size)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put secateur.json into a checkpoint directory, replacing an older one in one step."""
    temporary = path / f".{MANIFEST_FILE}.tmp"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path / MANIFEST_FILE)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends without an error, synced to disk, else vanishes."""
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another --out or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes 0600; a service under another user must read them
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _content_files(path: Path, weights: tuple[Path, ...], reads_images: bool) -> tuple[Path, ...]:
    tokenizer = () if reads_images else (path / TOKENIZER_FILE,)
    files = (path / CONFIG_FILE, *tokenizer, *weights)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing in {path.name}")
    return files


def _check_sizes(manifest: Manifest, model: Classifier, dtype: str) -> None:
    size = memory.stored_bytes(model, DTYPES[dtype].itemsize)
    found = {"parameters": memory.num_parameters(model), "dtype": dtype, "bytes": size}
    for field, value in found.items():
        if getattr(manifest, field) != value:
            raise CheckpointError(f"{MANIFEST_FILE}: {field} is {getattr(manifest, field)}, the weights hold {value}")


def _check_files(manifest: Manifest, files: Mapping[str, str]) -> None:
    if set(manifest.files) != set(files):
        raise CheckpointError(f"{MANIFEST_FILE}: files are {sorted(manifest.files)}, found {sorted(files)}")
    for name, digest in files.items():
        if manifest.files[name] != digest:
            raise CheckpointError(f"{name} has another sha256 than {MANIFEST_FILE} records: the file was changed")
