"""Where the bytes are: what a model needs by itself, and what a process really holds."""

from collections.abc import Iterable

from torch import nn

PARTS = ("experts", "router", "attention", "embedding", "head", "other")

# Parameter name (last component) -> part; everything else (norms) is "other".
PART_OF = {
    "w_in_PGD": "experts",
    "w_out_PDF": "experts",
    "const_CD": "experts",
    "w_dense_in": "other",
    "w_dense_out": "other",
    "w_shared_in": "other",
    "w_shared_out": "other",
    "w_shared_gate": "other",
    "w_router_ED": "router",
    "w_qkv": "attention",
    "b_qkv": "attention",
    "w_o": "attention",
    "q_norm": "attention",
    "k_norm": "attention",
    "embedding_VD": "embedding",
    "score_CD": "head",
}


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes per part that the model needs when served alone: numel * itemsize, a tied parameter once."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters(remove_duplicate=True):
        sizes[PART_OF.get(name.rsplit(".", 1)[-1], "other")] += parameter.numel() * parameter.element_size()
    return sizes


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resident_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of the distinct storages behind all parameters and buffers: a view keeps its whole storage alive."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())
