"""`float8`: the 8-bit floats EeMm of `fp_channel`, of any e -> COMPUTE, exact. Scales are per row and left to the epilogue.

Bits. A code is a sign and seven bits of exponent and mantissa. Shifted left by e, those straddle the border of exponent and
mantissa of bfloat16 and read as value * 2^(b - 127), b the bias of the code; an exponent of 0 makes a subnormal. One
multiplication by 2^111 gives value * 2^(b - 16), which for every e is in the range of float16 too. (E5M2 reaches 114688 and
itself is not.) row_scale takes the rest.

Word: float16 bits of 1 | e << 16. Bytes of a word lie in the order k, k + 2, k + 1, k + 3.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.unpack import float_type

UNFOLD = tl.constexpr(2.0**111)

# $0: bytes 0 and 2; $1: bytes 1 and 3. $2: four bytes. $3 (and again in $4-$6): e; $7 (to $10): 8 - e.
CODES = tl.constexpr("""{ .reg .b32 m, s;
and.b32 m, $2, 0x007f007f; shl.b32 m, m, $3; shl.b32 s, $2, 8; lop3.b32 $0, s, 0x80008000, m, 0xea;
and.b32 m, $2, 0x7f007f00; shr.b32 m, m, $7; lop3.b32 $1, $2, 0x80008000, m, 0xea; }""")


@triton.jit
def float8(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    T: tl.constexpr = float_type(COMPUTE)
    packed = planes[0]
    shift = words[0] >> 16
    if INLINE:
        OUT: tl.constexpr = "=&r,=&r,r,r,r,r,r,r,r,r,r"
        args = [packed, tl.broadcast_to(shift, packed.shape), tl.broadcast_to(8 - shift, packed.shape)]
        return ((tl.inline_asm_elementwise(CODES, OUT, args, dtype=tl.bfloat16, is_pure=True, pack=4) * UNFOLD).to(T),)
    else:  # the bits of bfloat16 are the upper ones of float32
        code = packed.to(tl.int32)
        bits = ((code & 127) << (shift + 16)) | ((code & 128) << 24)
        return ((bits.to(tl.float32, bitcast=True) * UNFOLD).to(T),)
