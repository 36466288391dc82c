"""`e2m1`: the 4-bit floats of `fp4_block` -> COMPUTE, times their block's scale; exact in float16 and bfloat16.

Bits. A code is s ee m. Under the lowest two bits of the exponent and the highest of the mantissa of a 16-bit float it reads as
value * 2^-14 (float16) or value * 2^-126 (bfloat16), 0.5 being a subnormal. The codes of four bytes, two slices of K, lie in a
32-bit word where both kinds of float cost the same, eleven instructions for eight weights: in each half of it, one parity of k,

    bit     15  14  13  12  11-9  8-6  5-3  2-0
    code     a   d   b   c    a    b    c    d      a, b: slice 0, k and k + 2; c, d: slice 1 (`PLACES`)

Scales. A byte eeeeemmm is (1 + mmm / 8) * 2^(eeeee - 15), bits of a float16. In bfloat16 the top of the exponent is filled with
ones, which multiplies by 2^112: then both kinds of product are value * scale * 2^-14, of six significant bits and exact. Byte 0
does not occur beside a code other than 0. A word holds four scales: of slices, or of pairs of slices if a block has one word.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"
# ruff: noqa: RUF005 (Triton has no iterable unpacking)

from __future__ import annotations

import triton
import triton.language as tl

PLACES = tl.constexpr(((9, 15), (6, 13), (3, 12), (0, 14)))  # of a, b, c, d: first bit of ee m, bit of s

# $0, $1: slice 0, k and k + 1, then k + 2 and k + 3; $2, $3: slice 1. d is alone in its word when it is multiplied: both of its
# shifts in one instruction, and what they leave elsewhere is masked.
CODES_FP16 = """and.b32 $0, $8, 0x8e008e00;
shl.b32 t, $8, 3; and.b32 t, t, 0x0e000e00; shl.b32 u, $8, 2; lop3.b32 $1, u, 0x80008000, t, 0xea;
shl.b32 t, $8, 6; and.b32 t, t, 0x0e000e00; shl.b32 u, $8, 3; lop3.b32 $2, u, 0x80008000, t, 0xea;
and.b32 t, $8, 0x40074007; mul.lo.u32 t, t, 0x202; and.b32 $3, t, 0x8e008e00;
"""
CODES_BF16 = """shr.b32 t, $8, 3; and.b32 t, t, 0x01c001c0; lop3.b32 $0, $8, 0x80008000, t, 0xea;
and.b32 t, $8, 0x01c001c0; shl.b32 u, $8, 2; lop3.b32 $1, u, 0x80008000, t, 0xea;
shl.b32 t, $8, 3; and.b32 $2, t, 0x81c081c0;
and.b32 t, $8, 0x40074007; mul.lo.u32 t, t, 0x42; and.b32 $3, t, 0x81c081c0;
"""
SCALE_FP16 = "shl.b32 {}, t, 7;\n"
SCALE_BF16 = "mad.lo.u32 {}, t, 16, 0x70007000;\n"
CODES = tl.constexpr({"fp16": CODES_FP16, "bf16": CODES_BF16})
SCALE = tl.constexpr({"fp16": SCALE_FP16, "bf16": SCALE_BF16})


@triton.constexpr_function
def fragment(kind, low, high):
    """Outputs: the weights $0-$3, their scales in both halves of $4 = $5 and $6 = $7. Inputs: four bytes $8, the word $9 (and
    again in $10-$12), whose bytes `low` and `high` are the scales of the two slices. kind: fp16 or bf16."""
    body = CODES.value[kind]
    for out, byte in ((4, low), (6, high)):
        if out == 6 and high == low:
            body += "mov.b32 $6, $4;\n"
        else:
            scale = SCALE.value[kind].format(f"${out}")
            body += f"prmt.b32 t, $9, 0, {0x4040 + 0x0101 * byte:#x};\n{scale}"
        body += f"mov.b32 ${out + 1}, ${out};\n"
    return f"{{ .reg .b32 t, u;\n{body}}}"


@triton.constexpr_function
def scale_index(slice_, slices, words):
    """Which of the 4 * words scales of a block belongs to a slice."""
    return slice_ * 4 * words // slices


@triton.constexpr_function
def shifts(slice_, part):
    """Where `PLACES` has ee m (part 0) or s (part 1) of bytes 0 and 2 of a word."""
    return PLACES.value[2 * slice_][part], PLACES.value[2 * slice_ + 1][part]


@triton.jit
def plain_word(packed):
    """uint8 [R, S] -> the word that each byte belongs to, int32 [R, S]."""
    four = tl.reshape(packed.to(tl.int32), (packed.shape[0], packed.shape[1] // 4, 4))
    word = tl.sum(four << (8 * tl.arange(0, 4))[None, None, :], 2)
    return tl.reshape(tl.broadcast_to(word[:, :, None], four.shape), packed.shape)


@triton.jit
def plain_codes(packed, SLICE: tl.constexpr):
    """The plain twin of the first part of the fragment: uint8 [R, S] -> float16 [R, S], value * 2^-14."""
    word = plain_word(packed)
    byte = tl.arange(0, packed.shape[1])[None, :] % 4
    FIRST: tl.constexpr = shifts(SLICE, 0)
    SIGN: tl.constexpr = shifts(SLICE, 1)
    half = 16 * (byte % 2)
    code = (word >> (tl.where(byte < 2, FIRST[0], FIRST[1]) + half)) & 7
    sign = (word >> (tl.where(byte < 2, SIGN[0], SIGN[1]) + half)) & 1
    return ((code << 9) | (sign << 15)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def plain_slice(packed, word, SLICE: tl.constexpr, SCALE: tl.constexpr, T: tl.constexpr):
    scale = (((word >> (8 * (SCALE % 4))) & 255) << 7).to(tl.int16).to(tl.float16, bitcast=True)
    if word.shape[1] == 1:  # K is dimension 1, as when weights are the left operand
        return (plain_codes(packed, SLICE) * scale).to(T)
    else:
        return (tl.trans(plain_codes(tl.trans(packed), SLICE)) * scale).to(T)


@triton.jit
def inline_plane(packed, word, LOW: tl.constexpr, HIGH: tl.constexpr, COMPUTE: tl.constexpr):
    OUT: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r"
    args = [packed, tl.broadcast_to(word, packed.shape)]
    if COMPUTE == "bf16":
        f = tl.inline_asm_elementwise(fragment("bf16", LOW, HIGH), OUT, args, dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4)
        return f[0] * f[2], f[1] * f[3]
    else:
        f = tl.inline_asm_elementwise(fragment("fp16", LOW, HIGH), OUT, args, dtype=(tl.float16,) * 4, is_pure=True, pack=4)
        return f[0] * f[2], f[1] * f[3]


@triton.jit
def e2m1(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    T: tl.constexpr = tl.bfloat16 if COMPUTE == "bf16" else (tl.float16 if COMPUTE == "fp16" else tl.float32)
    S: tl.constexpr = 2 * len(planes)
    W: tl.constexpr = len(words)
    out = ()
    for p in tl.static_range(len(planes)):
        word = words[scale_index(2 * p, S, W) // 4]
        if INLINE:
            w = inline_plane(planes[p], word, scale_index(2 * p, S, W) % 4, scale_index(2 * p + 1, S, W) % 4, COMPUTE)
            out = out + (w[0].to(T), w[1].to(T))
        else:
            out = out + (plain_slice(planes[p], word, 0, scale_index(2 * p, S, W), T),)
            out = out + (plain_slice(planes[p], word, 1, scale_index(2 * p + 1, S, W), T),)
    return out
