"""What a compiled kernel costs, read from its machine code: no GPU needed, only the `cuobjdump` in the Triton wheel.

The hot loop is the innermost natural loop with the most matrix instructions; wait loops nested in it do not count.
ALU per weight = ALU instructions of one trip * 32 lanes * warps / weights of one trip.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*([^;]*);")
JUMPS = {"BRA", "JMP"}
ENDS = JUMPS | {"BRX", "BRXU", "JMXU", "RET", "EXIT"}
MMA = re.compile(r"[HIQ]MMA|[HIQB]GMMA|UTC\w*MMA")
PIPES = {
    "int": "LOP3 PRMT SHF IMAD IADD IADD3 LEA VIADD SEL ISETP IABS IMNMX VIMNMX I2IP IDP SGXT POPC BMSK FLO PLOP3 MOV"
    " I2FP F2FP",
    "half": "HFMA2 HADD2 HMUL2 HSETP2 HMNMX2 VHMNMX",
    "float": "FFMA FFMA2 FMUL FMUL2 FADD FADD2 FSEL FSETP FMNMX",
    "convert": "I2F F2F F2I I2I MUFU",
}
PIPE_OF = {base: pipe for pipe, bases in PIPES.items() for base in bases.split()}  # the ALU instructions
GLOBAL_LOADS = {"LDG", "LDGSTS"}
WARPGROUP = 4  # warps that issue one GMMA together


class Instruction(NamedTuple):
    address: int
    predicate: str | None
    opcode: str  # with its suffixes: LDGSTS.E.BYPASS.128
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Registers and spills of the kernel; the rest is one trip of the hot loop, per warp."""

    registers: int
    spills: int  # LDL and STL, whole kernel
    instructions: int
    mma: int
    alu: int
    pipes: dict[str, int]  # the ALU instructions by pipe: int, half (16-bit pairs), float, convert
    loads: dict[str, int]  # global loads by width in bits: {"128": 4}
    alu_per_weight: float


def disassemble(cubin: bytes) -> tuple[list[Instruction], int]:
    """(instructions in address order, registers per thread). Raises RuntimeError when cuobjdump fails."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"REG:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: {done.stderr.strip() or 'no resource usage in the cubin'}")
    lines = map(LINE.match, done.stdout.splitlines())
    code = [Instruction(int(m[1], 16), m[2], m[3], m[4].strip()) for m in lines if m]
    return code, int(found[1])


def flow(code: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of indices into `code`, and the successors of each."""
    index = {instruction.address: i for i, instruction in enumerate(code)}

    def target(i: int) -> int | None:
        found = re.findall(r"0x([0-9a-f]+)", code[i].operands) if code[i].base in JUMPS else []
        return index.get(int(found[-1], 16)) if found else None

    ends = [i for i, instruction in enumerate(code) if instruction.base in ENDS]
    starts = sorted({0, *(i + 1 for i in ends), *(t for i in ends if (t := target(i)) is not None)} - {len(code)})
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block.start: b for b, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for block in blocks:
        last = code[block[-1]]
        conditional = last.predicate is not None or re.match(r"!?U?P\w+\s*,", last.operands)
        after = [block.stop] if (last.base not in ENDS or conditional) and block.stop < len(code) else []
        jump = target(block[-1])
        successors.append([number[i] for i in (*after, *([] if jump is None else [jump]))])
    return blocks, successors


def natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Header -> blocks of its loop, from the edges that return to a block still open in a depth-first walk."""
    back: list[tuple[int, int]] = []
    seen, opened = {0}, {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            opened.discard(block)
            stack.pop()
        elif following in opened:
            back.append((block, following))
        elif following not in seen:
            seen.add(following)
            opened.add(following)
            stack.append((following, iter(successors[following])))
    before: dict[int, list[int]] = {block: [] for block in seen}
    for block in seen:
        for following in successors[block]:
            before[following].append(block)
    loops: dict[int, set[int]] = {}
    for tail, header in back:
        body = loops.setdefault(header, {header})
        todo = [tail]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
    return loops


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The instructions of one trip; empty when no loop holds a matrix instruction."""
    blocks, successors = flow(code)
    loops = natural_loops(successors)

    def mma_in(body: Iterable[int]) -> int:
        return sum(MMA.match(code[i].opcode) is not None for b in body for i in blocks[b])

    best: tuple[int, int] = (0, 0)
    chosen: set[int] = set()
    for header, body in loops.items():
        inner = [other for key, other in loops.items() if key != header and other < body]
        if any(mma_in(other) for other in inner):
            continue
        rank = (mma_in(body), -len(body))
        if rank[0] and rank > best:
            best, chosen = rank, body.difference(*inner)
    return [code[i] for b in sorted(chosen) for i in blocks[b]]


def multiply_adds(opcode: str) -> int:
    """Multiply-adds per warp of one MMA; 0 for tcgen05, whose opcode has no shape."""
    if group := re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return int(group[1]) * int(group[2]) * int(group[3]) // WARPGROUP
    if single := re.match(r"[A-Z]MMA\.(\d\d)(\d)(\d\d)", opcode):  # 16832: 16 x 8 x 32
        return int(single[1]) * int(single[2]) * int(single[3])
    return 0


def load_bits(opcode: str) -> str:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return found[1].lstrip("US") if found else "32"


def spills(code: Iterable[Instruction]) -> int:
    return sum(i.base in ("LDL", "STL") for i in code)


def count(cubin: bytes, *, weights: int, tokens: int, warps: int) -> Counts:
    """`weights` = BN * BK of one K block, `tokens` = BM. A loop unrolled by the compiler is seen from its MMA work.

    Raises RuntimeError when the code has no loop with matrix instructions.
    """
    code, registers = disassemble(cubin)
    trip = hot_loop(code)
    if not trip:
        raise RuntimeError("no loop of this kernel holds a matrix instruction")
    pipes = Counter(PIPE_OF[i.base] for i in trip if i.base in PIPE_OF)
    alu = sum(pipes.values())
    work = sum(multiply_adds(i.opcode) for i in trip) * warps
    blocks = max(1.0, work / (weights * tokens))
    return Counts(
        registers=registers,
        spills=spills(code),
        instructions=len(trip),
        mma=sum(MMA.match(i.opcode) is not None for i in trip),
        alu=alu,
        pipes={pipe: pipes[pipe] for pipe in PIPES},
        loads=dict(Counter(load_bits(i.opcode) for i in trip if i.base in GLOBAL_LOADS)),
        alu_per_weight=round(alu * 32 * warps / (weights * blocks), 3),
    )
