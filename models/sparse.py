"""2:4 experts of a loaded model in the form that its GPU multiplies without unpacking them."""

from collections.abc import Iterator

import torch
from torch import nn

from kernels.compressed import Masked
from kernels.sparse import SparseProducts, agrees, select_products
from models.classifier import Classifier, MoELayer
from models.compressed import MATRICES, PACKED, compressed_parameters
from models.config import Bitmask

TWO_OF_FOUR = Bitmask(2, 4)


def use_sparse_products(model: Classifier, products: SparseProducts | None = None) -> None:
    """Replace values and mask of every 2:4 matrix by one packed buffer, where the device has sparse products for it.

    That takes as many bytes (Y X for the values and Y X / 8 for their places, in half precision) and one dense matrix
    while it is packed. The model then answers and is measured as before, but can be neither saved nor trained.
    products: those of the model's device and dtype by default. A model that runs on the reference, any matrix whose
    sides are no multiples of 16, and any whose size the products get wrong is left as it is.
    """
    if model.backend.name == "reference":
        return
    products = products or select_products(model.device, model.dtype)
    if products is None:
        return
    for layer in model.layers:
        if isinstance(layer, MoELayer) and layer.shape.compression is not None:
            for matrix in MATRICES:
                if getattr(layer.shape.compression, matrix) == TWO_OF_FOUR:
                    _pack(layer, matrix, products)


def packed_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters whose values lie in packed buffers: what counts of parameters lack."""
    for prefix, layer in model.named_modules():
        if isinstance(layer, MoELayer) and layer.products is not None:
            here = dict(layer.named_parameters())
            sizes = compressed_parameters(layer.config, layer.shape)
            yield from ((f"{prefix}.{name}", size) for name, size in sizes.items() if name not in here)


@torch.no_grad()
def _pack(layer: MoELayer, matrix: str, products: SparseProducts) -> None:
    stack = getattr(layer.compressed(), matrix)
    if not isinstance(stack, Masked):
        return
    value_PYM, size = stack.value_PYM, (stack.value_PYM.shape[1], stack.width)
    if not products.fits(*size) or not agrees(products, value_PYM.device, value_PYM.dtype, size):
        return
    packed = torch.stack([products.pack(stack.matrix(expert)) for expert in range(layer.shape.num_experts)])
    delattr(layer, f"w_{matrix}_value_PYM")
    delattr(layer, f"w_{matrix}_mask_PYB")
    layer.register_buffer(f"w_{matrix}_{PACKED}", packed)
    layer.products = products
