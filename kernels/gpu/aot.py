"""Compile programs ahead of time for GPUs that are not here, and read what their machine code costs.

    python -m quant.kernels.gpu.aot --report [--arch 90]                      the tables' counts
    python -m quant.kernels.gpu.aot --update [--arch 90] [--policy int4]      make the tables again (`tune.py`), in minutes
    python -m quant.kernels.gpu.aot --recount [--arch 80]                     the same tiles, their counts taken again

Must run without TRITON_INTERPRET: interpreted programs cannot be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.kernels.gpu import sass
from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.model import DEVICES
from quant.kernels.gpu.plan import COMPUTE, Layer, gemm_step
from quant.kernels.gpu.program import Program, constants, function
from quant.kernels.gpu.tiles import ARCHITECTURES, Tile, Variant, read_table, tile_of

ODD_SIZES = (4097, 4112)  # N, K of a layer whose sizes nothing is known to divide; float tokens are padded to 16
REGISTERS = 255  # per thread; a kernel that needs more spills


@dataclass(frozen=True, kw_only=True)
class Binary:
    """One compiled program. `code` is the cubin (AMD: hsaco); `ttgir` shows the layouts the compiler chose."""

    name: str
    code: bytes
    ttgir: str
    shared_bytes: int
    warps: int


def compile_program(program: Program, arch: int | str) -> Binary:
    """Compile for sm_`arch`, or for an AMD architecture such as "gfx942". Raises RuntimeError under TRITON_INTERPRET."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set; unset it to compile")
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    code = function(program.name)
    types = dict(program.signature)
    source = ASTSource(
        code,
        {name: types.get(name, "constexpr") for name in code.arg_names},
        constexprs=constants(program),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(code.arg_names) if name in program.aligned},
    )
    options = {"num_warps": program.warps, "num_stages": program.stages, "enable_fp_fusion": program.fusion}
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # a third of the size, same code
        built = triton.compile(source, target=target, options=options)
    return Binary(
        name=built.metadata.name,
        code=built.asm["cubin" if isinstance(arch, int) else "hsaco"],
        ttgir=built.asm["ttgir"],
        shared_bytes=built.metadata.shared,
        warps=built.metadata.num_warps,
    )


def packs_along_k(ttgir: str, swap: bool) -> bool:
    """Whether inline assembly sees neighbours along K (dimension 1 when swapped, else 0) in one 32-bit word: four bytes, or two
    16-bit integers.

    The fragments are proven on words; this is the missing link, that Triton fills a word along K and not along N, where the
    parameters differ. True for code without inline assembly.
    """
    k = 1 if swap else 0
    for step in (line for line in ttgir.splitlines() if "tt.elementwise_inline_asm" in line):
        layouts = re.findall(r"tensor<\d+x\d+xi(8|16), (#ttg\.dot_op<\{.*?\}>|#\w+)>", step)
        if not layouts:  # Triton's own, on floats
            continue
        bits, layout = layouts[-1]
        pack = 32 // int(bits)
        if fragment := re.search(r"opIdx = (\d).*kWidth = (\d+)", layout):
            good = int(fragment[1]) == 1 - k and int(fragment[2]) % pack == 0
        else:
            definition = re.search(rf"^{layout} = (.*)$", ttgir, re.M)
            assert definition, layout
            if registers := re.search(r"register = \[\[(\d+), (\d+)\], \[(\d+), (\d+)\]", definition[1]):
                numbers = [int(x) for x in registers.groups()]
                good = (numbers[k], numbers[1 - k]) == (1, 0) and (pack == 2 or (numbers[2 + k], numbers[3 - k]) == (2, 0))
            else:
                size = re.search(r"sizePerThread = \[(\d+), (\d+)\].*order = \[(\d)", definition[1])
                assert size, definition[1]
                good = int(size[1 + k]) % pack == 0 and int(size[3]) == k
        if not good:
            return False
    return True


def variants(policy: str) -> Iterator[Variant]:
    """The one that is searched comes first."""
    known = POLICIES[policy]
    for compute in ("int8",) if known.integer else ("fp16", "bf16", "fp32"):
        for slice_, groups in known.blockings:
            yield Variant(policy=policy, slice=slice_, groups=groups, compute=compute)


def sample_layer(variant: Variant, n: int = 4096, k: int = 4096) -> Layer:
    """A layer of the size that the tables are made with."""
    x = next((dtype for dtype, compute in COMPUTE.items() if compute == variant.compute), "bfloat16")
    return Layer(policy=variant.policy, n=n, k=k, slice=variant.slice, groups=variant.groups, x=x, bias=x)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled (architecture, variant, tile) and its counts."""

    arch: int
    variant: Variant
    tile: Tile
    shared_bytes: int
    counts: sass.Counts
    along_k: bool
    spills_odd: int  # of the same tile for a layer of odd N, K no multiple of the block

    @property
    def wide_loads_needed(self) -> int:
        """128-bit loads per thread that fetch the weights of one block."""
        planes = POLICIES[self.variant.policy].planes
        return planes * max(1, self.tile.bn * self.variant.slice // (16 * 32 * self.tile.warps))

    def faults(self) -> list[str]:
        """Why this program must not be shipped."""
        counts = self.counts
        limit = DEVICES[self.arch].shared_bytes
        checks = {
            f"{counts.spills} spills": counts.spills > 0,
            f"{self.spills_odd} spills for odd sizes": self.spills_odd > 0,
            f"{counts.registers} registers": counts.registers > REGISTERS,
            f"{self.shared_bytes} bytes of shared memory": self.shared_bytes > limit,
            "no matrix instruction": counts.mma == 0,
            f"weights not loaded 16 bytes at a time: {counts.loads}": counts.loads.get("128", 0) < self.wide_loads_needed,
            f"narrow loads: {counts.loads}": bool({"8", "16"} & counts.loads.keys()),
            "words packed across N": not self.along_k,
        }
        return [fault for fault, found in checks.items() if found]


def measure(arch: int, variant: Variant, tile: Tile) -> Row:
    """Compile one tile and count. Raises RuntimeError when its code has no loop with matrix instructions."""
    return dataclasses.replace(measured(arch, variant, dataclasses.replace(tile, max_m=None)), tile=tile)


@functools.cache
def measured(arch: int, variant: Variant, tile: Tile) -> Row:
    """`measure` for any number of tokens, on which the code does not depend."""
    built = compile_program(gemm_step(sample_layer(variant), tile, 1, "cuda").program, arch)
    odd = compile_program(gemm_step(sample_layer(variant, *ODD_SIZES), tile, 1, "cuda").program, arch)
    return Row(
        arch=arch,
        variant=variant,
        tile=tile,
        shared_bytes=built.shared_bytes,
        counts=sass.count(built.code, weights=tile.bn * variant.block, tokens=tile.bm, warps=tile.warps),
        along_k=packs_along_k(built.ttgir, tile.swap),
        spills_odd=sass.spills(sass.disassemble(odd.code)[0]),
    )


def source_hash(policy: str) -> str:
    """Digest of all that the counts of a policy depend on, the version of Triton apart: the Triton sources, those that only
    other policies use left out, and the programs that the plan makes of them."""
    digest = hashlib.sha256()
    foreign = {known.module for known in POLICIES.values()} - {"unpack", POLICIES[policy].module} | {
        "activation",
        "codebook",
        "dense",
        "dual",
        "fp4_native",
    }
    for path in sorted((Path(__file__).parent / "jit").glob("*.py")):
        if path.stem not in foreign:
            digest.update(path.read_bytes())
    tile = Tile(max_m=None, bm=16, bn=128, warps=4, stages=2, swap=False, on_sum=False)
    for variant in variants(policy):
        for sizes in ((), ODD_SIZES):
            digest.update(repr(gemm_step(sample_layer(variant, *sizes), tile, 1, "cuda").program).encode())
    return digest.hexdigest()[:16]


def variant_of(key: str) -> Variant:
    policy, slice_, groups, compute = key.split("/")
    return Variant(policy=policy, slice=int(slice_), groups=int(groups), compute=compute)


def report_rows(arch: int) -> list[dict[str, Any]]:
    """The stored tiles of an architecture: plain values, one dict per row."""
    rows = []
    for key, stored in read_table(arch)["tiles"].items():
        for row in stored:
            tile = tile_of(row)
            shape = {"arch": arch, "variant": key, "up_to": tile.max_m or "any", "tile": f"{tile.bm}x{tile.bn}"}
            how = {"warps": tile.warps, "stages": tile.stages, "left": "w" if tile.swap else "x"}
            counts = {name: row["counts"][name] for name in ("registers", "spills", "instructions", "mma", "alu_per_weight")}
            loads = " ".join(f"{n}x{bits}" for bits, n in row["counts"]["loads"].items())
            counts["spills_odd"] = row["spills_odd"]
            scale = {"scale_on": "sum" if tile.on_sum else "weight"}
            rows.append(shape | how | scale | counts | {"shared_bytes": row["shared_bytes"], "loads": loads})
    return rows


def report(architectures: tuple[int, ...] = ARCHITECTURES) -> None:
    """Print every stored row. Counts of machine code; nothing was timed."""
    from rich.console import Console
    from rich.table import Table

    for arch in architectures:
        rows = report_rows(arch)
        table = Table(title=f"sm_{arch}, one trip of the hot loop per warp: instruction counts, no timings")
        for column in rows[0]:
            table.add_column(column, justify="left" if column in ("variant", "loads") else "right")
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(width=180).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print the tables")
    parser.add_argument("--update", action="store_true", help="make the tables again")
    parser.add_argument(
        "--recount", action="store_true", help="compile the tables' own tiles again; searches where one is faulty"
    )
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="only this architecture")
    parser.add_argument("--policy", choices=tuple(POLICIES), action="append", help="only these weight policies")
    args = parser.parse_args()
    if not (args.report or args.update or args.recount):
        parser.error("give --report, --update or --recount")
    chosen = ARCHITECTURES if args.arch is None else (args.arch,)
    if args.update or args.recount:
        from quant.kernels.gpu.tune import update

        for arch in chosen:
            update(arch, args.policy or tuple(POLICIES), recount=args.recount)
    if args.report:
        report(chosen)


if __name__ == "__main__":
    main()
