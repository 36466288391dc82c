"""Compile the A8W4 programs ahead of time for GPUs that are not here, and report what their machine code costs.

    python -m quant.kernels.gpu.aot --report            the table of counts, read from `a8w4_configs.json`'s tiles
    python -m quant.kernels.gpu.aot --update            recount and write the counts beside each tile

Must run without TRITON_INTERPRET: interpreted programs cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from quant.kernels.gpu import sass
from quant.kernels.gpu.tiles import ARCHITECTURES, SHARED_LIMIT_BYTES, TABLE, Tile, read_table, tiles

POINTERS = {
    "x_ptr": "*i8",
    "x_scale_ptr": "*fp32",
    "w_ptr": "*u8",
    "word_ptr": "*i32",
    "row_scale_ptr": "*fp32",
    "bias_ptr": "*fp32",
}
# name -> type, and whether the value is known to be a multiple of 16 (N: the variant for N % 16 == 0)
SCALARS = {
    "M": ("i32", False),
    "N": ("i32", True),
    "BLOCKS": ("i32", False),
    "X_STRIDE": ("i32", True),
    "W_STRIDE": ("i64", True),
}
OUTPUTS = {"float16": "*fp16", "bfloat16": "*i16", "float32": "*fp32"}


@dataclass(frozen=True, kw_only=True)
class Binary:
    """One compiled program. `code` is the cubin (AMD: hsaco); `ttgir` shows the layouts the compiler chose."""

    name: str
    code: bytes
    ttgir: str
    shared_bytes: int
    warps: int


def compile_program(
    program: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    aligned: set[str],
    arch: int | str,
    warps: int,
    stages: int,
    fusion: bool = False,
) -> Binary:
    """Compile one Triton program for sm_`arch`, or for an AMD architecture such as "gfx942".

    signature: type of every run-time argument; constants: value of every other one; aligned: arguments divisible by 16
    (the loads shrink without it). Raises RuntimeError under TRITON_INTERPRET.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set; unset it to compile")
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = program.arg_names
    source = ASTSource(
        program,
        {name: signature.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
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


def compile_matmul(tile: Tile, arch: int | str, half: int, pair: bool, output: str = "bfloat16") -> Binary:
    """`matmul_tile` with bias. pair: the two halves of a block lie in different groups. AMD gets the plain twin."""
    from quant.kernels.gpu.jit.a8w4 import matmul_tile

    signature = POINTERS | {"y_ptr": OUTPUTS[output]} | {name: kind for name, (kind, _) in SCALARS.items()}
    constants = dict(
        BM=tile.bm,
        BN=tile.bn,
        HALF=half,
        PAIR=pair,
        SWAP=tile.swap,
        BIAS=True,
        BF16=output == "bfloat16",
        INLINE=isinstance(arch, int),
    )
    aligned = {*POINTERS, "y_ptr", *(name for name, (_, known) in SCALARS.items() if known)}
    return compile_program(matmul_tile, signature, constants, aligned, arch, tile.warps, tile.stages)


def compile_quantize(arch: int, dtype: str = "bf16") -> Binary:
    """`quantize_rows` for tokens of a Triton element type ("bf16", "fp16", "fp32")."""
    from quant.kernels.gpu.a8w4 import QUANTIZE_BLOCK
    from quant.kernels.gpu.jit.a8w4 import quantize_rows

    signature = {"x_ptr": f"*{dtype}", "q_ptr": "*i8", "scale_ptr": "*fp32", "K": "i32", "K_PAD": "i32"}
    return compile_program(quantize_rows, signature, {"BLOCK": QUANTIZE_BLOCK}, set(signature), arch, 8, 1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled (architecture, layout, tile) and its counts."""

    arch: int
    half: int
    pair: bool
    tile: Tile
    shared_bytes: int
    counts: sass.Counts

    @property
    def key(self) -> str:
        """Name of the row in `a8w4_budget.json`."""
        return f"sm_{self.arch} HALF={self.half} {'pair' if self.pair else 'same'} {self.tile.bm}x{self.tile.bn}"

    @property
    def wide_loads_needed(self) -> int:
        """128-bit loads per thread that fetch the weights of one block."""
        return max(1, self.tile.bn * self.half // (16 * 32 * self.tile.warps))

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= SHARED_LIMIT_BYTES[self.arch]


def measured(built: Binary, tile: Tile, arch: int, half: int, pair: bool) -> Row:
    """The counts of what `compile_matmul` returned for the same arguments."""
    counts = sass.count(built.code, weights=tile.bn * 2 * half, tokens=tile.bm, warps=tile.warps)
    return Row(arch=arch, half=half, pair=pair, tile=tile, shared_bytes=built.shared_bytes, counts=counts)


def programs() -> Iterator[tuple[int, int, bool]]:
    """(architecture, HALF, pair). A HALF of 32 means an odd number of halves per group, so it is always a pair."""
    for arch in ARCHITECTURES:
        yield from ((arch, 64, False), (arch, 64, True), (arch, 32, True))


def every_row() -> Iterator[Row]:
    """Every program that `launch` can ask for, compiled and counted."""
    for arch, half, pair in programs():
        for tile in tiles(arch, half):
            yield measured(compile_matmul(tile, arch, half, pair), tile, arch, half, pair)


def report(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="A8W4 hot loop, one trip per warp: instruction counts, no timings")
    for column in (
        "program",
        "warps",
        "stages",
        "left",
        "regs",
        "spills",
        "shared B",
        "instr",
        "MMA",
        "ALU",
        "loads",
        "ALU/weight",
    ):
        table.add_column(column, justify="left" if column in ("program", "loads") else "right")
    for row in rows:
        c, tile = row.counts, row.tile
        loads = " ".join(f"{n}x{bits}" for bits, n in c.loads.items())
        values = (tile.warps, tile.stages, "w" if tile.swap else "x", c.registers, c.spills, row.shared_bytes, c.instructions)
        table.add_row(row.key, *map(str, (*values, c.mma, c.alu)), loads, f"{c.alu_per_weight:.3f}")
    Console(width=160).print(table)


def update(rows: list[Row]) -> None:
    """Write the counts of `rows` beside their tiles."""
    table = read_table()
    for row in rows:
        for stored in table[str(row.arch)][str(row.half)]:
            if {key: value for key, value in stored.items() if key != "counts"} == asdict(row.tile):
                kept = {"shared_bytes": row.shared_bytes} | asdict(row.counts)
                stored.setdefault("counts", {})["pair" if row.pair else "same"] = kept
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print the counts")
    parser.add_argument("--update", action="store_true", help="write the counts into the table")
    args = parser.parse_args()
    if not (args.report or args.update):
        parser.error("give --report or --update")
    rows = list(every_row())
    if args.report:
        report(rows)
    if args.update:
        update(rows)


if __name__ == "__main__":
    main()
