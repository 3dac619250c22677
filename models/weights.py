"""Safetensors in and out: each tensor goes from the mapped file straight into its place in a stacked parameter.

A family's table says which names make up which parameter; here that table is expanded for one model into places, and
the same places serve reading and writing. Legend: parameters as in models.decoder
and models.vision.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.architecture import layer_parameters, outer_parameters
from models.classifier import Classifier
from models.compressed import NAMES, check_contents, compressed_buffers, file_names
from models.config import ModelConfig
from models.errors import CheckpointError
from models.families import FAMILIES
from models.hf_config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FOREIGN_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FLOATS = ("F32", "F16", "BF16")
INTEGERS = {torch.uint8: ("U8",), torch.int32: ("I32",)}
# Bytes of one number of each kind that we store.
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I32": 4}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Tensors that old writers store and nobody reads.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^lm_head\.weight$")


@dataclass(frozen=True)
class Place:
    """Rows [start, start + rows) of one parameter, or of one expert of it, and the name they have in the file."""

    name: str
    parameter: str
    expert: int | None
    start: int
    shape: tuple[int, ...]

    def view(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        whole = parameters[self.parameter]
        target = whole if self.expert is None else whole[self.expert]
        return target.narrow(0, self.start, self.shape[0])


def places(config: ModelConfig) -> Iterator[Place]:
    """Every tensor a checkpoint of this model holds, in a stable order."""
    parameters = FAMILIES[config.family].parameters
    for name, size in outer_parameters(config).items():
        yield from _parameter_places(config, name, name, parameters[name], size, {})
    for index in range(config.num_layers):
        buffers = {name: size for name, (size, _) in compressed_buffers(config, config.layers[index]).items()}
        for short, size in (layer_parameters(config, index) | buffers).items():
            names = file_names(parameters, short) if short in NAMES else parameters[f"layers.{{layer}}.{short}"]
            yield from _parameter_places(config, f"layers.{index}.{short}", short, names, size, {"layer": index})


def _parameter_places(
    config: ModelConfig,
    parameter: str,
    short: str,
    names: tuple[str, ...],
    size: tuple[int, ...],
    holes: dict[str, int],
) -> Iterator[Place]:
    per_expert = "{expert}" in names[0]
    rows, tail = (size[1], size[2:]) if per_expert else (size[0], size[1:])
    kv_rows = config.num_kv_heads * config.head_dim
    heights = (
        (rows - 2 * kv_rows, kv_rows, kv_rows) if short in ("w_qkv", "b_qkv") else [rows // len(names)] * len(names)
    )
    for expert in range(size[0]) if per_expert else [None]:
        start = 0
        for name, height in zip(names, heights, strict=True):
            yield Place(name.format(expert=expert, **holes), parameter, expert, start, (height, *tail))
            start += height


def weight_files(path: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint directory: the single file, or the shards its index names.

    Raises CheckpointError if there is none, or only files of a kind that can run code when read.
    """
    if (path / SINGLE_FILE).is_file():
        return (path / SINGLE_FILE,)
    if (path / INDEX_FILE).is_file():
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{INDEX_FILE}: weight_map is missing or empty")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{INDEX_FILE}: {name!r} is not a safetensors file beside the index")
            if not (path / name).is_file():
                raise CheckpointError(f"{INDEX_FILE} names {name}, which is missing")
        return tuple(path / name for name in names)
    foreign = sorted(p.name for p in path.iterdir() if p.suffix in FOREIGN_SUFFIXES) if path.is_dir() else []
    if foreign:
        raise CheckpointError(
            f"{foreign[0]} is a pickle and may run code when opened: convert the weights to {SINGLE_FILE} first"
        )
    raise CheckpointError(f"{path.name} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def tensor_headers(files: tuple[Path, ...]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Name -> (file, shape, dtype as written) of every tensor, from the headers alone.

    Raises CheckpointError for a truncated or malformed file, or a name that two files hold.
    """
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, a handle is no dict
                    if name in found:
                        raise CheckpointError(
                            f"tensor {name} stands in two files: {found[name][0].name} and {file.name}"
                        )
                    piece = handle.get_slice(name)
                    found[name] = (file, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file.name} is not a whole safetensors file: {error}") from None
    return found


def load_weights(model: Classifier, files: tuple[Path, ...], without: tuple[str, ...] = ()) -> None:
    """Fill every parameter of the model but those in `without` from the files, converting to the parameter's dtype.

    One tensor is mapped at a time and unmapped after it was copied, so the peak is the model plus its largest tensor.
    Raises CheckpointError for a missing, extra, mis-shaped or non-finite tensor, naming it.
    """
    found = tensor_headers(files)
    skipped = {place.name for place in places(model.config) if place.parameter in without}
    wanted = {place.name: place for place in places(model.config) if place.name not in skipped}
    tensors = _tensors(model)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(f"tensor {missing[0]} is missing{_and_more(missing)}: the checkpoint is incomplete")
    extra = [name for name in found if name not in wanted and name not in skipped and not IGNORED.search(name)]
    if extra:
        raise CheckpointError(f"tensor {extra[0]} belongs to no parameter of this model{_and_more(extra)}")
    for name, place in wanted.items():
        if found[name][1] != place.shape:
            raise CheckpointError(f"tensor {name} has shape {list(found[name][1])}, must be {list(place.shape)}")
        allowed = INTEGERS.get(tensors[place.parameter].dtype, FLOATS)
        if found[name][2] not in allowed:
            raise CheckpointError(f"tensor {name} has dtype {found[name][2]}, must be {_listed(allowed)}")

    with torch.no_grad():
        for name, place in wanted.items():
            target = place.view(tensors)
            with safe_open(found[name][0], framework="pt") as handle:
                target.copy_(handle.get_tensor(name))
            if not torch.isfinite(target).all():
                raise CheckpointError(f"tensor {name} holds NaN or infinite values")
    for index, layer in enumerate(model.layers):
        check_contents(model.config, index, dict(layer.named_buffers()))


def read_tensors(files: tuple[Path, ...], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Some tensors by name, as float32. Raises CheckpointError naming the first that is missing."""
    found = tensor_headers(files)
    tensors = {}
    for name in names:
        if name not in found:
            raise CheckpointError(f"tensor {name} is missing")
        with safe_open(found[name][0], framework="pt") as handle:
            tensors[name] = handle.get_tensor(name).float()
    return tensors


def save_weights(
    model: Classifier,
    file: Path,
    dtype: torch.dtype,
    without: tuple[str, ...] = (),
    extra: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write every parameter but those in `without`, and `extra` tensors, in `dtype`, as one safetensors file.

    Masks and indices of compressed experts go with them, as the integers they are.
    """
    whole = _tensors(model)
    named = {p.name: p.view(whole) for p in places(model.config) if p.parameter not in without} | dict(extra or {})
    kinds = {name: dtype if t.is_floating_point() else t.dtype for name, t in named.items()}
    tensors = {name: t.detach().to(device="cpu", dtype=kinds[name]).contiguous().clone() for name, t in named.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _tensors(model: Classifier) -> dict[str, torch.Tensor]:
    """Parameters, and the masks and indices of compressed experts, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def stored_dtype(files: tuple[Path, ...]) -> str:
    """The dtype of the widest stored weight, in torch's words; what `dtype: auto` resolves against."""
    kinds = {dtype for _, _, dtype in tensor_headers(files).values()} & set(FLOATS)
    return "float32" if "F32" in kinds else "float16" if kinds == {"F16"} else "bfloat16"


def choose_dtype(requested: str, stored: str, device: str) -> torch.dtype:
    """float32 on CPUs without matrix units, where bf16 GEMMs are slower; the stored dtype elsewhere."""
    if requested != "auto":
        if requested not in DTYPES:
            raise CheckpointError(f"dtype is {requested!r}, must be auto or one of {', '.join(DTYPES)}")
        return DTYPES[requested]
    if device == "cpu" and not (stored == "bfloat16" and _has_bf16_matrix_units()):
        return torch.float32
    return DTYPES[stored]


def _has_bf16_matrix_units() -> bool:
    probe: Any = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private, hence guarded
    return bool(probe and probe())


def _listed(kinds: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
