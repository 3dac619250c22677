"""2:4 matrices that stay packed: which device gets them, the same answers as unpacked ones, and their bytes.

The products of a real GPU run in the tests marked CUDA only.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from kernels import sparse
from kernels.compressed import CompressedExperts, Masked, Sparse, Stack, moe_ffn
from kernels.sparse import CUSPARSELT, SparseProducts, agrees, select_products
from tests.kernels.fake_sparse import FAKE, unpack
from tests.kernels.test_compressed import BOUNDS, compress, stack
from tests.kernels.test_moe_ffn import Shape, added, error, oracle, random_routing, weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = {
    "plain": Shape(24, 2, 8, 64, 32),
    "one token": Shape(1, 2, 4, 64, 32),
    "experts without rows": Shape(3, 2, 20, 32, 16),
    "a residual and a shared expert": Shape(24, 4, 6, 48, 32, residual=True, shared=True),
    "no gate, biases": Shape(24, 3, 5, 32, 48, activation="gelu_tanh", gated=False, biases=True),
}
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.backends.cusparselt.is_available(),
    reason="needs a CUDA device and a torch with cuSPARSELt",
)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    agrees.cache_clear()
    yield
    agrees.cache_clear()


def packed(masked: Stack | None, products: SparseProducts) -> Stack | None:
    if masked is None:
        return None
    assert isinstance(masked, Masked)
    matrices = [masked.matrix(expert) for expert in range(len(masked.value_PYM))]
    size = cast(tuple[int, int], tuple(matrices[0].shape))
    return Sparse(torch.stack([products.pack(w_YX) for w_YX in matrices]), size, products)


def both_forms(experts: CompressedExperts, products: SparseProducts) -> CompressedExperts:
    up, down = packed(experts.up, products), packed(experts.down, products)
    assert up is not None
    assert down is not None
    return replace(experts, gate=packed(experts.gate, products), up=up, down=down)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), has_library: bool = True) -> None:
    """A machine whose GPU says so much of itself; no tensor may go there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: has_library)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "has_library", "expected"),
    [
        (CUDA, torch.bfloat16, (9, 0), True, CUSPARSELT),
        (CUDA, torch.float16, (8, 0), True, CUSPARSELT),
        (CUDA, torch.float32, (9, 0), True, None),
        (CUDA, torch.bfloat16, (7, 5), True, None),
        (CUDA, torch.bfloat16, (9, 0), False, None),
        (CPU, torch.bfloat16, (9, 0), True, None),
    ],
)
def test_only_half_precision_on_an_ampere_or_newer_with_the_library(
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    has_library: bool,
    expected: SparseProducts | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(monkeypatch, capability, has_library)
    assert select_products(device, dtype) is expected


@pytest.mark.parametrize(
    ("height", "width", "fits"), [(16, 16, True), (208, 128, True), (24, 32, False), (32, 8, False)]
)
def test_sides_are_multiples_of_16(height: int, width: int, fits: bool) -> None:
    assert CUSPARSELT.fits(height, width) is fits


@pytest.mark.parametrize("dtype", sparse.DTYPES, ids=str)
def test_the_self_test_passes_what_is_right_and_says_so_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "secateur.kernels"):
        for size in ((16, 16), (208, 128), (16, 16)):
            assert agrees(FAKE, CPU, dtype, size)
    assert [record.message for record in caplog.records] == [
        f"2:4 experts of {size} in {dtype} on cpu run as sparse products of fake" for size in ("16 x 16", "208 x 128")
    ]


def _fails(*_: Any) -> torch.Tensor:
    raise RuntimeError("cuSPARSELt error 10")


def _shifted(x_RX: torch.Tensor, packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return FAKE.linear(x_RX, packed_YZ, size).roll(1, dims=1)


def _misplaced(x_RX: torch.Tensor, packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Each value two columns further, within its four."""
    four = torch.unflatten(unpack(packed_YZ, size), 1, (-1, 4))
    return torch.nn.functional.linear(x_RX, four.roll(2, dims=-1).flatten(1))


def _nothing(x_RX: torch.Tensor, packed_YZ: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return FAKE.linear(x_RX, packed_YZ, size) * torch.nan


@pytest.mark.parametrize(
    ("products", "message"),
    [
        (replace(FAKE, pack=_fails), "unpacked instead: cuSPARSELt error 10"),
        (replace(FAKE, linear=_fails), "unpacked instead: cuSPARSELt error 10"),
        (replace(FAKE, linear=_shifted), "are wrong"),
        (replace(FAKE, linear=_misplaced), "are wrong"),
        (replace(FAKE, linear=_nothing), "are wrong"),
    ],
)
def test_the_self_test_fails_what_raises_or_is_wrong(
    products: SparseProducts, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not agrees(products, CPU, torch.float16, (32, 64))
    assert message in caplog.text


def test_torchs_own_form_is_refused_on_a_cpu_and_the_self_test_survives_it() -> None:
    assert not agrees(CUSPARSELT, CPU, torch.bfloat16, (32, 64))


@pytest.mark.parametrize("dtype", sparse.DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_those_of_the_dense_experts(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(len(name))
    shape = SHAPES[name]
    masked, dense = compress(weights(shape, dtype), "2:4")
    experts = both_forms(masked, FAKE)
    x_TD, routing = torch.randn(shape.tokens, shape.width).to(dtype), random_routing(shape)
    residual_TD, shared_TD = added(shape, dtype)
    out_TD = moe_ffn(x_TD, routing, experts, residual_TD, shared_TD)
    assert out_TD.dtype == dtype
    assert error(out_TD, oracle(x_TD, routing, dense, residual_TD, shared_TD)) < BOUNDS[torch.bfloat16]
    assert torch.equal(experts.dense().w_in_PGD.double(), dense.w_in_PGD)
    assert torch.equal(experts.dense().w_out_PDF.double(), dense.w_out_PDF)


def test_fewer_than_two_of_four_by_hand() -> None:
    """A kept value may be 0 itself: its place is lost, and nothing else."""
    w_YX = torch.zeros(1, 16, dtype=torch.float16)
    w_YX[0, 3], w_YX[0, 5], w_YX[0, 6] = 1.0, 2.0, 3.0
    found = FAKE.pack(w_YX)
    assert found.shape == (1, 9)
    assert found[0, :4].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert torch.equal(unpack(found, (1, 16)), w_YX)


def on_cuda(masked: Stack) -> Masked:
    assert isinstance(masked, Masked)
    return Masked(masked.value_PYM.cuda(), masked.mask_PYB.cuda(), masked.width)


@needs_cuda
@pytest.mark.parametrize("dtype", sparse.DTYPES, ids=str)
@pytest.mark.parametrize("size", [(16, 16), (208, 128), (128, 208), (3072, 768)])
def test_cuda_has_products_that_agree(size: tuple[int, int], dtype: torch.dtype) -> None:
    assert select_products(CUDA, dtype) is CUSPARSELT
    assert agrees(CUSPARSELT, CUDA, dtype, size)


@needs_cuda
@pytest.mark.parametrize("dtype", sparse.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 8, 300])
@pytest.mark.parametrize("size", [(16, 16), (208, 128), (128, 208), (768, 512)])
def test_cuda_multiplies_what_the_mask_says(size: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    form, dense = stack(torch.randn(2, *size).to(dtype), "2:4")
    found = packed(on_cuda(form), CUSPARSELT)
    assert isinstance(found, Sparse)
    x_RX = torch.randn(rows, size[1]).to(dtype)
    for expert in range(2):
        with torch.inference_mode():
            result = found.product(x_RX.cuda(), expert)
        assert result.shape == (rows, size[0])
        assert error(result.cpu(), x_RX.double() @ dense[expert].T) < 6e-3
        assert torch.equal(found.matrix(expert).double().cpu(), dense[expert])


@needs_cuda
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_runs_a_layer_and_holds_9_of_16_bytes(name: str) -> None:
    torch.manual_seed(len(name))
    shape = SHAPES[name]
    masked, dense = compress(weights(shape, torch.bfloat16), "2:4")
    held = [None if part is None else on_cuda(part) for part in (masked.gate, masked.up, masked.down)]
    assert held[1] is not None
    assert held[2] is not None
    biases = [None if b is None else b.cuda() for b in (masked.b_in_PG, masked.b_out_PD)]
    experts = both_forms(
        replace(masked, gate=held[0], up=held[1], down=held[2], b_in_PG=biases[0], b_out_PD=biases[1]), CUSPARSELT
    )
    for part in (experts.up, experts.down):
        assert isinstance(part, Sparse)
        assert part.packed_PYZ.untyped_storage().nbytes() == shape.experts * part.size[0] * part.size[1] * 2 * 9 // 16
    x_TD, routing = torch.randn(shape.tokens, shape.width).bfloat16(), random_routing(shape)
    moved = replace(routing, slot_TK=routing.slot_TK.cuda(), weight_TK=routing.weight_TK.cuda())
    residual_TD, shared_TD = added(shape, torch.bfloat16)
    with torch.inference_mode():
        out_TD = moe_ffn(
            x_TD.cuda(),
            moved,
            experts,
            None if residual_TD is None else residual_TD.cuda(),
            None if shared_TD is None else shared_TD.cuda(),
        )
    assert error(out_TD.cpu(), oracle(x_TD, routing, dense, residual_TD, shared_TD)) < BOUNDS[torch.bfloat16]
