"""Read the arrays of a google-research/vmoe model from an .npz file, under the names they have in that repository.

Names and shapes are those of its own shape test (vmoe/nn/vit_moe_test.py): `/` joins what flax nests. What could not be
checked: no released checkpoint was at hand. Those are stored in the repository's own partitioned format, so somebody
has to write them to an .npz first; and how many experts a token chooses is in no array, so the caller says it. `wi` and
`wo` are taken for `Dense_0` and `Dense_1`, as T5-like writers call them. Pixels are scaled to -1 .. 1 as in its
fine-tuning configurations. Routing is dropless here, where the original drops what exceeds an expert's capacity.

Legend: D model width, H heads, h head width, F inner width, E experts, L tokens, C classes, p patch side, c channels.
"""

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.architecture import build
from models.checkpoint import Checkpoint, save_checkpoint
from models.errors import CheckpointError
from models.hf_config import parse_config

Array = npt.NDArray[Any]
BLOCK = "Encoder/encoderblock_"


def _turned(kernel: Array) -> Array:
    """[..., in, out] -> [..., out, in]."""
    return np.swapaxes(kernel, -1, -2)


def _heads_out(kernel_DHh: Array) -> Array:
    return kernel_DHh.reshape(kernel_DHh.shape[0], -1).T


def _heads_in(kernel_HhD: Array) -> Array:
    return kernel_HhD.reshape(-1, kernel_HhD.shape[2]).T


def _as_is(array: Array) -> Array:
    return array


# Our parameter -> (their arrays, stacked along rows; how each is turned into ours).
Table = Mapping[str, tuple[tuple[str, ...], Callable[[Array], Array]]]
OUTER: Table = {
    "w_patch": (("embedding/kernel",), lambda kernel_ppcD: kernel_ppcD.transpose(3, 2, 0, 1)),
    "b_patch_D": (("embedding/bias",), _as_is),
    "class_1D": (("cls",), lambda array: array[0]),
    "position_LD": (("Encoder/posembed_input/pos_embedding",), lambda array: array[0]),
    "norm_D": (("Encoder/encoder_norm/scale",), _as_is),
    "b_norm_D": (("Encoder/encoder_norm/bias",), _as_is),
    "score_CD": (("head/kernel",), _turned),
    "b_score_C": (("head/bias",), _as_is),
}
LAYER: Table = {
    "attention_norm_D": (("LayerNorm_0/scale",), _as_is),
    "b_attention_norm_D": (("LayerNorm_0/bias",), _as_is),
    "w_qkv": (tuple(f"SelfAttention/{part}/kernel" for part in ("query", "key", "value")), _heads_out),
    "b_qkv": (
        tuple(f"SelfAttention/{part}/bias" for part in ("query", "key", "value")),
        lambda bias_Hh: bias_Hh.ravel(),
    ),
    "w_o": (("SelfAttention/out/kernel",), _heads_in),
    "b_o": (("SelfAttention/out/bias",), _as_is),
    "ffn_norm_D": (("LayerNorm_1/scale",), _as_is),
    "b_ffn_norm_D": (("LayerNorm_1/bias",), _as_is),
    "w_dense_in": (("Mlp/Dense_0/kernel",), _turned),
    "b_dense_in": (("Mlp/Dense_0/bias",), _as_is),
    "w_dense_out": (("Mlp/Dense_1/kernel",), _turned),
    "b_dense_out": (("Mlp/Dense_1/bias",), _as_is),
    "w_router_ED": (("Moe/Router/dense/kernel",), _turned),
    "w_in_PGD": (("Moe/Mlp/Dense_0/kernel",), _turned),
    "b_in_PG": (("Moe/Mlp/Dense_0/bias",), _as_is),
    "w_out_PDF": (("Moe/Mlp/Dense_1/kernel",), _turned),
    "b_out_PD": (("Moe/Mlp/Dense_1/bias",), _as_is),
}


def import_vmoe(
    file: Path,
    out: Path,
    top_k: int = 2,
    capacity: int = 0,
    labels: tuple[str, ...] = (),
    dtype: str = "float32",
) -> Checkpoint:
    """Write the model of an .npz file as a checkpoint directory of ours, verified, and return it loaded.

    top_k: experts that each token chooses. capacity: tokens that each expert takes of an image instead, 0 where tokens
    choose. labels: names of the classes in order, default: their numbers. Raises CheckpointError naming the array that
    is missing, of another shape than the others imply, or of no use here, and if `out` exists.
    """
    arrays = _read(file)
    raw = _config(arrays, top_k, capacity, labels)
    model = build(parse_config(raw))
    used: set[str] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            sources, turn = _sources(name)
            used.update(sources)
            value = np.concatenate([turn(_array(arrays, source)) for source in sources])
            if value.shape != tuple(parameter.shape):
                raise CheckpointError(f"{sources[0]}: gives {list(value.shape)}, must give {list(parameter.shape)}")
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)))
    unused = sorted(set(arrays) - used)
    if unused:
        raise CheckpointError(f"{file.name}: array {unused[0]} belongs to nothing that we run")
    return save_checkpoint(out, model.requires_grad_(False).eval(), raw, None, dtype=dtype)


def _sources(name: str) -> tuple[tuple[str, ...], Callable[[Array], Array]]:
    if not name.startswith("layers."):
        return OUTER[name]
    _, layer, short = name.split(".")
    sources, turn = LAYER[short]
    return tuple(f"{BLOCK}{layer}/{source}" for source in sources), turn


def _read(file: Path) -> dict[str, Array]:
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file.name} is not a whole .npz file: {error}") from None
    short = {"wi": "Dense_0", "wo": "Dense_1"}
    return {re.sub(r"(?<=/Mlp/)(wi|wo)(?=/)", lambda found: short[found[0]], name): a for name, a in arrays.items()}


def _config(arrays: Mapping[str, Array], top_k: int, capacity: int, labels: tuple[str, ...]) -> dict[str, Any]:
    """config.json, as far as the shapes of the arrays tell it."""
    patch, _, channels, width = _array(arrays, "embedding/kernel", 4).shape
    _, num_heads, _ = _array(arrays, f"{BLOCK}0/SelfAttention/query/kernel", 3).shape
    num_layers = sum(re.fullmatch(f"{BLOCK}[0-9]+/LayerNorm_0/scale", name) is not None for name in arrays)
    moe_layers = [layer for layer in range(num_layers) if f"{BLOCK}{layer}/Moe/Router/dense/kernel" in arrays]
    dense_layers = [layer for layer in range(num_layers) if layer not in moe_layers]
    if not moe_layers:
        raise CheckpointError(f"array {BLOCK}*/Moe/Router/dense/kernel is missing: no block has experts")
    num_experts, _, expert_width = _array(arrays, f"{BLOCK}{moe_layers[0]}/Moe/Mlp/Dense_0/kernel", 3).shape
    dense_width = expert_width
    if dense_layers:
        dense_width = _array(arrays, f"{BLOCK}{dense_layers[0]}/Mlp/Dense_0/kernel", 2).shape[1]
    has_class_token = "cls" in arrays
    side = math.isqrt(_array(arrays, "Encoder/posembed_input/pos_embedding", 3).shape[1] - has_class_token)
    num_labels = _array(arrays, "head/bias", 1).shape[0]
    if labels and len(labels) != num_labels:
        raise CheckpointError(f"{len(labels)} labels are given, head/bias has {num_labels} classes")
    names = labels or tuple(map(str, range(num_labels)))
    return {
        "model_type": "vmoe",
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "expert_capacity": capacity,
        "moe_intermediate_size": expert_width,
        "intermediate_size": dense_width,
        "moe_layers": moe_layers,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
        "classifier_pooling": "first" if has_class_token else "mean",
        "id2label": {str(index): name for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _array(arrays: Mapping[str, Array], name: str, ndim: int | None = None) -> Array:
    if name not in arrays:
        raise CheckpointError(f"array {name} is missing")
    if ndim is not None and arrays[name].ndim != ndim:
        raise CheckpointError(f"array {name} has shape {list(arrays[name].shape)}, must have {ndim} axes")
    return arrays[name]
