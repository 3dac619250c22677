"""Which tiles a product uses: a function of host-known numbers over static tables, so nothing is tuned while serving.

Bands go by live pairs per physical expert, as expected from T, K, P and the kept share. Few rows per expert mean that
weights stream through once and the tile's height only costs padding; many rows mean arithmetic, which wants wide tiles.
Each band says where it comes from. None has been swept on a GPU yet: edges are estimates from padding and roofline
arithmetic, tiles are those that compile without spills and use the tensor cores (docs/kernels.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf

# Duplicate weight reads stay under 13 % while pairs are at most a quarter of the experts, and sorting costs more.
PAIRS_PER_EXPERT = 4
# WGMMA and tcgen05 take 64 weight rows at a time under `swap`; a narrower tile falls back to older instructions.
MIN_COLUMNS = 64


@dataclass(frozen=True)
class Tile:
    """BM sorted rows times BN weight rows, BK deep. `swap` computes W @ x^T, which keeps the fast tensor-core
    instructions at small BM. `tma` reads weights (and the down product's rows) through the bulk copy engine."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    tma: bool = False

    def shared_bytes(self, itemsize: int, matrices: int) -> int:
        """Shared memory of the pipeline's buffers: one tile of rows and `matrices` tiles of weights per stage."""
        return self.stages * self.depth * (self.rows + matrices * self.columns) * itemsize


@dataclass(frozen=True)
class GroupedTiles:
    """Both products of a layer walk one tile map, so both tiles have the same number of rows.

    group: tiles of one expert that run side by side and find its weights in the L2 cache.
    """

    gate_up: Tile
    down: Tile
    group: int = 1


@dataclass(frozen=True)
class Band:
    """The tiles for fewer than `below` live pairs per expert, and where that comes from."""

    below: float
    tiles: GroupedTiles
    source: str


@dataclass(frozen=True)
class PairTile:
    """The path without tiles: each program multiplies one row by `columns` weight rows, `depth` values at a time."""

    columns: int
    depth: int
    warps: int


@dataclass(frozen=True)
class Device:
    """What the choice depends on. shared_bytes: the opt-in shared memory of one block."""

    architecture: str
    shared_bytes: int
    num_multiprocessors: int


COMPILED = "compiles for this architecture without spills; edge estimated from padding, not swept"

AMPERE_16 = (
    Band(24, GroupedTiles(Tile(16, 64, 64, 4, 4), Tile(16, 128, 64, 4, 4)), COMPILED),
    Band(80, GroupedTiles(Tile(32, 64, 64, 4, 4), Tile(32, 128, 64, 4, 4)), COMPILED),
    Band(160, GroupedTiles(Tile(64, 128, 64, 8, 3), Tile(64, 128, 64, 8, 3), group=4), COMPILED),
    Band(inf, GroupedTiles(Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3), group=8), COMPILED),
)
HOPPER_16 = (
    Band(12, GroupedTiles(Tile(16, 64, 128, 4, 3, swap=True), Tile(16, 128, 128, 4, 4, swap=True)), COMPILED),
    Band(12, GroupedTiles(Tile(16, 64, 64, 4, 4, swap=True), Tile(16, 128, 64, 4, 4, swap=True)), COMPILED),
    Band(24, GroupedTiles(Tile(32, 64, 128, 4, 4, swap=True), Tile(32, 128, 128, 4, 4, swap=True)), COMPILED),
    Band(24, GroupedTiles(Tile(32, 64, 64, 4, 4, swap=True), Tile(32, 128, 64, 4, 4, swap=True)), COMPILED),
    Band(80, GroupedTiles(Tile(64, 64, 64, 4, 4, swap=True), Tile(64, 128, 64, 4, 4)), COMPILED),
    Band(160, GroupedTiles(Tile(64, 128, 64, 8, 4), Tile(64, 256, 64, 8, 4), group=4), COMPILED),
    Band(inf, GroupedTiles(Tile(128, 128, 64, 8, 4, tma=True), Tile(128, 256, 64, 8, 4, tma=True), group=8), COMPILED),
)
# float32 multiplies without tensor cores ("ieee"), so tiles are small and swapping gains nothing.
ANY_32 = (
    Band(24, GroupedTiles(Tile(16, 32, 32, 4, 3), Tile(16, 32, 32, 4, 3)), COMPILED),
    Band(inf, GroupedTiles(Tile(32, 64, 32, 8, 3), Tile(32, 64, 32, 8, 3), group=4), COMPILED),
)
# Bands by architecture and bytes per value, lowest edge first; of two with one edge, the first whose depth divides.
TABLES: dict[str, dict[int, tuple[Band, ...]]] = {
    "ampere": {2: AMPERE_16, 4: ANY_32},
    "hopper": {2: HOPPER_16, 4: ANY_32},
    "blackwell": {2: HOPPER_16, 4: ANY_32},
}
# Widths that no tile above divides: every load is masked and, where rows start at odd places, reads single values.
# There the tiles above spill up to 1,096 bytes of registers; these do not.
RAGGED_AMPERE_16 = (
    Band(24, GroupedTiles(Tile(16, 64, 32, 4, 2), Tile(16, 64, 32, 4, 2)), COMPILED),
    Band(inf, GroupedTiles(Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), group=4), COMPILED),
)
RAGGED_HOPPER_16 = (
    Band(24, GroupedTiles(Tile(16, 64, 32, 4, 2, swap=True), Tile(16, 64, 32, 4, 2, swap=True)), COMPILED),
    Band(inf, GroupedTiles(Tile(64, 64, 32, 8, 2), Tile(64, 64, 32, 8, 2), group=4), COMPILED),
)
RAGGED_TABLES: dict[str, dict[int, tuple[Band, ...]]] = {
    "ampere": {2: RAGGED_AMPERE_16, 4: ANY_32},
    "hopper": {2: RAGGED_HOPPER_16, 4: ANY_32},
    "blackwell": {2: RAGGED_HOPPER_16, 4: ANY_32},
}
# `down` gives a program some columns of one token and all its experts: narrow tiles let a single token fill the card.
PAIR_TILES = {"gate_up": PairTile(8, 512, 4), "down": PairTile(8, 512, 4)}
# Compute capability to table: consumer cards of the later generations (sm_12x) have the older matrix instructions.
ARCHITECTURES = {8: "ampere", 9: "hopper", 10: "blackwell", 11: "blackwell", 12: "ampere"}


@dataclass(frozen=True)
class Layer:
    """The host-known numbers of one call. kept_share: expected share of pairs that run an expert."""

    num_tokens: int
    top_k: int
    num_experts: int
    width: int
    inner: int
    gated: bool
    itemsize: int
    kept_share: float = 1.0

    @property
    def live_pairs(self) -> float:
        return self.num_tokens * self.top_k * self.kept_share

    def expected_tiles(self, block_rows: int) -> int:
        """At least one for every expert that is reached, enough for all pairs."""
        return ceil(max(min(self.num_experts, self.live_pairs), self.live_pairs / block_rows))


def choose(layer: Layer, device: Device, batch_invariant: bool = False) -> GroupedTiles | None:
    """The tiles for a layer's two products, or None for the pair path.

    `batch_invariant` gives the same tiles whatever the number of tokens, so that a token's result does not depend on
    what else is in the batch.
    """
    bands = TABLES[device.architecture][layer.itemsize]
    ragged = RAGGED_TABLES[device.architecture][layer.itemsize]
    usable = [band for band in bands if _divides(band.tiles, layer) and _fits(band.tiles, layer, device)] or ragged
    if batch_invariant:
        return usable[0].tiles
    if layer.num_tokens == 1 or PAIRS_PER_EXPERT * layer.num_tokens * layer.top_k <= layer.num_experts:
        return None
    rows_per_expert = layer.live_pairs / layer.num_experts
    tiles = next((band for band in usable if rows_per_expert < band.below), usable[-1]).tiles
    return GroupedTiles(
        _fill(tiles.gate_up, layer.inner, layer, device), _fill(tiles.down, layer.width, layer, device), tiles.group
    )


def variants(architecture: str, itemsize: int) -> Iterator[GroupedTiles]:
    """Every pair of tiles that `choose` can return for an architecture, so that all of them can be compiled ahead."""
    for tables in (TABLES, RAGGED_TABLES):
        for band in tables[architecture][itemsize]:
            yield from band_variants(band)


def band_variants(band: Band) -> Iterator[GroupedTiles]:
    """The band's own tiles first, then what they are narrowed to for small products."""
    for gate_up in _narrowings(band.tiles.gate_up):
        for down in _narrowings(band.tiles.down):
            yield GroupedTiles(gate_up, down, band.tiles.group)


def _narrowings(tile: Tile) -> Iterator[Tile]:
    yield tile
    while tile.columns > MIN_COLUMNS:
        tile = replace(tile, columns=tile.columns // 2)
        yield tile


def _fill(tile: Tile, columns: int, layer: Layer, device: Device) -> Tile:
    """The widest narrowing of the tile with a program for every multiprocessor, or the narrowest there is."""
    tiles = layer.expected_tiles(tile.rows)
    for narrowing in _narrowings(tile):
        if tiles * ceil(columns / narrowing.columns) >= device.num_multiprocessors:
            break
    return narrowing


def _divides(tiles: GroupedTiles, layer: Layer) -> bool:
    return layer.width % tiles.gate_up.depth == 0 and layer.inner % tiles.down.depth == 0


def _fits(tiles: GroupedTiles, layer: Layer, device: Device) -> bool:
    """Whether the buffers of both products fit in shared memory."""
    shared = max(
        tiles.gate_up.shared_bytes(layer.itemsize, 2 if layer.gated else 1),
        tiles.down.shared_bytes(layer.itemsize, 1),
    )
    return shared <= device.shared_bytes
