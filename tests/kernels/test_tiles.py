"""The choice of tiles: the examples it was designed on, and that every choice can run on its device."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.tiles import ARCHITECTURES, TABLES, Device, Layer, choose, variants

H100 = Device("hopper", 232_448, 132)
A100 = Device("ampere", 166_912, 108)
L4 = Device("ampere", 101_376, 58)
B200 = Device("blackwell", 232_448, 148)
OLMOE = Layer(1, 8, 64, width=2048, inner=1024, gated=True, itemsize=2)
QWEN3 = Layer(1, 8, 128, width=2048, inner=768, gated=True, itemsize=2)
V_MOE = Layer(1, 2, 8, width=768, inner=3072, gated=False, itemsize=2)


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (replace(OLMOE, num_tokens=16), 16),  # 2 pairs per expert
        (replace(OLMOE, num_tokens=16, num_experts=32), 16),  # 4
        (replace(QWEN3, num_tokens=256), 32),  # 16
        (replace(QWEN3, num_tokens=1024, num_experts=64), 64),  # 128
        (replace(QWEN3, num_tokens=1024, num_experts=64, kept_share=0.1), 32),  # 12.8 of 128 survive
        (replace(OLMOE, num_tokens=4096), 128),  # 512
    ],
)
def test_rows_follow_live_pairs_per_surviving_expert(layer: Layer, rows: int) -> None:
    chosen = choose(layer, H100)
    assert chosen is not None
    assert chosen.gate_up.rows == chosen.down.rows == rows


@pytest.mark.parametrize(
    ("layer", "is_pair_path"),
    [
        (OLMOE, True),
        (V_MOE, True),  # one token always
        (replace(OLMOE, num_tokens=2), True),  # 4 * 16 pairs <= 64 experts
        (replace(OLMOE, num_tokens=3), False),
        (replace(OLMOE, num_tokens=2, num_experts=63), False),
    ],
)
def test_a_handful_of_pairs_skips_the_sort(layer: Layer, is_pair_path: bool) -> None:
    assert (choose(layer, H100) is None) == is_pair_path


def test_products_too_small_for_the_card_get_narrower_tiles() -> None:
    chosen = choose(replace(V_MOE, num_tokens=256), H100)  # 64 rows each: 8 tiles, 6 blocks of 128 columns
    assert chosen is not None
    assert chosen.gate_up.columns == 64
    assert chosen.down.columns == 64
    wide = choose(replace(V_MOE, num_tokens=256, width=4096), H100)
    assert wide is not None
    assert wide.down.columns == 128


def test_the_copy_engine_is_used_only_where_it_reads_whole_tiles() -> None:
    whole = choose(replace(OLMOE, num_tokens=4096), H100)
    assert whole is not None
    assert whole.gate_up.tma
    for odd in (replace(OLMOE, num_tokens=4096, width=2000), replace(OLMOE, num_tokens=4096, inner=1000)):
        chosen = choose(odd, H100)
        assert chosen is not None
        assert not chosen.gate_up.tma
        assert not chosen.down.tma


def test_a_width_that_a_deep_tile_does_not_divide_gets_a_shallower_one_of_the_same_height() -> None:
    chosen = choose(replace(OLMOE, num_tokens=16, width=2880, inner=2880), H100)
    assert chosen is not None
    assert (chosen.gate_up.rows, chosen.gate_up.depth, chosen.down.depth) == (16, 64, 64)


def test_one_configuration_for_every_batch_on_request() -> None:
    sizes = [1, 2, 16, 300, 5000, 40_000]
    assert len({choose(replace(OLMOE, num_tokens=size), H100, batch_invariant=True) for size in sizes}) == 1
    assert choose(OLMOE, H100, batch_invariant=True) is not None


@given(
    device=st.sampled_from([H100, A100, L4, B200]),
    layer=st.builds(
        Layer,
        num_tokens=st.integers(1, 100_000),
        top_k=st.integers(1, 8),
        num_experts=st.integers(1, 4096),
        width=st.integers(1, 8192),
        inner=st.integers(1, 16_384),
        gated=st.booleans(),
        itemsize=st.sampled_from([2, 4]),
        kept_share=st.floats(0.01, 1),
    ),
)
def test_every_choice_fits_its_device_and_is_compiled_ahead(device: Device, layer: Layer) -> None:
    chosen = choose(layer, device)
    if chosen is None:
        return
    assert chosen in set(variants(device.architecture, layer.itemsize))
    assert chosen.gate_up.rows == chosen.down.rows
    assert chosen.gate_up.shared_bytes(layer.itemsize, 1 + layer.gated) <= device.shared_bytes
    assert chosen.down.shared_bytes(layer.itemsize, 1) <= device.shared_bytes


def test_tables_cover_everything_and_say_where_they_come_from() -> None:
    assert set(ARCHITECTURES.values()) == set(TABLES)
    for by_size in TABLES.values():
        for bands in by_size.values():
            assert bands[-1].below == inf
            assert [band.below for band in bands] == sorted(band.below for band in bands)
            for band in bands:
                assert band.source
                assert band.tiles.gate_up.rows == band.tiles.down.rows
