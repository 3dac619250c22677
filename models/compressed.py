"""Which tensors hold a layer's compressed experts, what they are called in files, and what must be true of them.

Legend: P physical experts, D model width, F expert inner width, G = 2F (F if not gated). Of one matrix: Y rows,
X columns, M values kept per row, B = ceil(X / 8) bytes of mask, L rank, Q lines of the residual. An expert has three
matrices, gate and up [F, D] and down [D, F], or, not gated, two.
"""

from collections.abc import Mapping

import torch

from kernels.compressed import CompressedExperts, Dense, Factored, Masked, Sparse, Stack, unpack_bits
from kernels.routing import Activation
from kernels.sparse import SparseProducts
from models.config import Bitmask, Form, LayerShape, LowRank, ModelConfig
from models.errors import CheckpointError

MATRICES = ("gate", "up", "down")
# The end of a tensor's name in our modules -> in files, where it stands in place of `weight`.
SUFFIXES = {
    "PYX": "weight",
    "value_PYM": "value",
    "mask_PYB": "mask",
    "u_PYL": "u",
    "v_PLX": "v",
    "rows_PQX": "rows",
    "cols_PYQ": "cols",
    "index_PQ": "index",
}
# Every name that a parameter or a buffer of compressed experts may have.
NAMES = tuple(f"w_{matrix}_{suffix}" for matrix in MATRICES for suffix in SUFFIXES)
# In place of value_PYM and mask_PYB where a GPU multiplies 2:4 matrices as they are (models.sparse); never in files.
PACKED = "packed_PYZ"
PACKED_NAMES = tuple(f"w_{matrix}_{PACKED}" for matrix in MATRICES)


def matrix_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of each of an expert's matrices, in the order of MATRICES; no gate where experts have none."""
    inner, width = config.expert_width, config.width
    sizes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    return sizes if is_gated(config) else {name: sizes[name] for name in ("up", "down")}


def is_gated(config: ModelConfig) -> bool:
    """Whether experts have a gate: those of text models do, those of V-MoE do not."""
    return config.vision is None


def compressed_parameters(config: ModelConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what takes the place of w_in_PGD and w_out_PDF and can be trained."""
    sizes: dict[str, tuple[int, ...]] = {}
    for matrix, form, height, width in _matrices(config, shape):
        match form:
            case None:
                sizes[f"w_{matrix}_PYX"] = (shape.num_experts, height, width)
            case Bitmask():
                sizes[f"w_{matrix}_value_PYM"] = (shape.num_experts, height, width // form.group * form.kept)
            case LowRank():
                sizes[f"w_{matrix}_u_PYL"] = (shape.num_experts, height, form.rank)
                sizes[f"w_{matrix}_v_PLX"] = (shape.num_experts, form.rank, width)
                if form.lines and form.structure == "row":
                    sizes[f"w_{matrix}_rows_PQX"] = (shape.num_experts, form.lines, width)
                elif form.lines:
                    sizes[f"w_{matrix}_cols_PYQ"] = (shape.num_experts, height, form.lines)
    return sizes


def compressed_buffers(config: ModelConfig, shape: LayerShape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of what says where the parameters belong."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for matrix, form, height, width in _matrices(config, shape):
        if isinstance(form, Bitmask):
            found[f"w_{matrix}_mask_PYB"] = ((shape.num_experts, height, -(-width // 8)), torch.uint8)
        elif isinstance(form, LowRank) and form.lines:
            found[f"w_{matrix}_index_PQ"] = ((shape.num_experts, form.lines), torch.int32)
    return found


def experts_of(
    config: ModelConfig,
    shape: LayerShape,
    tensors: Mapping[str, torch.Tensor],
    const_CD: torch.Tensor | None,
    activation: Activation = "silu",
    products: SparseProducts | None = None,
) -> CompressedExperts:
    """The layer's tensors, by name, as the kernels take them. products: what packed the packed ones."""
    stacks = {
        name: _stack(name, form, (height, width), tensors, products)
        for name, form, height, width in _matrices(config, shape)
    }
    return CompressedExperts(
        gate=stacks.get("gate"),
        up=stacks["up"],
        down=stacks["down"],
        num_experts=shape.num_experts,
        const_CD=const_CD,
        b_in_PG=tensors.get("b_in_PG"),
        b_out_PD=tensors.get("b_out_PD"),
        activation=activation,
    )


def _stack(
    matrix: str,
    form: Form | None,
    size: tuple[int, int],
    tensors: Mapping[str, torch.Tensor],
    products: SparseProducts | None,
) -> Stack:
    name = f"w_{matrix}_"
    if form is None:
        return Dense(tensors[f"{name}PYX"])
    if isinstance(form, Bitmask):
        if products is not None and f"{name}{PACKED}" in tensors:
            return Sparse(tensors[f"{name}{PACKED}"], size, products)
        return Masked(tensors[f"{name}value_PYM"], tensors[f"{name}mask_PYB"], size[1])
    rest = (tensors.get(f"{name}{suffix}") for suffix in ("rows_PQX", "cols_PYQ", "index_PQ"))
    return Factored(tensors[f"{name}u_PYL"], tensors[f"{name}v_PLX"], *rest)


def file_names(parameters: Mapping[str, tuple[str, ...]], name: str) -> tuple[str, ...]:
    """What a family calls a tensor of compressed experts: its name for the dense matrix, with another end.

    parameters: the family's table. name: as in NAMES, behind `layers.{layer}.`.
    """
    _, matrix, suffix = name.split("_", 2)
    inner, (down,) = parameters["layers.{layer}.w_in_PGD"], parameters["layers.{layer}.w_out_PDF"]
    weight = {"gate": inner[0], "up": inner[-1], "down": down}[matrix]
    return (f"{weight.removesuffix('weight')}{SUFFIXES[suffix]}",)


def check_forms(config: ModelConfig) -> None:
    """Raises CheckpointError for a form that its matrix cannot have."""
    for layer, shape in enumerate(config.layers):
        for matrix, form, height, width in _matrices(config, shape):
            where = f"layer {layer}: {matrix} of {height} x {width}"
            if isinstance(form, Bitmask) and width % form.group:
                raise CheckpointError(f"{where} cannot keep {form.kept} of each {form.group} columns")
            if isinstance(form, LowRank):
                lines = height if form.structure == "row" else width
                if form.rank > min(height, width) or form.lines > lines:
                    raise CheckpointError(f"{where} has no rank {form.rank} and {form.lines} {form.structure}s")


def check_contents(config: ModelConfig, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError for a mask that keeps another number of values than its form says, or for lines that do
    not exist or stand twice. tensors: the layer's, by name."""
    shape = config.layers[layer]
    for matrix, form, height, width in _matrices(config, shape):
        for expert in range(shape.num_experts):
            where = f"layer {layer}, expert {expert}: {matrix}"
            if isinstance(form, Bitmask):
                kept_YX = unpack_bits(tensors[f"w_{matrix}_mask_PYB"][expert], width)
                if not bool((torch.unflatten(kept_YX, 1, (-1, form.group)).sum(-1) == form.kept).all()):
                    raise CheckpointError(f"{where} does not keep {form.kept} of each {form.group} columns")
            elif isinstance(form, LowRank) and form.lines:
                index_Q = tensors[f"w_{matrix}_index_PQ"][expert]
                lines = height if form.structure == "row" else width
                if int(index_Q[0]) < 0 or int(index_Q[-1]) >= lines or bool((index_Q.diff() <= 0).any()):
                    raise CheckpointError(
                        f"{where} lists {form.structure}s that are not ascending from 0 to {lines - 1}"
                    )


def _matrices(config: ModelConfig, shape: LayerShape) -> list[tuple[str, Form | None, int, int]]:
    """Name, form, rows and columns of each matrix of a compressed layer; nothing for any other layer."""
    if shape.compression is None:
        return []
    return [(name, getattr(shape.compression, name), *size) for name, size in matrix_sizes(config).items()]
