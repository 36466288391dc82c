"""Evaluates straight-line 32-bit PTX on CPU tensors, so that inline assembly can be proven without a GPU.

Shared memory is a tensor of words; a load or store of several is one of each.

The Triton interpreter refuses inline assembly; a fragment is therefore compared, word by word over all its inputs, with the
formula it stands for. Unknown opcodes raise KeyError: nothing passes by accident.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def permute_bytes(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """prmt.b32 without a mode: nibble i of the selector picks byte i of the result from the eight bytes of b:a."""
    out = torch.zeros_like(a + b)
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = torch.where(pick & 4 > 0, b, a) >> 8 * (pick & 3) & 255
        spread = torch.where(byte > 127, 255, 0)
        out |= torch.where(pick & 8 > 0, spread, byte) << 8 * i
    return out


def combine_bits(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """lop3.b32: bit 4 * a + 2 * b + c of the table (one number), for each of the 32 positions."""
    out = torch.zeros_like(a + b + c)
    for i in (i for i in range(8) if int(table) >> i & 1):
        out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


OPCODES: dict[str, Callable[..., Tensor]] = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.b32": lambda a, b: a >> b,
    "lop3.b32": combine_bits,
    "mov.b32": lambda a: a.clone(),
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": permute_bytes,
}


def run(
    assembly: str,
    inputs: Sequence[Tensor],
    outputs: int,
    named: Mapping[str, Tensor] | None = None,
    memory: Tensor | None = None,
) -> list[Tensor]:
    """The `outputs` words $0.. of a fragment whose operands $outputs.. are `inputs`.

    inputs: int64 tensors of one shape holding 0..2^32 - 1; numbering as in `tl.inline_asm_elementwise`. named: what else it
    reads. memory: shared memory, int64 words, which it may change.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)} | dict(named or {})
    for statement in re.sub(r"[{}]", " ", assembly).split(";"):
        words = statement.split(None, 1)
        if not words or words[0] in (".reg", ".shared"):
            continue
        opcode, parts = words[0].replace("mov.u32", "mov.b32"), [part.strip() for part in words[1].split(",")]
        if access := re.fullmatch(r"(ld|st)\.shared(\.v[24])?\.b32", opcode):
            assert memory is not None, assembly
            (place,) = (part for part in parts if part[0] == "[")
            start = registers[place[1:-1]]
            assert bool((start % (4 * len(parts) - 4) == 0).all()), f"misaligned: {statement}"
            for i, name in enumerate(part for part in parts if part != place):
                if access[1] == "ld":
                    registers[name] = memory[start // 4 + i]
                else:
                    memory[start // 4 + i] = registers[name]
            continue
        target, *sources = parts
        values = [registers[s] if s in registers else torch.tensor(int(s, 0)) for s in sources]
        registers[target] = OPCODES[opcode](*values) & MASK
    return [registers[f"${i}"] for i in range(outputs)]
