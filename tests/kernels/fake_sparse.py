"""What cuSPARSELt does, on any device: values and two bits of place for each in one tensor, 9/16 of the dense one."""

import torch

from kernels.compressed import pack_bits, unpack_bits
from kernels.sparse import SparseProducts


def pack(w_YX: torch.Tensor) -> torch.Tensor:
    """[Y, X] -> [Y, 9 X / 16]. Raises ValueError unless each four neighbours hold at most two values."""
    four = torch.unflatten(w_YX, 1, (-1, 4))
    if bool(((four != 0).sum(-1) > 2).any()):
        raise ValueError("more than two of four")
    first_two = torch.argsort((four != 0).to(torch.int8), dim=-1, descending=True, stable=True)[..., :2]
    kept_YX = torch.zeros_like(four, dtype=torch.bool).scatter_(-1, first_two, True).flatten(1)
    return torch.cat((w_YX[kept_YX].view(len(w_YX), -1), pack_bits(kept_YX).view(w_YX.dtype)), dim=1)


def unpack(packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    half = size[1] // 2
    kept_YX = unpack_bits(packed_YZ[:, half:].contiguous().view(torch.uint8), size[1])
    return packed_YZ.new_zeros(size).masked_scatter(kept_YX, packed_YZ[:, :half])


def linear(x_RX: torch.Tensor, packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    assert x_RX.dtype == packed_YZ.dtype  # as cuSPARSELt demands
    return torch.nn.functional.linear(x_RX, unpack(packed_YZ, size))


FAKE = SparseProducts("fake", pack, linear)
