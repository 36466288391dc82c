"""`float4`: the 4-bit floats EeMm of `fp_channel` -> COMPUTE, exact; times the scale of their group, rounded once, if SCALED.

Bits. A code is s xxx, three bits of exponent and mantissa. Shifted so that they straddle the border of exponent and mantissa of
a 16-bit float, they read as value * 2^(b - 15) (float16) or value * 2^(b - 127) (bfloat16), b the bias of the code; an exponent
of 0 makes a subnormal. So e needs no program of its own, only a shift: to bit 7 + e of float16, three less of bfloat16. One
multiplication by 2^14 or 2^126 then gives value * 2^(b - 1); row_scale takes the rest.

Word: float16 bits of the scale | (7 + e) << 16. Nibbles lie as in `int4`: bytes of a word in the order k, k + 2, k + 1, k + 3.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.unpack import float_type, group_scale

# $0, $1: low nibbles of bytes 0 and 2, then 1 and 3; $2, $3: high nibbles. $4: four bytes. $5 (and again in $6-$8): the shift
# of a field at bit 0; $9 (to $12): that of a field at bit 4.
CODES = tl.constexpr("""{ .reg .b32 odd, m, s;
shr.b32 odd, $4, 8;
and.b32 m, $4, 0x00070007; shl.b32 m, m, $5; shl.b32 s, $4, 12; lop3.b32 $0, s, 0x80008000, m, 0xea;
and.b32 m, odd, 0x00070007; shl.b32 m, m, $5; shl.b32 s, $4, 4; lop3.b32 $1, s, 0x80008000, m, 0xea;
and.b32 m, $4, 0x00700070; shl.b32 m, m, $9; shl.b32 s, $4, 8; lop3.b32 $2, s, 0x80008000, m, 0xea;
and.b32 m, odd, 0x00700070; shl.b32 m, m, $9; lop3.b32 $3, $4, 0x80008000, m, 0xea; }""")


@triton.constexpr_function
def unfold(compute):
    """What a code that was read must be multiplied by. float32 unpacks through float16."""
    return 2.0**126 if compute == "bf16" else 2.0**14


@triton.constexpr_function
def lower(compute):
    """By how many bits the exponent of bfloat16 starts lower than that of float16."""
    return 3 if compute == "bf16" else 0


@triton.jit
def plain_float4(code, shift):
    """The twin of one field of the fragment: int32 codes -> float16, value * 2^(b - 15)."""
    return (((code & 7) << shift) | ((code & 8) << 12)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def float4(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    T: tl.constexpr = float_type(COMPUTE)
    packed = planes[0]
    if INLINE:
        OUT: tl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r"
        shift = (words[0] >> 16) - lower(COMPUTE)
        args = [packed, tl.broadcast_to(shift, packed.shape), tl.broadcast_to(shift - 4, packed.shape)]
        if COMPUTE == "bf16":
            f = tl.inline_asm_elementwise(CODES, OUT, args, dtype=(tl.bfloat16,) * 2, is_pure=True, pack=4)
        else:
            f = tl.inline_asm_elementwise(CODES, OUT, args, dtype=(tl.float16,) * 2, is_pure=True, pack=4)
        low, high = (f[0] * unfold(COMPUTE)).to(T), (f[1] * unfold(COMPUTE)).to(T)
    else:
        code = packed.to(tl.int32)
        low = (plain_float4(code & 15, words[0] >> 16) * unfold("fp16")).to(T)
        high = (plain_float4(code >> 4, words[0] >> 16) * unfold("fp16")).to(T)
    if SCALED:
        low, high = low * group_scale(words[0], T), high * group_scale(words[0], T)
    return low, high
