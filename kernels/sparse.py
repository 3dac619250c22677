"""2:4 matrices in the form that a GPU's sparse tensor cores multiply: torch's semi-structured tensors (cuSPARSELt).

Legend: R rows given to one expert, Y rows and X columns of a matrix, Z elements of a row as cuSPARSELt keeps it: X / 2
values and, on the GPUs known to us, two bits of place for each, which makes 9/16 X in half precision. Only cuSPARSELt
is used: torch's other library for this, CUTLASS, stops at sm_8x. No GPU was at hand when this was written: whether
products agree is checked on each device for each size before the first use, how fast they are is not known.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

logger = logging.getLogger("secateur.kernels")

# Sparse tensor cores came with Ampere.
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)
# What torch demands of both sides of a half-precision matrix; tokens it pads by itself.
MULTIPLE = 16
# Of the self-test: bfloat16 rounds to 2^-9 of a result, and orders of summation differ.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class SparseProducts:
    """How 2:4 matrices are packed and multiplied.

    pack    [Y, X], at most two of each four neighbours in a row nonzero -> packed, one tensor of the same dtype.
    linear  (x [R, X], packed, (Y, X)) -> x times the matrix, transposed, [R, Y].
    """

    name: str
    pack: Callable[[torch.Tensor], torch.Tensor]
    linear: Callable[[torch.Tensor, torch.Tensor, tuple[int, int]], torch.Tensor]

    def fits(self, height: int, width: int) -> bool:
        return height % MULTIPLE == 0 and width % MULTIPLE == 0


def pack(w_YX: torch.Tensor) -> torch.Tensor:
    """cuSPARSELt's form, values and places in one tensor; whether it is [Y, Z] or flat depends on torch's version."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        packed = SparseSemiStructuredTensorCUSPARSELT.from_dense(w_YX.contiguous()).packed
    assert packed is not None
    return packed


def linear(x_RX: torch.Tensor, packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """One sparse product: [R, X] -> [R, Y]."""
    w_YX = SparseSemiStructuredTensorCUSPARSELT(torch.Size(size), packed_YZ, None, None, None, None)
    return torch.nn.functional.linear(x_RX, w_YX)


CUSPARSELT = SparseProducts("cuSPARSELt", pack, linear)


def select_products(device: torch.device, dtype: torch.dtype) -> SparseProducts | None:
    """Sparse products for matrices of this dtype on the device, or None where it has none. See also `agrees`."""
    if device.type != "cuda" or dtype not in DTYPES or not torch.backends.cusparselt.is_available():
        return None
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return None
    return CUSPARSELT


@cache
def agrees(products: SparseProducts, device: torch.device, dtype: torch.dtype, size: tuple[int, int]) -> bool:
    """Whether packing and multiplying a known matrix of this size gives what the dense product gives.

    The answer is logged once. Five rows are multiplied, which have to be padded. Sides must be such as `fits`.
    """
    height, width = size
    w_YX = _scattered(height, width, device)
    column_X = torch.arange(width, device=device)
    # Pairs (0, 1), (1, 2), (2, 3), (3, 0) of each four, by row.
    start_Y1 = torch.arange(height, device=device)[:, None]
    w_YX = (w_YX * ((column_X - start_Y1) % 4 < 2)).to(dtype)
    x_RX = _scattered(5, width, device).to(dtype)
    expected_RY = x_RX.float() @ w_YX.float().T
    what = f"{height} x {width} in {dtype} on {device}"
    try:
        with torch.no_grad():
            result_RY = products.linear(x_RX, products.pack(w_YX), size).float()
    # torch's sparse classes are young: they say in all these ways that a library, a device or a signature does not fit.
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("no sparse products of %s, these 2:4 experts are unpacked instead: %s", what, error)
        return False
    limit = TOLERANCE * float(expected_RY.norm())
    if result_RY.shape == expected_RY.shape and float((result_RY - expected_RY).norm()) <= limit:
        logger.info("2:4 experts of %s run as sparse products of %s", what, products.name)
        return True
    logger.warning("sparse products of %s are wrong, these 2:4 experts are unpacked instead", what)
    return False


def _scattered(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Numbers in [-1, 1) of which neighbours are unlike, so that a value in another's place shows."""
    number_N = torch.arange(1, height * width + 1, device=device, dtype=torch.float64)
    return (2 * (number_N * 0.7548776662466927).frac() - 1).float().view(height, width)
