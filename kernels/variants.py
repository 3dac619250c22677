"""Every compiled form of every kernel that a call can ask for, as data: what ahead-of-time compilation walks over.

The launchers are called with tensors that have no storage while launches are recorded instead of run, and each recorded
launch is read as Triton reads it: types, which values are compile-time constants, which arguments are multiples of 16.
So nothing is listed twice: tiles come from kernels/tiles.py, arguments from the launchers. Compiled mode only: under
TRITON_INTERPRET=1 there is nothing to compile.

Legend: T tokens, K chosen experts per token, E router rows, V variants, P physical experts, D model width, F expert
inner width, G = 2F (F if not gated), C constant rows, N = T * K pairs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import combine, grouped_gemm, pair, route, sort, tiles
from kernels.routing import Activation, ExpertWeights, RouterPolicy, Routing, SortedPairs, max_tiles
from kernels.tiles import Tile

# What one block may ask of the shared memory of an A100, an H100 and a B200.
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
TABLE_OF = {80: "ampere", 90: "hopper", 100: "blackwell"}
# The instruction that multiplies matrices at full speed on each, and those of other generations.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
ASYNC_COPY, BULK_COPY, WIDE_LOAD = "LDGSTS", "UTMALDG", "LDG.128"
DEFAULT_STAGES = 3  # Triton's own, where a launch names none
SPILLS = frozenset({"LDL", "STL"})

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Variant:
    """One thing to compile.

    kernel, detail  what it is, for people. architecture: compute capability, 80, 90 or 100.
    types           of the arguments that are not constants; aligned: those that are multiples of 16.
    needs, forbids  instructions that must, or must not, be in the machine code.
    thorough        its like is in the list already, for another activation, dtype, size or architecture: left to
                    the full run. What is not thorough covers every tile on every architecture.
    """

    kernel: str
    detail: str
    architecture: int
    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    warps: int
    stages: int
    needs: frozenset[str] = frozenset()
    forbids: frozenset[str] = SPILLS
    thorough: bool = False

    @property
    def name(self) -> str:
        return f"sm_{self.architecture} {self.kernel} {self.detail}"


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside are put on the list instead of on a device."""
    launches: list[Launch] = []

    def record(function: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(function, arguments, keywords))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def read(launch: Launch) -> tuple[dict[str, str], dict[str, Any], frozenset[str]]:
    """(types, constants, aligned) of a launch's arguments, by the rules of Triton's own launcher."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = set()
    given = launch.function.signature.bind(
        *launch.arguments, **{name: v for name, v in launch.keywords.items() if name in launch.function.arg_names}
    )
    given.apply_defaults()
    for parameter in launch.function.params:
        name, value = parameter.name, given.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            constants[name] = value
            continue
        types[name], multiple = _type_of(value)
        if multiple and specialize:
            aligned.add(name)
    return types, constants, frozenset(aligned)


def _type_of(value: Any) -> tuple[str, bool]:
    """Triton's name for a value's type, and whether it is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"a kernel was given a {type(value).__name__}")


@dataclass(frozen=True)
class Form:
    """What of a layer, beside its tiles, is compiled in. size: both D and F."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    size: int = 1024
    thorough: bool = False

    def experts(self) -> ExpertWeights:
        rows = self.size * (2 if self.gated else 1)
        return ExpertWeights(
            _blank(NUM_EXPERTS, rows, self.size, dtype=self.dtype),
            _blank(NUM_EXPERTS, self.size, self.size, dtype=self.dtype),
            b_in_PG=_blank(NUM_EXPERTS, rows, dtype=self.dtype) if self.bias else None,
            b_out_PD=_blank(NUM_EXPERTS, self.size, dtype=self.dtype) if self.bias else None,
            activation=self.activation,
            gated=self.gated,
        )


# 97 is ragged in the worst way: no tile divides it and no row starts on a 16-byte boundary.
NUM_TOKENS, TOP_K, NUM_EXPERTS, RAGGED = 64, 8, 64, 97
FORMS = (
    Form("bf16 silu"),
    Form("bf16 gelu_erf bias", activation="gelu_erf", bias=True),
    Form("bf16 gelu_erf bias ragged", activation="gelu_erf", bias=True, size=RAGGED),
    Form("fp32 silu", dtype=torch.float32),
    Form("fp32 gelu_erf bias ragged", dtype=torch.float32, activation="gelu_erf", bias=True, size=RAGGED),
    Form("bf16 gelu_erf bias ungated", activation="gelu_erf", bias=True, gated=False, thorough=True),
    Form("bf16 gelu_tanh", activation="gelu_tanh", thorough=True),
    Form("bf16 relu", activation="relu", thorough=True),
    Form("bf16 relu_squared", activation="relu_squared", thorough=True),
    Form("fp16 silu", dtype=torch.float16, thorough=True),
    Form("bf16 silu ragged, rows of 16 bytes", size=1008, thorough=True),
)

PLAIN = ("bf16 silu", "bf16 gelu_erf bias ragged", "fp32 silu")


def variants(architecture: int) -> list[Variant]:
    """Everything that is compiled for one architecture, each once."""
    seen: set[object] = set()
    unique = []
    for variant in (*_gemms(architecture), *_pair(architecture), *_around(architecture)):
        key = (variant.function, *(tuple(sorted(part.items())) for part in (variant.types, variant.constants)))
        key = (*key, variant.aligned, variant.warps, variant.stages)
        if key not in seen:
            seen.add(key)
            unique.append(variant)
    return unique


def _gemms(architecture: int) -> Iterator[Variant]:
    """Both products at every tile of the table in every form that the tile can serve."""
    table = TABLE_OF[architecture]
    for form in FORMS:
        experts, itemsize, ragged = form.experts(), form.dtype.itemsize, form.size != FORMS[0].size
        bands = (tiles.RAGGED_TABLES if ragged else tiles.TABLES)[table][itemsize]
        for chosen, narrowed in ((c, c != band.tiles) for band in bands for c in tiles.band_variants(band)):
            steps = (chosen.gate_up, chosen.down)
            pairs = _pairs(chosen.gate_up.rows)
            x_TD = _blank(NUM_TOKENS, form.size, dtype=form.dtype)
            h_NF = _blank(NUM_TOKENS * TOP_K, form.size, dtype=form.dtype)
            with recorded() as launches:
                grouped_gemm.gate_up(x_TD, experts, pairs, TOP_K, chosen.gate_up, chosen.group)
                grouped_gemm.down(h_NF, experts, pairs, chosen.down, chosen.group)
            for name, launch, tile in zip(("gate_up", "down"), launches, steps, strict=True):
                needs = {BULK_COPY} if tile.tma else set()
                if not ragged and (name == "gate_up" or not tile.tma):
                    needs.add(ASYNC_COPY)
                others = set(MATRIX.values())
                if itemsize == 2:
                    needs.add(MATRIX[architecture])
                    others.remove(MATRIX[architecture])
                yield _variant(
                    architecture,
                    name,
                    f"{_text(tile)} {form.name}",
                    launch,
                    needs=frozenset(needs),
                    forbids=SPILLS | others,
                    thorough=form.thorough or (form.name not in PLAIN and (narrowed or architecture != 90)),
                )


def _text(tile: Tile) -> str:
    flags = [name for name in ("swap", "tma") if getattr(tile, name)]
    return " ".join([f"{tile.rows},{tile.columns},{tile.depth} {tile.warps}/{tile.stages}", *flags])


def _pair(architecture: int) -> Iterator[Variant]:
    """The path without tiles, in every form; the second kernel also with all that can be added to its sum."""
    routing = Routing(_blank(1, TOP_K), _blank(1, TOP_K, dtype=torch.float32))
    for form in FORMS:
        experts = form.experts()
        x_TD = _blank(1, form.size, dtype=form.dtype)
        const_CD, h_NF = _blank(4, form.size, dtype=form.dtype), _blank(TOP_K, form.size, dtype=form.dtype)
        with recorded() as launches:
            pair.pair_gate_up(x_TD, routing.slot_TK, experts)
            pair.pair_down(h_NF, routing, experts)
            pair.pair_down(h_NF, routing, replace(experts, const_CD=const_CD), x_TD, x_TD)
        # Rows of 16 bytes are read 16 bytes at a time only where no mask cuts them.
        needs = frozenset({WIDE_LOAD} if form.size == FORMS[0].size else ())
        details = (form.name, form.name, f"{form.name} constants residual shared")
        names = ("pair_gate_up", "pair_down", "pair_down")
        for name, detail, launch in zip(names, details, launches, strict=True):
            thorough = form.thorough or architecture != 90
            yield _variant(architecture, name, detail, launch, needs=needs, thorough=thorough)


def _around(architecture: int) -> Iterator[Variant]:
    """Routing, sorting, combining: whatever depends on counts rather than on tiles."""
    for count in (64, 4096, 8, 128, 256, 1024):
        yield from _routes(architecture, count, thorough=count not in (64, 4096) or architecture != 90)
    for num_pairs, count, block_rows in SORTS:
        slot_TK = _blank(num_pairs // TOP_K, TOP_K)
        with recorded() as launches:
            sort.sort_pairs(slot_TK, count, block_rows)
        for launch in launches:
            detail = f"{num_pairs} pairs, {count} experts, tiles of {block_rows}"
            yield _variant(architecture, _name(launch), detail, launch, thorough=architecture != 90)
    for top_k, added in ((1, False), (2, False), (8, False), (8, True)):
        routing = Routing(_blank(NUM_TOKENS, top_k), _blank(NUM_TOKENS, top_k, dtype=torch.float32))
        for dtype in (torch.bfloat16, torch.float32):
            y_ND, x_TD = (_blank(n, 1024, dtype=dtype) for n in (NUM_TOKENS * top_k, NUM_TOKENS))
            with recorded() as launches:
                combine.combine(y_ND, routing, *((x_TD, x_TD, x_TD) if added else ()))
            detail = f"{TYPES[dtype]} top {top_k}" + (" constants residual shared" if added else "")
            yield _variant(architecture, "combine", detail, launches[0], thorough=architecture != 90)


# (pairs, experts, rows of a tile): every width of the one-program sort, then the three launches, few and many experts.
SORTS = (
    (64, 8, 16),
    (256, 64, 16),
    (1024, 128, 32),
    (4096, 256, 64),
    (4096, 1024, 16),
    (32_768, 64, 128),
    (32_768, 4096, 16),
)


def _routes(architecture: int, count: int, thorough: bool) -> Iterator[Variant]:
    """The router's and the remapper's kernel at so many rows: the plainest and the heaviest policy."""
    top_k = min(TOP_K, count)
    heavy = RouterPolicy(top_k, "sigmoid", normalize=True, scale=2.5, slice=True, survivors="old_sum")
    logits_TE, table_VE = _blank(NUM_TOKENS, count, dtype=torch.float32), _blank(1, count)
    variant_T, bias_E, num_valid_1 = _blank(NUM_TOKENS), _blank(count, dtype=torch.float32), _blank(1)
    row_TK, weight_TK = _blank(NUM_TOKENS, top_k), _blank(NUM_TOKENS, top_k, dtype=torch.float32)
    with recorded() as launches:
        route.route(logits_TE, table_VE, RouterPolicy(top_k))
        route.route(logits_TE, table_VE, heavy, variant_T, bias_E, num_valid_1)
        route.remap(row_TK, weight_TK, table_VE, "old_sum", variant_T)
    for launch, policy in zip(launches, ("softmax", "sigmoid, every option", "survivors rescaled"), strict=True):
        detail = f"{count} rows, top {top_k}, {policy}"
        yield _variant(architecture, _name(launch), detail, launch, thorough=thorough)


def _variant(architecture: int, kernel: str, detail: str, launch: Launch, **expected: Any) -> Variant:
    types, constants, aligned = read(launch)
    warps, stages = launch.keywords["num_warps"], launch.keywords.get("num_stages", DEFAULT_STAGES)
    return Variant(kernel, detail, architecture, launch.function, types, constants, aligned, warps, stages, **expected)


def _name(launch: Launch) -> str:
    return str(launch.function.__name__).removesuffix("_kernel")


def _pairs(block_rows: int) -> SortedPairs:
    num_pairs = NUM_TOKENS * TOP_K
    tile_M = _blank(max_tiles(num_pairs, NUM_EXPERTS, block_rows))
    return SortedPairs(_blank(num_pairs), _blank(NUM_EXPERTS + 1), tile_M, tile_M, tile_M, _blank(1), block_rows)


def _blank(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
