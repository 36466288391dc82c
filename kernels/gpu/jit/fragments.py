"""PTX fragments: what inline assembly does to one or more 32-bit words of packed codes. Strings only; proven in the tests.

Operands are numbered as `tl.inline_asm_elementwise` numbers them: outputs $0.., then inputs. Each string is checked word by
word over all its inputs by `kernels/gpu/ptx.py`, and each has a plain twin in `unpack.py`.

To floats: a bit field that starts at bit f of a 16-bit half, under the exponent of 2^(p - f) with p = 10 (float16) or 7
(bfloat16), reads as 2^(p - f) + code, one instruction for two weights. Subtracting 2^(p - f) + zero is exact. The bytes of a
word lie in memory order k, k + 2, k + 1, k + 3, so that bytes 0 and 2, which land in one register, are neighbours along K.
"""

from __future__ import annotations

import triton.language as tl

TWICE = 0x00010001  # one value into both halves of a word
AND_OR = 0xEA  # lop3: (a & b) | c
SELECT = 0xD8  # lop3: c ? b : a, bit by bit

# Four bytes, two nibbles each -> eight int8 weights. $2: packed codes; $3: parameter word (s_lo, b_lo, s_hi, b_hi).
# u * s + b stays in 0..255 for every code, so one 32-bit multiply-add serves four bytes without a carry; the xor takes
# 128 off each byte. AFFINE: both halves use (s_lo, b_lo). AFFINE_PAIR: the high half has its own group.
AFFINE = tl.constexpr("""{ .reg .b32 lo, hi, s, b;
prmt.b32 s, $3, 0, 0x4440; prmt.b32 b, $3, 0, 0x1111;
and.b32 lo, $2, 0x0f0f0f0f; shr.b32 hi, $2, 4; and.b32 hi, hi, 0x0f0f0f0f;
mad.lo.u32 lo, lo, s, b; mad.lo.u32 hi, hi, s, b;
xor.b32 $0, lo, 0x80808080; xor.b32 $1, hi, 0x80808080; }""")
AFFINE_PAIR = tl.constexpr("""{ .reg .b32 lo, hi, s, b;
prmt.b32 s, $3, 0, 0x4440; prmt.b32 b, $3, 0, 0x1111;
and.b32 lo, $2, 0x0f0f0f0f; shr.b32 hi, $2, 4; and.b32 hi, hi, 0x0f0f0f0f;
mad.lo.u32 lo, lo, s, b; prmt.b32 s, $3, 0, 0x4442; prmt.b32 b, $3, 0, 0x3333; mad.lo.u32 hi, hi, s, b;
xor.b32 $0, lo, 0x80808080; xor.b32 $1, hi, 0x80808080; }""")

# Eight bits: float16 holds 1024 + code; bfloat16 cannot, so those codes go through float32, 2^23 + code.
BYTES_FP16 = tl.constexpr("{ prmt.b32 $0, $2, 0x64646464, 0x4140; prmt.b32 $1, $2, 0x64646464, 0x4342; }")
BYTES_FP32 = tl.constexpr("""{ prmt.b32 $0, $4, 0x4b000000, 0x7440; prmt.b32 $1, $4, 0x4b000000, 0x7441;
prmt.b32 $2, $4, 0x4b000000, 0x7442; prmt.b32 $3, $4, 0x4b000000, 0x7443; }""")


def field(out: int, word: str, bits: int, start: int, exponent: int) -> str:
    """$out = both halves of `word`: the field of `bits` bits at bit `start`, under `exponent` (the high bits of a float)."""
    mask = ((1 << bits) - 1 << start) * TWICE
    return f"lop3.b32 ${out}, {word}, {mask:#x}, {exponent * TWICE:#x}, {AND_OR:#x};\n"


def split_fields(bits: int, places: list[tuple[int, int, int]]) -> str:
    """One plane of `bits`-bit fields -> 2 * len(places) registers. places: (shift right first, bit, exponent) of each field."""
    source = f"${2 * len(places)}"
    body = ""
    for i, (shift, start, exponent) in enumerate(places):
        for odd in (0, 8):  # bytes 0 and 2, then 1 and 3
            name = source
            if shift + odd:
                name = f"s{shift + odd}"
                line = f"shr.b32 {name}, {source}, {shift + odd};\n"
                body = body if line in body else body + line
            body += field(2 * i + odd // 8, name, bits, start, exponent)
    names = sorted({word.rstrip(",") for word in body.split() if word[0] == "s" and word[1:].rstrip(",").isdigit()})
    return f"{{ .reg .b32 {', '.join(names)};\n{body}}}"


def three_bit_fields(bfloat16: bool) -> str:
    """Planes $16 and $17 hold the low two bits of slices 0-3 and 4-7, $18 the third bits, at 2i + 1 and at 2i: sixteen
    registers. The third bit is moved above its pair first, for the fields that do not touch each other in one go."""
    body = ""
    for odd in (0, 1):
        body += f"shr.b32 a, $16, {8 * odd};\nshr.b32 b, $17, {8 * odd};\n"
        body += "shr.b32 u, $18, 7;\nshr.b32 v, $18, 6;\n" if odd else "shl.b32 u, $18, 1;\nshl.b32 v, $18, 2;\n"
        for plane, (low, high) in enumerate((("a", "u"), ("b", "v"))):
            body += f"lop3.b32 p, {low}, {high}, {0x44 * TWICE:#x}, {SELECT:#x};\n"  # fields at bits 0 and 4
            body += f"lop3.b32 q, {low}, {high}, {0x110 * TWICE:#x}, {SELECT:#x};\n"  # fields at bits 2 and 6
            out = 8 * plane + odd
            if bfloat16:
                body += field(out, "p", 3, 0, 0x4300) + field(out + 2, "q", 3, 2, 0x4200) + field(out + 4, "p", 3, 4, 0x4100)
                body += "shr.b32 q, q, 6;\n" + field(out + 6, "q", 3, 0, 0x4300)
            else:
                body += field(out, "p", 3, 0, 0x6400) + field(out + 2, "q", 3, 2, 0x5C00)
                body += field(out + 4, "p", 3, 4, 0x5400) + field(out + 6, "q", 3, 6, 0x4C00)
    return f"{{ .reg .b32 a, b, u, v, p, q;\n{body}}}"


NIBBLES_FP16 = tl.constexpr(split_fields(4, [(0, 0, 0x6400), (0, 4, 0x5400)]))
NIBBLES_BF16 = tl.constexpr(split_fields(4, [(0, 0, 0x4300), (4, 0, 0x4300)]))
PAIRS_FP16 = tl.constexpr(split_fields(2, [(0, 0, 0x6400), (0, 2, 0x5C00), (0, 4, 0x5400), (0, 6, 0x4C00)]))
PAIRS_BF16 = tl.constexpr(split_fields(2, [(0, 0, 0x4300), (0, 2, 0x4200), (0, 4, 0x4100), (6, 0, 0x4300)]))
TRIPLES_FP16 = tl.constexpr(three_bit_fields(bfloat16=False))
TRIPLES_BF16 = tl.constexpr(three_bit_fields(bfloat16=True))

# The zero point of a group, put under the exponent of a slice in the upper half of a word. $1: parameter word, shifted;
# $2: mask of the field in the upper half; $3: the exponent, twice. As a fragment, because Triton's compiler would narrow the
# constant to 16 bits, which is not the one that the codes' own lop3 keeps in a register: a move for every zero.
ZERO = tl.constexpr(f"lop3.b32 $0, $1, $2, $3, {AND_OR:#x};")

# Where the fragment leaves the code of each slice, so that the spread zero point of a group (`spread_zero` in layout.py) can be
# put under the same exponent: (left shift of the spread zero, first bit of the field, exponent).
NIBBLES_FP16_PLACES = tl.constexpr(((0, 0, 0x6400), (0, 4, 0x5400)))
NIBBLES_BF16_PLACES = tl.constexpr(((0, 0, 0x4300), (0, 0, 0x4300)))
PAIRS_FP16_PLACES = tl.constexpr(((0, 0, 0x6400), (0, 2, 0x5C00), (0, 4, 0x5400), (0, 6, 0x4C00)))
PAIRS_BF16_PLACES = tl.constexpr(((0, 0, 0x4300), (0, 2, 0x4200), (0, 4, 0x4100), (0, 0, 0x4300)))
TRIPLES_FP16_PLACES = tl.constexpr(((0, 0, 0x6400), (2, 2, 0x5C00), (0, 4, 0x5400), (2, 6, 0x4C00)) * 2)
TRIPLES_BF16_PLACES = tl.constexpr(((0, 0, 0x4300), (2, 2, 0x4200), (0, 4, 0x4100), (0, 0, 0x4300)) * 2)
BYTES_FP16_PLACES = tl.constexpr(((0, 0, 0x6400),))
