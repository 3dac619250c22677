"""Where the bytes are: what a model needs by itself, and what a process really holds."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from models.compressed import NAMES, PACKED_NAMES
from models.sparse import packed_parameters

PARTS = ("experts", "router", "attention", "embedding", "head", "other")

# Parameter name (last component) -> part; everything else (norms) is "other".
PART_OF = {
    "w_in_PGD": "experts",
    "w_out_PDF": "experts",
    **dict.fromkeys((*NAMES, *PACKED_NAMES), "experts"),
    "const_CD": "experts",
    "b_in_PG": "experts",
    "b_out_PD": "experts",
    "w_dense_in": "other",
    "w_dense_out": "other",
    "b_dense_in": "other",
    "b_dense_out": "other",
    "w_shared_in": "other",
    "w_shared_out": "other",
    "w_shared_gate": "other",
    "w_router_ED": "router",
    "w_qkv": "attention",
    "b_qkv": "attention",
    "w_o": "attention",
    "b_o": "attention",
    "q_norm": "attention",
    "k_norm": "attention",
    "embedding_VD": "embedding",
    "w_patch": "embedding",
    "b_patch_D": "embedding",
    "class_1D": "embedding",
    "position_LD": "embedding",
    "score_CD": "head",
    "b_score_C": "head",
}


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes per part that the model needs when served alone: numel * itemsize, a tied parameter once."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in (*model.named_parameters(remove_duplicate=True), *_stored_buffers(model)):
        sizes[PART_OF.get(name.rsplit(".", 1)[-1], "other")] += tensor.numel() * tensor.element_size()
    return sizes


def stored_bytes(model: nn.Module, itemsize: int) -> int:
    """Bytes of the weights in a file that takes `itemsize` for each parameter; masks and indices have their own."""
    return num_parameters(model) * itemsize + sum(b.numel() * b.element_size() for _, b in _stored_buffers(model))


def _stored_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Buffers that belong to the weights, and are not derived from them."""
    return [(name, buffer) for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] in PART_OF]


def num_parameters(model: nn.Module) -> int:
    """Values that can be trained, those in packed buffers too."""
    packed = sum(math.prod(size) for _, size in packed_parameters(model))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def held_bytes(model: nn.Module) -> int:
    """Bytes of the distinct storages behind the weights: what they hold in memory, whatever they show.

    Equal to the sum of `weight_bytes` unless a weight is a view of something larger, which then cannot be freed.
    """
    weights = (*model.parameters(), *(buffer for _, buffer in _stored_buffers(model)))
    return sum(_storages(weights).values())


def resident_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of the distinct storages behind all parameters and buffers: a view keeps its whole storage alive."""
    return sum(_storages(tensor for model in models for tensor in (*model.parameters(), *model.buffers())).values())


def _storages(tensors: Iterable[torch.Tensor]) -> dict[tuple[torch.device, int], int]:
    """Bytes by where a storage lies."""
    storages = ((tensor.device, tensor.untyped_storage()) for tensor in tensors)
    return {(device, storage.data_ptr()): storage.nbytes() for device, storage in storages}
