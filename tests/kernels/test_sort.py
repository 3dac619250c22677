"""Sorted pairs and their tiles: the worked example, invariants, both paths against the twin and each other.

Legend: T tokens, K choices per token, N = T * K pairs, P physical experts, M tiles. Triton's interpreter sorts slowly
(1,024 pairs in 1.5 s), so the path of three launches is tried with blocks of 64 pairs and small steps of its scan.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.routing import SKIP, SortedPairs, max_tiles

sort = pytest.importorskip("kernels.sort")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNWRITTEN = torch.iinfo(torch.int32).min
SortPairs = Callable[[torch.Tensor, int, int], SortedPairs]
TILES = ("tile_expert_M", "tile_row_M", "tile_rows_M")


def use_three_launches(patch: pytest.MonkeyPatch) -> None:
    """Beyond 64 pairs several blocks, beyond 128 several rounds of the scan, beyond 16 experts several histograms."""
    for name, value in {
        "ONE_PROGRAM_PAIRS": 0,
        "BLOCK_PAIRS": 64,
        "COUNT_EXPERTS": 16,
        "SCAN_BLOCKS": 2,
        "SCAN_EXPERTS": 4,
    }.items():
        patch.setattr(sort, name, value)


@pytest.fixture(params=["reference", "one program", "three launches"])
def sort_pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SortPairs:
    if request.param == "reference":
        return reference.sort_pairs
    if request.param == "three launches":
        use_three_launches(monkeypatch)
    return on_device


def on_device(slot_TK: torch.Tensor, num_experts: int, block_rows: int) -> SortedPairs:
    """From and to the CPU, wherever kernels run."""
    pairs = sort.sort_pairs(slot_TK.to(DEVICE), num_experts, block_rows)
    tensors = {name: value.cpu() for name, value in vars(pairs).items() if isinstance(value, torch.Tensor)}
    return SortedPairs(**tensors, block_rows=pairs.block_rows)


def slots(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(-1, 1)


def random_slots(tokens: int, top_k: int, experts: int, first: int = -3) -> torch.Tensor:
    """A share of dead pairs and constants if `first` is negative."""
    return torch.randint(first, experts, (tokens, top_k), dtype=torch.int32)


def skewed_slots() -> torch.Tensor:
    """Four of five pairs want expert 3 of 8."""
    slot_TK = random_slots(75, 2, 8)
    slot_TK[torch.rand(slot_TK.shape) < 0.8] = 3
    return slot_TK


PROBLEMS: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
    "one pair": (lambda: slots(0), 1),
    "one dead pair": (lambda: slots(SKIP), 1),
    "one expert, some dead": (lambda: slots(*[0, SKIP, 0] * 30), 1),
    "everything dead": (lambda: slots(*[SKIP, -2, -7] * 30), 5),
    "no experts at all": (lambda: slots(SKIP, -2), 0),
    "all on the last expert": (lambda: slots(*[4] * 70), 5),
    "most experts without a pair": (lambda: random_slots(6, 2, 60), 60),
    "exactly one block": (lambda: random_slots(32, 2, 4, 0), 4),
    "one more than a block": (lambda: random_slots(65, 1, 4, 0), 4),
    "no power of two anywhere": (lambda: random_slots(29, 7, 37), 37),
    "a power of two of experts": (lambda: random_slots(100, 2, 64), 64),
    "skew": (skewed_slots, 8),
    "falling slots": (lambda: slots(*reversed(range(90))), 90),
}


def live(pairs: SortedPairs) -> list[int]:
    return pairs.order_N[: int(pairs.offset_Q[-1])].tolist()


def tiles(pairs: SortedPairs) -> list[tuple[int, int, int]]:
    """(expert, first row, rows) of each defined tile."""
    count = int(pairs.num_tiles_1)
    columns = [getattr(pairs, name)[:count].tolist() for name in TILES]
    return list(zip(*columns, strict=True))


def assert_same(ours: SortedPairs, twin: SortedPairs) -> None:
    assert ours.block_rows == twin.block_rows
    assert ours.offset_Q.tolist() == twin.offset_Q.tolist()
    assert live(ours) == live(twin)
    assert tiles(ours) == tiles(twin)
    for name, tensor in vars(twin).items():
        if isinstance(tensor, torch.Tensor):
            assert getattr(ours, name).shape == tensor.shape, name
            assert getattr(ours, name).dtype == tensor.dtype == torch.int32, name


def test_the_worked_example(sort_pairs: SortPairs) -> None:
    """Eight pairs on three experts in tiles of two: counts 2, 1, 3, and two pairs that run nothing."""
    pairs = sort_pairs(torch.tensor([[2, 0], [-1, 2], [0, 1], [2, -1]], dtype=torch.int32), 3, 2)
    assert live(pairs) == [1, 4, 5, 0, 3, 6]
    assert pairs.offset_Q.tolist() == [0, 2, 3, 6]
    assert tiles(pairs) == [(0, 0, 2), (1, 2, 1), (2, 3, 2), (2, 5, 1)]
    assert pairs.tile_expert_M.shape == (max_tiles(8, 3, 2),) == (5,)


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernels_equal_their_twin(sort_pairs: SortPairs, name: str, block_rows: int) -> None:
    make, num_experts = PROBLEMS[name]
    slot_TK = make()
    assert_same(sort_pairs(slot_TK, num_experts, block_rows), reference.sort_pairs(slot_TK, num_experts, block_rows))


@pytest.mark.parametrize("name", PROBLEMS)
def test_tiles_cover_each_live_row_once(sort_pairs: SortPairs, name: str) -> None:
    make, num_experts = PROBLEMS[name]
    slot_TK = make()
    pairs = sort_pairs(slot_TK, num_experts, 4)
    slot_of_pair = slot_TK.flatten().tolist()
    assert sorted(live(pairs)) == [pair for pair, slot in enumerate(slot_of_pair) if slot >= 0]
    covered: list[int] = []
    for expert, first, rows in tiles(pairs):
        assert 1 <= rows <= 4
        assert {slot_of_pair[pair] for pair in live(pairs)[first : first + rows]} == {expert}
        covered += range(first, first + rows)
    assert sorted(covered) == list(range(len(live(pairs))))


def test_pairs_of_one_expert_keep_their_order(sort_pairs: SortPairs) -> None:
    slot_TK = random_slots(70, 2, 3)
    pairs = sort_pairs(slot_TK, 3, 16)
    offsets = pairs.offset_Q.tolist()
    for first, end in pairwise(offsets):
        segment = live(pairs)[first:end]
        assert segment == sorted(segment)


def test_no_pairs(sort_pairs: SortPairs) -> None:
    pairs = sort_pairs(torch.empty(0, 2, dtype=torch.int32), 3, 16)
    assert pairs.offset_Q.tolist() == [0, 0, 0, 0]
    assert pairs.num_tiles_1.tolist() == [0]
    assert pairs.order_N.shape == pairs.tile_expert_M.shape == pairs.tile_row_M.shape == pairs.tile_rows_M.shape == (0,)


@pytest.mark.parametrize("sort_pairs", ["one program", "three launches"], indirect=True)
def test_what_is_undefined_is_not_written(sort_pairs: SortPairs) -> None:
    """A later kernel that reads it meets poison, not convenient zeros."""
    pairs = sort_pairs(random_slots(100, 2, 7), 7, 4)
    unused = [pairs.order_N[len(live(pairs)) :], *(getattr(pairs, name)[len(tiles(pairs)) :] for name in TILES)]
    assert all(len(tensor) > 0 and (tensor == UNWRITTEN).all() for tensor in unused)


def test_slots_with_gaps_between_rows(sort_pairs: SortPairs) -> None:
    wide = random_slots(40, 5, 9)
    assert_same(sort_pairs(wide[:, 1:3], 9, 8), reference.sort_pairs(wide[:, 1:3].contiguous(), 9, 8))


@pytest.mark.parametrize("num_pairs", [200, 600])
def test_one_program_at_its_real_widths(num_pairs: int) -> None:
    slot_TK = random_slots(num_pairs, 1, 37)
    assert_same(on_device(slot_TK, 37, 16), reference.sort_pairs(slot_TK, 37, 16))


def test_three_launches_at_their_real_widths() -> None:
    """1,030 pairs are two blocks, and 1,100 experts are more than one program may sort or count."""
    slot_TK = random_slots(1030, 1, 1100)
    assert_same(on_device(slot_TK, 1100, 16), reference.sort_pairs(slot_TK, 1100, 16))


def test_two_runs_give_the_same_bits(sort_pairs: SortPairs) -> None:
    slot_TK = skewed_slots()
    first, second = sort_pairs(slot_TK, 8, 16), sort_pairs(slot_TK, 8, 16)
    for name, tensor in vars(first).items():
        assert name == "block_rows" or torch.equal(tensor, getattr(second, name)), name


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_problem_sorts_the_same_on_both_paths(seed: int, data: st.DataObject) -> None:
    tokens, top_k, experts = (
        data.draw(st.integers(1, high), label) for label, high in (("T", 40), ("K", 4), ("P", 40))
    )
    block_rows = data.draw(st.sampled_from([1, 2, 16, 64]), "BM")
    generator = torch.Generator().manual_seed(seed)
    slot_TK = torch.randint(-2, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    twin = reference.sort_pairs(slot_TK, experts, block_rows)
    assert_same(on_device(slot_TK, experts, block_rows), twin)
    with pytest.MonkeyPatch.context() as patch:
        use_three_launches(patch)
        assert_same(on_device(slot_TK, experts, block_rows), twin)
