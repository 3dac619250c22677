"""The live (token, choice) pairs sorted by expert and cut into tiles: order, offsets and tile map, all made on device.

Legend: T tokens, K choices per token, N = T * K pairs, P physical experts, Q = P + 1, M tiles; EP is P rounded up to a
power of two, B blocks of pairs. Pairs are sorted by the key (slot, index), which is unique, and every entry has one
writer: the result is stable and the same in every run. Nothing is read back: launches depend on shapes alone.
"""

import torch
import triton
import triton.language as tl

from kernels.routing import SortedPairs, max_tiles

# Up to here one program sorts everything; beyond, each program sorts a block and a scan over the blocks' counts joins
# them.
ONE_PROGRAM_PAIRS, ONE_PROGRAM_EXPERTS = 4096, 1024
BLOCK_PAIRS = 1024
# Warps of a program that sorts so many pairs; no other widths exist, so that few kernels need compiling.
WARPS = {64: 1, 256: 4, 1024: 8, 4096: 16}
# Experts counted by one program: 4,096 would keep 128 registers of every thread busy.
COUNT_EXPERTS = 1024
SCAN_BLOCKS, SCAN_EXPERTS = 64, 32

# A sort key: slot in the high bits, index within the block in the low ones.
_INDEX_BITS, _INDEX_MASK = tl.constexpr(16), tl.constexpr(0xFFFF)


def sort_pairs(slot_TK: torch.Tensor, num_experts: int, block_rows: int) -> SortedPairs:
    """As `reference.sort_pairs`: slot_TK int32 [T, K]; what SortedPairs calls undefined is not written.

    One launch for up to 4,096 pairs on up to 1,024 experts, three beyond.
    """
    num_pairs = slot_TK.numel()
    num_tiles = max_tiles(num_pairs, num_experts, block_rows)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=slot_TK.device)

    pairs = SortedPairs(
        order_N=ints(num_pairs),
        offset_Q=ints(num_experts + 1),
        tile_expert_M=ints(num_tiles),
        tile_row_M=ints(num_tiles),
        tile_rows_M=ints(num_tiles),
        num_tiles_1=ints(1),
        block_rows=block_rows,
    )
    if num_pairs == 0:
        pairs.offset_Q.zero_()
        pairs.num_tiles_1.zero_()
        return pairs
    slot_N = slot_TK.reshape(num_pairs)
    outputs = (
        pairs.order_N,
        pairs.offset_Q,
        pairs.tile_expert_M,
        pairs.tile_row_M,
        pairs.tile_rows_M,
        pairs.num_tiles_1,
    )
    padded_experts = triton.next_power_of_2(max(num_experts, 1))
    if num_pairs <= ONE_PROGRAM_PAIRS and num_experts <= ONE_PROGRAM_EXPERTS:
        width = next(width for width in WARPS if num_pairs <= width)
        sort_all_kernel[(1,)](
            slot_N,
            *outputs,
            num_pairs,
            num_experts,
            BLOCK=width,
            EP=padded_experts,
            BM=block_rows,
            num_warps=WARPS[width],
        )
        return pairs

    num_blocks = triton.cdiv(num_pairs, BLOCK_PAIRS)
    count_BE, before_BE, total_E = (
        ints(num_blocks, padded_experts),
        ints(num_blocks, padded_experts),
        ints(padded_experts),
    )
    bins = min(padded_experts, COUNT_EXPERTS)
    count_blocks_kernel[(num_blocks, padded_experts // bins)](
        slot_N, count_BE, num_pairs, BLOCK=BLOCK_PAIRS, EP=padded_experts, BINS=bins, num_warps=WARPS[BLOCK_PAIRS]
    )
    width = min(padded_experts, SCAN_EXPERTS)
    scan_blocks_kernel[(padded_experts // width,)](
        count_BE, before_BE, total_E, num_blocks, BLOCKS=SCAN_BLOCKS, WIDTH=width, EP=padded_experts, num_warps=4
    )
    sort_blocks_kernel[(num_blocks,)](
        slot_N,
        count_BE,
        before_BE,
        total_E,
        *outputs,
        num_pairs,
        num_experts,
        BLOCK=BLOCK_PAIRS,
        EP=padded_experts,
        BM=block_rows,
        num_warps=WARPS[BLOCK_PAIRS],
    )
    return pairs


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def sort_all_kernel(
    slot_N,
    order_N,
    offset_Q,
    tile_expert_M,
    tile_row_M,
    tile_rows_M,
    num_tiles_1,
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
):
    slot = _read_slots(slot_N, 0, num_pairs, BLOCK)
    expert, index = _sort(slot, BLOCK, EP)
    count = tl.histogram(slot, EP, mask=slot >= 0)
    position = tl.arange(0, BLOCK)
    _write_pairs(order_N, tile_expert_M, tile_row_M, tile_rows_M, expert, index, position, count, EP, BM)
    _write_totals(offset_Q, num_tiles_1, count, num_experts, EP, BM)


@triton.jit(do_not_specialize=["num_pairs"])
def count_blocks_kernel(slot_N, count_BE, num_pairs, BLOCK: tl.constexpr, EP: tl.constexpr, BINS: tl.constexpr):
    block, first_bin = tl.program_id(0), tl.program_id(1) * BINS
    bin_ = _read_slots(slot_N, block * BLOCK, num_pairs, BLOCK) - first_bin
    count = tl.histogram(bin_, BINS, mask=(bin_ >= 0) & (bin_ < BINS))
    tl.store(count_BE + block.to(tl.int64) * EP + first_bin + tl.arange(0, BINS), count)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_blocks_kernel(
    count_BE, before_BE, total_E, num_blocks, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, EP: tl.constexpr
):
    """before_BE: how many pairs of each expert stand in the blocks before; total_E: in all blocks."""
    expert = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        exists = (block < num_blocks)[:, None]
        at = block.to(tl.int64)[:, None] * EP + expert[None, :]
        count = tl.load(count_BE + at, mask=exists, other=0)
        tl.store(before_BE + at, tl.cumsum(count, axis=0) - count + total[None, :], mask=exists)
        total += tl.sum(count, axis=0)
    tl.store(total_E + expert, total)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def sort_blocks_kernel(
    slot_N,
    count_BE,
    before_BE,
    total_E,
    order_N,
    offset_Q,
    tile_expert_M,
    tile_row_M,
    tile_rows_M,
    num_tiles_1,
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
):
    block = tl.program_id(0)
    bins = tl.arange(0, EP)
    expert, index = _sort(_read_slots(slot_N, block * BLOCK, num_pairs, BLOCK), BLOCK, EP)
    total = tl.load(total_E + bins)
    count = tl.load(count_BE + block.to(tl.int64) * EP + bins)
    before = tl.load(before_BE + block.to(tl.int64) * EP + bins)
    # From the position within the sorted block to the position among all sorted pairs, for each expert.
    shift = _starts(total) + before - _starts(count)
    position = tl.arange(0, BLOCK) + tl.gather(shift, tl.minimum(expert, EP - 1), 0)
    pair = block * BLOCK + index
    _write_pairs(order_N, tile_expert_M, tile_row_M, tile_rows_M, expert, pair, position, total, EP, BM)
    if block == 0:
        _write_totals(offset_Q, num_tiles_1, total, num_experts, EP, BM)


@triton.jit
def _read_slots(slot_N, first, num_pairs, BLOCK: tl.constexpr):
    pair = first + tl.arange(0, BLOCK)
    return tl.load(slot_N + pair, mask=pair < num_pairs, other=-1)


@triton.jit
def _sort(slot, BLOCK: tl.constexpr, EP: tl.constexpr):
    """The experts of a block's pairs in sorted order, EP for the dead, which come last; and the pairs' indices."""
    key = (tl.where(slot < 0, EP, slot) << _INDEX_BITS) | tl.arange(0, BLOCK)
    key = tl.sort(key)
    return key >> _INDEX_BITS, key & _INDEX_MASK


@triton.jit
def _starts(count):
    return tl.cumsum(count, axis=0) - count


@triton.jit
def _write_pairs(
    order_N,
    tile_expert_M,
    tile_row_M,
    tile_rows_M,
    expert,
    pair,
    position,
    count,
    EP: tl.constexpr,
    BM: tl.constexpr,
):
    """Write each pair at its position; every BM-th of an expert is the head of a tile and writes that, too.

    So a tile is written once, by the one pair that knows it, and nobody searches for the expert of a tile.
    """
    live = expert < EP
    tl.store(order_N + position, pair, mask=live)
    expert = tl.minimum(expert, EP - 1)
    rank = position - tl.gather(_starts(count), expert, 0)
    tile = tl.gather(_starts(tl.cdiv(count, BM)), expert, 0) + rank // BM
    head = live & (rank % BM == 0)
    tl.store(tile_expert_M + tile, expert, mask=head)
    tl.store(tile_row_M + tile, position, mask=head)
    tl.store(tile_rows_M + tile, tl.minimum(tl.gather(count, expert, 0) - rank, BM), mask=head)


@triton.jit
def _write_totals(offset_Q, num_tiles_1, count, num_experts, EP: tl.constexpr, BM: tl.constexpr):
    expert = tl.arange(0, EP)
    tl.store(offset_Q, 0)
    tl.store(offset_Q + 1 + expert, tl.cumsum(count, axis=0), mask=expert < num_experts)
    tl.store(num_tiles_1, tl.sum(tl.cdiv(count, BM), axis=0))
