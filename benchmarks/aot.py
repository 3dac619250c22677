"""Compile every kernel variant ahead of time, without a GPU, and look at the machine code.

    python -m benchmarks.aot [--architectures 80 90 100] [--core] [--json FILE] [--write docs/kernels.md]

Prints registers, stack and shared memory of each, then everything that is wrong with the machine code: spills, more
shared memory than a block may have, no tensor-core instruction where one is meant, copies that are not asynchronous.
Exits with 1 if anything is. `--core` leaves out forms that resemble others, but no tile; `--write` replaces the section
of that file between the two markers. The disassembler is the one that Triton ships.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it imports Triton, which must not happen before the cache folder is set
    from kernels.variants import Variant

WORKERS = 2
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"
ARCHITECTURES = (80, 90, 100)
COUNTED = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTMALDG|LDGSTS|LDL|STL)\b|\b(LDG)\.E[.\w]*\.128\b")


@dataclass(frozen=True)
class Resources:
    """What one variant takes: registers per thread, bytes of stack and of shared memory, instructions by name."""

    kernel: str
    detail: str
    architecture: int
    registers: int
    stack: int
    shared: int
    instructions: Mapping[str, int]


def violations(
    found: Resources, needs: Iterable[str], forbids: Iterable[str], shared_limit: int, max_stack: int = 0
) -> list[str]:
    """What is wrong with a variant, as sentences; nothing for one that is as it should be."""
    wrong = []
    if found.stack > max_stack:
        wrong.append(f"spills: {found.stack} bytes of stack")
    if found.shared > shared_limit:
        wrong.append(f"{found.shared} bytes of shared memory, {shared_limit} at most")
    wrong += [f"no {name}" for name in sorted(needs) if not found.instructions.get(name)]
    wrong += [f"{found.instructions[name]} {name}" for name in sorted(forbids) if found.instructions.get(name)]
    name = f"sm_{found.architecture} {found.kernel} {found.detail}"
    return [f"{name}: {text}" for text in wrong]


def count_instructions(sass: str) -> dict[str, int]:
    """The instructions that matter in a disassembly; loads of 16 bytes from global memory count as LDG.128."""
    names = (plain or f"{wide}.128" for plain, wide in COUNTED.findall(sass))
    return dict(sorted(Counter(names).items()))


def compile_variant(variant: "Variant") -> Resources:
    """Compile and disassemble one variant; no driver is needed."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.function.arg_names)
    source = ASTSource(
        fn=variant.function,
        signature={n: "constexpr" if n in variant.constants else variant.types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        use = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", use)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no registers for {variant.name}: {use}")
    return Resources(
        variant.kernel,
        variant.detail,
        variant.architecture,
        int(match[1]),
        int(match[2]),
        int(compiled.metadata.shared),
        count_instructions(sass),
    )


def _run(*command: str) -> str:
    # The disassembler warns on stderr about sm_80; only its exit status counts.
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def listed(architecture: int, core: bool) -> "list[Variant]":
    from kernels.variants import variants

    return [variant for variant in variants(architecture) if not (core and variant.thorough)]


def _compile_listed(place: tuple[int, bool, int]) -> tuple[Resources, list[str]]:
    """One variant by its place in the list, which every worker makes for itself: jit functions do not travel."""
    from kernels.variants import SHARED_BYTES

    architecture, core, index = place
    variant = listed(architecture, core)[index]
    found = compile_variant(variant)
    return found, violations(found, variant.needs, variant.forbids, SHARED_BYTES[architecture])


def examine(architectures: Sequence[int], core: bool = False) -> tuple[list[Resources], list[str]]:
    """Compile everything in two processes. Returns what each variant takes, in the list's order, and what is wrong."""
    places = [(architecture, core, i) for architecture in architectures for i in range(len(listed(architecture, core)))]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_compile_listed, places))
    return [found for found, _ in results], [text for _, wrong in results for text in wrong]


def table(rows: Sequence[Resources]) -> str:
    """A Markdown table, one line per kernel and form, registers and shared memory for each architecture."""
    present = sorted({row.architecture for row in rows})
    lines: dict[tuple[str, str], dict[int, Resources]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.detail), {})[row.architecture] = row
    head = ["kernel", "form", *(f"sm_{a}: registers, shared KB" for a in present)]
    text = [head, ["---"] * len(head)]
    for (kernel, detail), found in lines.items():
        text.append([kernel, detail, *(_cell(found[a]) if a in found else "" for a in present)])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in text)


def _cell(row: Resources) -> str:
    spill = f", **{row.stack} B stack**" if row.stack else ""
    return f"{row.registers}, {row.shared / 1024:.0f}{spill}"


def replace_section(text: str, section: str) -> str:
    """The text with what stands between the markers replaced. Raises ValueError if they are not there, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} to write between")
    return f"{before}{BEGIN}\n{section}{END}{after}"


def section(rows: Sequence[Resources], version: str) -> str:
    return f"Compiled with Triton {version}.\n\n{table(rows)}"


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--core", action="store_true", help="leave out what resembles another variant")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", type=Path, help="replace the generated section of this Markdown file")
    args = parser.parse_args(arguments)
    if args.write and args.core:
        parser.error("--write is for the whole list, --core leaves things out")
    return args


def main() -> None:
    args = parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        rows, wrong = examine(args.architectures, args.core)
    report(rows, wrong, time.monotonic() - start)
    if args.json:
        content: dict[str, Any] = {"rows": [asdict(row) for row in rows], "violations": wrong}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.write:
        import triton

        text = args.write.read_text(encoding="utf-8")
        args.write.write_text(replace_section(text, section(rows, triton.__version__)), encoding="utf-8")
    sys.exit(1 if wrong else 0)


def report(rows: Sequence[Resources], wrong: Sequence[str], seconds: float) -> None:
    print(table(rows))
    print(f"{len(rows)} variants in {seconds:.0f} s, {len(wrong)} violations")
    for text in wrong:
        print(f"  {text}")


if __name__ == "__main__":
    main()
