"""Every kernel compiles for every architecture without spills, within shared memory, to the instructions meant for it.

pytest runs Triton's interpreter, in which nothing can be compiled: the list is made and compiled in another process.
It leaves out forms that resemble others; every tile of every table is compiled, on all three architectures. The whole
list is `python -m benchmarks.aot`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.aot import Resources, count_instructions, replace_section, table, violations
from kernels.tiles import RAGGED_TABLES, TABLES, Tile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m benchmarks.aot --core` found; about 45 seconds of two cores."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--core", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert path.exists(), run.stderr
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


@pytest.mark.timeout(300)
def test_no_variant_spills_overflows_or_misses_its_instructions(compiled: dict[str, Any]) -> None:
    assert compiled["violations"] == []


@pytest.mark.parametrize(("architecture", "name"), [(80, "ampere"), (90, "hopper"), (100, "blackwell")])
def test_every_tile_of_every_table_is_compiled(compiled: dict[str, Any], architecture: int, name: str) -> None:
    details = {
        (row["kernel"], row["detail"].split(" bf16")[0].split(" fp32")[0])
        for row in compiled["rows"]
        if row["architecture"] == architecture
    }
    tables = (TABLES, RAGGED_TABLES)
    bands = [band.tiles for each in tables for part in each[name].values() for band in part]
    wanted = {(kernel, described(tile)) for b in bands for kernel, tile in (("gate_up", b.gate_up), ("down", b.down))}
    assert wanted <= details


def described(tile: Tile) -> str:
    flags = " swap" * tile.swap + " tma" * tile.tma
    return f"{tile.rows},{tile.columns},{tile.depth} {tile.warps}/{tile.stages}{flags}"


def test_every_kernel_is_compiled(compiled: dict[str, Any]) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").glob("*.py"))
    names = {line.split("(")[0].removeprefix("def ") for line in sources.splitlines() if line.startswith("def ")}
    kernels = {name.removesuffix("_kernel") for name in names if name.endswith("_kernel")}
    assert len(kernels) >= 8
    assert kernels == {row["kernel"] for row in compiled["rows"]}


def resources(**changes: Any) -> Resources:
    return Resources(**{**GOOD, **changes})


GOOD: dict[str, Any] = {
    "kernel": "gate_up",
    "detail": "16,64,128 4/3 swap bf16 silu",
    "architecture": 90,
    "registers": 72,
    "stack": 0,
    "shared": 110_592,
    "instructions": {"HGMMA": 16, "LDGSTS": 54},
}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"stack": 8}, ["spills: 8 bytes of stack"]),
        ({"shared": 232_449}, ["232449 bytes of shared memory, 232448 at most"]),
        ({"instructions": {"HMMA": 16, "LDGSTS": 54}}, ["no HGMMA", "16 HMMA"]),
        ({"instructions": {"HGMMA": 16}}, ["no LDGSTS"]),
        ({"instructions": {"HGMMA": 16, "LDGSTS": 54, "LDL": 2, "STL": 2}}, ["2 LDL", "2 STL"]),
    ],
)
def test_violations_are_seen(changes: dict[str, Any], wrong: list[str]) -> None:
    found = violations(resources(**changes), {"HGMMA", "LDGSTS"}, {"HMMA", "LDL", "STL"}, 232_448)
    assert found == [f"sm_90 gate_up 16,64,128 4/3 swap bf16 silu: {text}" for text in wrong]


def test_instructions_are_counted_by_name() -> None:
    sass = """
        /*0040*/  LDG.E.128.CONSTANT R4, desc[UR40][R2.64] ;
        /*0050*/  LDG.E R4, desc[UR40][R2.64] ;
        /*0060*/  LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0070*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/  @P0 STL [R1], R4 ;
        /*00a0*/  UTMALDG.3D [UR8], [UR4] ;
    """
    assert count_instructions(sass) == {"HGMMA": 1, "HMMA": 1, "LDG.128": 1, "LDGSTS": 1, "STL": 1, "UTMALDG": 1}


def test_the_table_has_a_line_per_form_and_a_column_per_architecture() -> None:
    rows = [resources(), resources(architecture=100, registers=56, stack=8), resources(kernel="down")]
    assert table(rows).splitlines() == [
        "| kernel | form | sm_90: registers, shared KB | sm_100: registers, shared KB |",
        "| --- | --- | --- | --- |",
        "| gate_up | 16,64,128 4/3 swap bf16 silu | 72, 108 | 56, 108, **8 B stack** |",
        "| down | 16,64,128 4/3 swap bf16 silu | 72, 108 |  |",
    ]


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = "before\n<!-- resources:begin -->\nold\n<!-- resources:end -->\nafter\n"
    assert replace_section(text, "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="resources:begin"):
        replace_section("no markers", "new")


def test_the_published_table_is_of_these_tiles() -> None:
    """If this fails after a change of tiles: `python -m benchmarks.aot --write docs/kernels.md`."""
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for tables in (TABLES, RAGGED_TABLES):
        for band in (band for parts in tables.values() for part in parts.values() for band in part):
            assert f"| gate_up | {described(band.tiles.gate_up)} " in text
            assert f"| down | {described(band.tiles.down)} " in text


def test_interpreted_kernels_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.aot"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "TRITON_INTERPRET=1" in run.stderr
