"""A foreign router's choice under our tables: worked numbers, ids that mean nothing, the kernel against its twin.

Legend: T tokens, K chosen experts per token, E router rows, V variants.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from kernels import reference
from kernels.routing import SKIP, Routing, Survivors

Remap = Callable[..., Routing]
SURVIVORS: tuple[Survivors, ...] = ("keep", "old_sum", "one")


@pytest.fixture(params=["reference", "triton"])
def remap(request: pytest.FixtureRequest) -> Iterator[Remap]:
    """Both in turn; the kernel gets tensors on the GPU if there is one."""
    if request.param == "reference":
        yield reference.remap
        return
    kernel = pytest.importorskip("kernels.route").remap
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield kernel


@pytest.mark.parametrize(
    ("table", "survivors", "slots", "weights"),
    [
        ((0, -1, 1, 2), "keep", [0, -1], [0.5, 0.0]),
        ((0, -1, 1, 2), "old_sum", [0, -1], [0.75, 0.0]),
        ((0, -1, 1, 2), "one", [0, -1], [1.0, 0.0]),
        ((0, -2, 1, 2), "keep", [0, -2], [0.5, 0.25]),
        ((0, 0, 1, 2), "keep", [0, -1], [0.75, 0.0]),
        ((0, 0, 1, 2), "one", [0, -1], [1.0, 0.0]),
        ((-2, -2, 1, 2), "keep", [-2, -1], [0.75, 0.0]),
        ((-1, -1, 1, 2), "old_sum", [-1, -1], [0.0, 0.0]),
        ((-1, -1, 1, 2), "one", [-1, -1], [0.0, 0.0]),
    ],
)
def test_rows_0_and_1_with_weights_a_half_and_a_quarter(
    remap: Remap, table: tuple[int, ...], survivors: Survivors, slots: list[int], weights: list[float]
) -> None:
    routing = remap(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), torch.tensor([table]), survivors)
    assert routing.slot_TK.dtype == torch.int32
    assert routing.weight_TK.dtype == torch.float32
    assert routing.slot_TK.tolist() == [slots]
    assert routing.weight_TK.tolist() == [weights]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_that_the_router_does_not_have_are_skipped(remap: Remap, dtype: torch.dtype) -> None:
    """transformers marks a dropped choice with the number of experts, others with -1; their weights still count."""
    row_TK = torch.tensor([[4, 2], [-1, 1], [2**31 - 1, -(2**31)]], dtype=dtype)
    weight_TK = torch.tensor([[0.5, 0.25]] * 3)
    table_VE = torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    kept = remap(row_TK, weight_TK, table_VE)
    assert kept.slot_TK.tolist() == [[-1, 2], [-1, 1], [-1, -1]]
    assert kept.weight_TK.tolist() == [[0.0, 0.25], [0.0, 0.25], [0.0, 0.0]]
    assert remap(row_TK, weight_TK, table_VE, "old_sum").weight_TK.tolist() == [[0.0, 0.75], [0.0, 0.75], [0.0, 0.0]]


def test_a_repeat_joins_its_first_wherever_it_stands(remap: Remap) -> None:
    table_VE = torch.tensor([[0, 1, 0, 1, 0]], dtype=torch.int32)
    routing = remap(torch.tensor([[3, 0, 1, 2, 4]]), torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), table_VE)
    assert routing.slot_TK.tolist() == [[1, 0, -1, -1, -1]]
    assert routing.weight_TK.tolist() == [[5.0, 26.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("survivors", SURVIVORS)
@pytest.mark.parametrize("top_k", [1, 6, 8, 64])
def test_any_number_of_choices(remap: Remap, top_k: int, survivors: Survivors) -> None:
    """Pruned, tied and constant rows in three variants, more tokens than one program takes."""
    num_tokens = 600 // top_k + 1
    row_TK = torch.randint(-1, 21, (num_tokens, top_k))
    weight_TK = torch.rand(num_tokens, top_k)
    table_VE = torch.randint(-4, 12, (3, 20), dtype=torch.int32)
    for variant_T in (None, torch.randint(0, 3, (num_tokens,), dtype=torch.int32)):
        problem = (row_TK, weight_TK, table_VE, survivors, variant_T)
        ours, twin = remap(*problem), reference.remap(*problem)
        assert torch.equal(ours.slot_TK, twin.slot_TK)
        torch.testing.assert_close(ours.weight_TK, twin.weight_TK, rtol=0, atol=1e-5 if top_k == 64 else 2e-6)
        assert (ours.weight_TK[ours.slot_TK == SKIP] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_dtype_and_rows_with_gaps(remap: Remap, dtype: torch.dtype) -> None:
    """transformers casts gates to the model's dtype."""
    row_TK, weight_TK = torch.randint(0, 9, (13, 7)), torch.rand(13, 7).to(dtype)
    table_VE = torch.randint(-2, 5, (2, 30), dtype=torch.int32)
    for cut in (slice(2, 6), slice(0, 7, 2)):
        problem = (row_TK[:, cut], weight_TK[:, cut], table_VE[:, 3:12])
        ours, twin = remap(*problem), reference.remap(*problem)
        assert torch.equal(ours.slot_TK, twin.slot_TK)
        torch.testing.assert_close(ours.weight_TK, twin.weight_TK, rtol=0, atol=2e-6)


def test_two_runs_give_the_same_bits(remap: Remap) -> None:
    problem = (torch.randint(0, 9, (40, 6)), torch.rand(40, 6), torch.randint(-2, 5, (3, 9)), "old_sum")
    variant_T = torch.randint(0, 3, (40,))
    first, second = remap(*problem, variant_T), remap(*problem, variant_T)
    assert torch.equal(first.slot_TK, second.slot_TK)
    assert torch.equal(first.weight_TK, second.weight_TK)


def test_no_tokens(remap: Remap) -> None:
    routing = remap(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), torch.zeros(1, 4, dtype=torch.int32))
    assert routing.slot_TK.shape == routing.weight_TK.shape == (0, 2)
