"""Every A8W4 program compiles for every architecture and stays within its instruction budget. No GPU takes part.

`kernels/gpu/a8w4_budget.json` holds the most ALU instructions per weight of each program; a change that needs more must
raise the number there, in sight of the reviewer. The counts belong to one version of Triton.
"""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")

import triton

from quant.kernels.gpu import aot, sass
from quant.kernels.gpu.tiles import TABLE, read_table, tiles

BUDGET = json.loads(Path(TABLE).with_name("a8w4_budget.json").read_text())
REGISTERS = 255  # per thread; a kernel that needs more spills
# A tile whose two halves share a group runs a subset of the instructions of its pair; only the decode tile, which has a bar
# of its own, is built both ways here. `python -m quant.kernels.gpu.aot --report` builds all.
PROGRAMS = [
    pytest.param(arch, half, pair, tile, id=f"sm_{arch}-{half}-{'pair' if pair else 'same'}-{tile.bm}x{tile.bn}")
    for arch, half, pair in aot.programs()
    for tile in {(t.bm, t.bn): t for t in tiles(arch, half)}.values()
    if pair or (tile.bm, tile.bn) == (16, 128)
]


@pytest.mark.parametrize(("arch", "half", "pair", "tile"), PROGRAMS)
def test_program_within_budget(arch, half, pair, tile):
    built = aot.compile_matmul(tile, arch, half, pair)
    row = aot.measured(built, tile, arch, half, pair)
    counts = row.counts
    version = f"counted with triton {triton.__version__}, budget made with {BUDGET['triton']}"
    assert counts.spills == 0
    assert counts.registers <= REGISTERS
    assert row.fits, f"{row.shared_bytes} bytes of shared memory"
    assert counts.mma > 0
    assert counts.loads.get("128", 0) >= row.wide_loads_needed, f"weights are not loaded 16 bytes at a time: {counts.loads}"
    assert not {"8", "16"} & counts.loads.keys(), counts.loads
    assert counts.alu_per_weight <= BUDGET["alu_per_weight"][row.key], version
    assert k_of_packed_registers(built.ttgir, tile.swap), "the four packed elements must be four neighbours along K"


def k_of_packed_registers(ttgir: str, swap: bool) -> bool:
    """Whether the inline assembly sees four neighbours along K (dimension 1 when swapped, else 0) in one 32-bit word.

    The step is proven on words; this is the missing link, that Triton fills a word along K and not along N, where the
    scales differ.
    """
    k = 1 if swap else 0
    steps = [line for line in ttgir.splitlines() if "tt.elementwise_inline_asm" in line]
    assert len(steps) >= 1
    for step in steps:
        layout = re.findall(r"tensor<\d+x\d+xi8, (#ttg\.dot_op<\{.*?\}>|#\w+)>", step)[-1]
        if fragment := re.search(r"opIdx = (\d).*kWidth = (\d+)", layout):
            good = int(fragment[1]) == 1 - k and int(fragment[2]) % 4 == 0
        else:
            definition = re.search(rf"^{layout} = (.*)$", ttgir, re.M)
            assert definition, layout
            if registers := re.search(r"register = \[\[(\d+), (\d+)\], \[(\d+), (\d+)\]", definition[1]):
                numbers = [int(x) for x in registers.groups()]
                good = (numbers[k], numbers[2 + k], numbers[1 - k], numbers[3 - k]) == (1, 2, 0, 0)
            else:
                size = re.search(r"sizePerThread = \[(\d+), (\d+)\].*order = \[(\d)", definition[1])
                assert size, definition[1]
                good = int(size[1 + k]) % 4 == 0 and int(size[3]) == k
        if not good:
            return False
    return True


def test_the_decode_tile_meets_the_bar():
    """16 tokens x 128 columns, one group per block: at most 1.15, and its counts are those in the table."""
    for arch in (80, 90):
        stored = read_table()[str(arch)]["64"][0]
        assert (stored["bm"], stored["bn"]) == (16, 128)
        assert stored["counts"]["same"]["alu_per_weight"] <= 1.15
        assert BUDGET["alu_per_weight"][f"sm_{arch} HALF=64 same 16x128"] <= 1.15


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_quantization_is_compiled_without_fused_multiply_add(dtype):
    """x * (1 / scale) must be rounded before the rounding constant is added, as in the reference."""
    code, _ = sass.disassemble(aot.compile_quantize(90, dtype).code)
    rounding = [i for i in code if "12582912" in i.operands]
    assert rounding
    assert {i.base for i in rounding} <= {"FADD", "FADD2"}, rounding
    assert not any(i.base in ("LDL", "STL") for i in code)


def test_the_twin_compiles_for_amd():
    """Only that it compiles: `refuses` keeps AMD devices on other kernels until one has run it."""
    built = aot.compile_matmul(tiles(80, 64)[0], "gfx942", 64, False)
    assert built.code
    assert "elementwise_inline_asm" not in built.ttgir


def test_interpreted_programs_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_quantize(90)


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   IMMA.16832.S8.S8 R8, R4, R6, R8 ;
        /*0030*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0040*/                   SYNCS.PHASECHK P1, [UR4] ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   STL [R1], R8 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
"""


def test_the_hot_loop_leaves_out_wait_loops():
    code = [sass.Instruction(int(m[1], 16), m[2], m[3], m[4].strip()) for m in map(sass.LINE.match, LOOP.splitlines()) if m]
    assert len(code) == 10
    assert [i.opcode for i in sass.hot_loop(code)] == ["LDG.E.128", "IMMA.16832.S8.S8", "IADD3", "BRA"]
    assert sass.multiply_adds("IMMA.16832.S8.S8") == 16 * 8 * 32
    assert sass.multiply_adds("IGMMA.64x128x32.S8.S8") == 64 * 128 * 32 // 4
