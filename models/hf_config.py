"""config.json in and out: read through the family's table, refuse what we would not run faithfully."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import POOLINGS, LayerShape, ModelConfig, Vision
from models.errors import CheckpointError
from models.families import FAMILIES, Family

# A checkpoint that transformers cannot represent (per-layer counts, router rows without experts, another pooling than
# the last token) carries this model_type, so that transformers refuses it instead of giving other logits.
OWN_MODEL_TYPE = "secateur"
OWN_ARCHITECTURES = {False: "SecateurForSequenceClassification", True: "SecateurForImageClassification"}
# Of an image, the head reads the class token or the mean over all patches; with the latter there is no class token.
IMAGE_POOLINGS = ("first", "mean")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
MAX_JSON_BYTES = 64 * 1024 * 1024


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file if it is absent, too big or not an object."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing in {path.parent.name}: not a checkpoint directory")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, found {type(value).__name__}")
    return value


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family table a config.json asks for. Raises CheckpointError naming the known ones."""
    name = raw.get("secateur_family") if raw.get("model_type") == OWN_MODEL_TYPE else raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"model_type is {name!r}, must be one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def reads_images(path: Path) -> bool:
    """Whether the checkpoint in a directory is a model of images, by its config.json."""
    return family_of(read_json(path / "config.json")).reads_images


def parse_config(raw: Mapping[str, Any], layers: tuple[LayerShape, ...] | None = None) -> ModelConfig:
    """Our view of a config.json; `layers` (from a manifest) overrides the uniform unpruned shapes it implies.

    Raises CheckpointError for a missing key, an option that we do not run, or sizes that do not fit together.
    """
    family = family_of(raw)
    for key, allowed in family.fixed.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(f"config.json: {key} is {raw[key]!r}, only {allowed[0]!r} is supported")

    values: dict[str, Any] = dict(family.defaults)
    for field, keys in family.keys.items():
        present = [raw[key] for key in keys if raw.get(key) is not None]
        if present:
            values[field] = present[0]
    values["rope_theta"] = _rope_theta(raw, values["rope_theta"])
    for field in family.sizes:
        value = values.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            names = " or ".join(family.keys[field])
            raise CheckpointError(f"config.json: {names} is {value!r}, must be a positive integer")
    values.setdefault("num_kv_heads", values["num_heads"])
    values.setdefault("head_dim", values["width"] // values["num_heads"])
    if values["num_heads"] % values["num_kv_heads"]:
        raise CheckpointError(
            f"config.json: num_attention_heads ({values['num_heads']}) must be a multiple of "
            f"num_key_value_heads ({values['num_kv_heads']})"
        )
    poolings = IMAGE_POOLINGS if family.reads_images else POOLINGS
    pooling = raw.get("classifier_pooling", poolings[0])
    if pooling not in poolings:
        raise CheckpointError(f"config.json: classifier_pooling is {pooling!r}, must be one of {', '.join(poolings)}")
    vision = _vision(values) if family.reads_images else None
    if vision is not None:
        values["max_tokens"] = _image_tokens(vision, pooling)

    shapes = layers or _uniform_layers(values)
    if len(shapes) != values["num_layers"]:
        raise CheckpointError(f"secateur.json lists {len(shapes)} layers, config.json has {values['num_layers']}")
    for index, shape in enumerate(shapes):
        if shape.num_experts and shape.num_rows < values["top_k"]:
            raise CheckpointError(
                f"layer {index} routes over {shape.num_rows} experts, fewer than num_experts_per_tok={values['top_k']}"
            )
    return ModelConfig(
        family=family.name,
        vocab_size=values["vocab_size"],
        width=values["width"],
        num_heads=values["num_heads"],
        num_kv_heads=values["num_kv_heads"],
        head_dim=values["head_dim"],
        expert_width=values["expert_width"],
        dense_width=values.get("dense_width", 0),
        shared_width=values.get("shared_width", 0),
        top_k=values["top_k"],
        normalize_top_k=bool(values["normalize_top_k"]),
        norm_eps=float(values["norm_eps"]),
        rope_theta=values["rope_theta"],
        max_tokens=_max_tokens(raw, values["max_tokens"]),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        num_labels=len(parse_labels(raw)),
        pooling=pooling,
        layers=shapes,
        vision=vision,
    )


def parse_labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names by id. Raises CheckpointError unless id2label names every id from 0 on, each name once."""
    id2label = raw.get("id2label")
    if not isinstance(id2label, dict) or not id2label:
        raise CheckpointError("config.json: id2label is missing, so classes have no names: add one entry per class")
    try:
        by_id = {int(key): str(value) for key, value in id2label.items()}
    except ValueError:
        raise CheckpointError(f"config.json: id2label keys must be integers, found {sorted(id2label)[:3]}") from None
    if sorted(by_id) != list(range(len(by_id))):
        raise CheckpointError(
            f"config.json: id2label is incomplete: ids are {sorted(by_id)}, must be 0..{len(by_id) - 1}"
        )
    labels = tuple(by_id[i] for i in range(len(by_id)))
    if len(set(labels)) != len(labels):
        raise CheckpointError("config.json: id2label gives two classes the same name")
    return labels


def parse_problem_type(raw: Mapping[str, Any]) -> str:
    """The checkpoint's problem type; absent means sigmoid for one output and softmax for more, as upstream."""
    problem_type = raw.get("problem_type")
    if problem_type is None:
        return PROBLEM_TYPES[1] if len(parse_labels(raw)) == 1 else PROBLEM_TYPES[0]
    if problem_type not in PROBLEM_TYPES:
        raise CheckpointError(
            f"config.json: problem_type is {problem_type!r}, must be one of {', '.join(PROBLEM_TYPES)}"
        )
    return str(problem_type)


def write_config(raw: Mapping[str, Any], config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for a model of this shape: the parent's keys, with what pruning changed."""
    family = FAMILIES[config.family]
    written = {key: value for key, value in raw.items() if key not in ("secateur_family", "torch_dtype")}
    written["dtype"] = dtype
    top_k = family.keys["top_k"]
    written[next((key for key in top_k if raw.get(key) is not None), top_k[0])] = config.top_k
    if is_hugging_face(config):
        num_experts = max(layer.num_experts for layer in config.layers)
        written |= {key: num_experts for key in family.keys["num_experts"] if key in raw}
        return written | {"model_type": family.name, "architectures": [family.architecture]}
    return written | {
        "model_type": OWN_MODEL_TYPE,
        "secateur_family": family.name,
        "architectures": [OWN_ARCHITECTURES[family.reads_images]],
    }


def is_hugging_face(config: ModelConfig) -> bool:
    """True if transformers computes the same logits from this architecture.

    Its classifiers read the last token, and every MoE layer holds the same number of experts, each under its own row.
    It has no V-MoE.
    """
    experts = {config.layers[i] for i in config.moe_layers}
    is_uniform = len(experts) <= 1 and all(layer == LayerShape.unpruned(layer.num_experts) for layer in experts)
    return is_uniform and config.pooling == "last" and config.vision is None


def _uniform_layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    moe, dense = LayerShape.unpruned(values["num_experts"]), LayerShape(0, ())
    if "moe_layers" in values:
        chosen = values["moe_layers"]
        if not isinstance(chosen, list) or not chosen or not set(chosen) <= set(range(values["num_layers"])):
            raise CheckpointError(f"config.json: moe_layers is {chosen!r}, must list layers from 0 on")
        return tuple(moe if index in chosen else dense for index in range(values["num_layers"]))
    step, dense_layers = values.get("sparse_step", 1), set(values.get("dense_layers", ()))
    return tuple(
        moe if index not in dense_layers and (index + 1) % step == 0 else dense for index in range(values["num_layers"])
    )


def _rope_theta(raw: Mapping[str, Any], default: float) -> float:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json: rope_type is {kind!r}, only 'default' is supported")
    return float(rope.get("rope_theta", raw.get("rope_theta") or default))


def _max_tokens(raw: Mapping[str, Any], positions: int) -> int:
    """Full attention equals sliding-window attention up to the window, so a window only shortens the longest input."""
    window = raw.get("sliding_window")
    return min(positions, window) if window and raw.get("use_sliding_window", True) else positions


def _vision(values: Mapping[str, Any]) -> Vision:
    """The keys that say how an image becomes tokens. Raises CheckpointError naming the one that is wrong."""
    size = values.get("image_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    patch, channels, capacity = values["patch"], values["channels"], values["capacity"]
    if type(height) is not int or type(width) is not int or min(height, width) < 1 or height % patch or width % patch:
        raise CheckpointError(
            f"config.json: image_size is {size!r}, must be a multiple of patch_size ({patch}), or two"
        )
    if channels not in (1, 3):
        raise CheckpointError(f"config.json: num_channels is {channels}, must be 1 (grey) or 3 (red, green, blue)")
    if type(capacity) is not int or capacity < 0:
        raise CheckpointError(f"config.json: expert_capacity is {capacity!r}, must be 0 or tokens per expert and image")
    for key in ("mean", "std"):
        given = values.get(key)
        numbers = given if isinstance(given, list) else []
        if len(numbers) != channels or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise CheckpointError(f"config.json: image_{key} is {given!r}, must be a number for each channel")
    if not all(std > 0 for std in values["std"]):
        raise CheckpointError(f"config.json: image_std is {values['std']!r}, must be above 0")
    return Vision(height, width, patch, channels, tuple(values["mean"]), tuple(values["std"]), capacity)


def _image_tokens(vision: Vision, pooling: str) -> int:
    tokens = vision.num_patches + (pooling == "first")
    if vision.capacity > tokens:
        raise CheckpointError(f"config.json: expert_capacity is {vision.capacity}, an image has only {tokens} tokens")
    return tokens
