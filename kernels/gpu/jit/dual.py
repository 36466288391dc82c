"""Two planes of bits with a scale each per group times float tokens, and the same weights as a dense matrix.

    y[m, n] = sum_g a1[n, g] * sum_{k in g} B1[n, k] x[m, k] + a2[n, g] * sum_{k in g} B2[n, k] x[m, k]

The inner sums are matrix products, and a bit need not move to become an operand: an int16 holds column k of eight rows of the
weight, plane 1 of row r at bit 7 + r and plane 2 where it comes to lie there when the two bytes change places. So one `prmt`
and sixteen `lop3` unpack a 32-bit word, two columns of eight rows. Each leaves a pair of floats: LOW where the bit is 0 and
LOW + STEP where it is 1, both the same for a row, whose sums are divided by its STEP at the end.

float16: LOW = 0. bfloat16: LOW = 2, but in row 7; those sums start from a product of the tokens and -2, one for all rows. Row 6
reaches 2^65 times its sums on the way. float32: 0 and 1, a multiplication each.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"
# ruff: noqa: RUF005 (Triton has no iterable unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.fragments import AND_OR, TWICE
from quant.kernels.gpu.jit.gemm import bfloat16_bits, finish
from quant.kernels.gpu.jit.unpack import float_type

ROWS = tl.constexpr(8)  # that share an int16
UNIT = tl.constexpr(16)  # rows 128 i + 16 r + j, r below 8, share column 16 i + j of the packed weight
FIRST_BIT = tl.constexpr(7)
# The bits put beside that of row r, and what that one adds then.
BESIDE_BF16 = tl.constexpr((0x4000,) * 7 + (0,))
STEP_FP16 = tl.constexpr((2.0**-17, 2.0**-16, 2.0**-15, 2.0**-14, 2.0**-13, 2.0**-11, 2.0**-7, 2.0))
STEP_BF16 = tl.constexpr((*(2.0 ** (1 + 2**row) - 2 for row in range(7)), 2.0))
LOW = 2.0  # of the first LIFTED rows, in bfloat16
LIFTED = tl.constexpr(7)


def fragment(beside: tuple[int, ...]) -> str:
    """$16: a word -> $r: plane 1 of row r, $8 + r: plane 2, a pair of floats each."""
    body = "prmt.b32 other, $16, 0, 0x2301;\n"
    for plane, word in enumerate(("$16", "other")):
        for row, bits in enumerate(beside):
            mask = TWICE << FIRST_BIT.value + row
            body += f"lop3.b32 ${8 * plane + row}, {word}, {mask:#x}, {bits * TWICE:#x}, {AND_OR:#x};\n"
    return f"{{ .reg .b32 other;\n{body}}}"


PLANES_FP16 = tl.constexpr(fragment((0,) * 8))
PLANES_BF16 = tl.constexpr(fragment(BESIDE_BF16.value))
SCALES = tl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")


@triton.jit
def unpack(packed, COMPUTE: tl.constexpr, INLINE: tl.constexpr):
    """What `operand` picks from: the 16 planes of an int16 tile, or for the plain code two int32 tiles, plane 1 and plane 2."""
    OUT: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r"
    if INLINE and COMPUTE == "fp16":
        return tl.inline_asm_elementwise(PLANES_FP16, OUT, [packed], dtype=(tl.float16,) * 16, is_pure=True, pack=2)
    elif INLINE and COMPUTE == "bf16":
        return tl.inline_asm_elementwise(PLANES_BF16, OUT, [packed], dtype=(tl.bfloat16,) * 16, is_pure=True, pack=2)
    else:
        word = packed.to(tl.int32) & 0xFFFF
        return word, (word >> 8) | (word & 255) << 8


@triton.jit
def operand(w, PLANE: tl.constexpr, ROW: tl.constexpr, COMPUTE: tl.constexpr, TOKENS: tl.constexpr, INLINE: tl.constexpr):
    """LOW or LOW + STEP of tokens of type TOKENS, in COMPUTE."""
    if INLINE and COMPUTE != "fp32":
        return w[8 * PLANE + ROW]
    else:
        bit = w[PLANE] & (128 << ROW)
        if TOKENS == "fp32":
            return (bit * (127 << 16 - ROW)).to(tl.float32, bitcast=True)
        elif TOKENS == "bf16":  # COMPUTE is float32 in the interpreter, which gets bfloat16 arithmetic wrong
            return ((bit | BESIDE_BF16[ROW]) << 16).to(tl.float32, bitcast=True).to(float_type(COMPUTE))
        else:
            return bit.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def scales(word, INLINE: tl.constexpr):
    """a1 and a2 in float32 of two float16 in an int32, or of two float32 in an int64."""
    if word.dtype == tl.int64:
        return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif INLINE:
        return tl.inline_asm_elementwise(SCALES, "=r,=r,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
    else:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        return low.to(tl.float16, bitcast=True).to(tl.float32), high.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def row_of(u, ROW: tl.constexpr):
    """Row of the weight from a column of the packed one."""
    return u // UNIT * (UNIT * ROWS) + ROW * UNIT + u % UNIT


@triton.jit
def product(w, x, rest, acc, COMPUTE: tl.constexpr, INLINE: tl.constexpr):
    """acc + w (x + rest). float32: w, x and rest are exact, or nearly so, in the eleven bits of a TF32 operand."""
    if COMPUTE == "fp32":
        PRECISION: tl.constexpr = "tf32" if INLINE else "ieee"
        acc = tl.dot(w, rest, acc, input_precision=PRECISION)
        return tl.dot(w, x, acc, input_precision=PRECISION)
    else:
        return tl.dot(w, x, acc)


@triton.jit(do_not_specialize=["M"])
def dual_gemm(
    x_ptr,
    w_ptr,
    word_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    X_STRIDE,
    SPANS,
    W_STRIDE,
    WORD_STRIDE,
    COMPUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
    BK: tl.constexpr,
    RAGGED: tl.constexpr,
    FEW: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    INLINE: tl.constexpr,
):
    """y [M, N] of BM tokens and the 8 BU rows in BU packed columns, or with SPLIT > 1 its partial sums [SPLIT, M, N].

    x [M, X_STRIDE]; w int16 [SPANS, columns, SPAN], W_STRIDE = columns * SPAN; words int32 or int64 [SPANS, 8 columns],
    WORD_STRIDE = 8 columns, or 0 when one span serves all; both with slack behind. Weights are the left operand of the MMA.
    BK columns at a time, SPAN or an even part of it. RAGGED: x ends at K inside the last span. FEW: rows of x past M are not
    loaded. COMPUTE is TOKENS, the type of x, or fp32.
    """
    PARTS: tl.constexpr = SPAN // BK
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    k = tl.arange(0, BK)
    x_at = tl.minimum(m, M - 1).to(tl.int64)[None, :] * X_STRIDE + k[:, None]
    x_in = (m < M)[None, :]
    w_at = (tl.arange(0, BU) * SPAN)[:, None] + k[None, :]
    w_ptr += tl.program_id(1).to(tl.int64) * (BU * SPAN)
    word_ptr += row_of(u, 0)
    first, last = 0, SPANS
    if SPLIT > 1:
        stretch = tl.cdiv(SPANS, SPLIT)
        first = tl.program_id(2) * stretch
        last = tl.minimum(first + stretch, SPANS)
        w_ptr += first.to(tl.int64) * W_STRIDE
        word_ptr += first.to(tl.int64) * WORD_STRIDE
        x_ptr += first * SPAN
    zero = tl.zeros((BU, BM), tl.float32)
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (zero,)
    for b in tl.range(first * PARTS, last * PARTS, num_stages=3):  # named here, it fetches the words ahead too
        if RAGGED:
            inside = k[:, None] + b * BK < K
            if FEW:
                inside = inside & x_in
            x = tl.load(x_ptr + x_at, mask=inside, other=0.0)
        elif FEW:
            x = tl.load(x_ptr + x_at, mask=x_in, other=0.0)
        else:
            x = tl.load(x_ptr + x_at)
        rest = x
        if COMPUTE == "fp32":
            whole = x.to(tl.float32)
            x = (whole.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            rest = whole - x
        w = unpack(tl.load(w_ptr + w_at), COMPUTE, INLINE)
        lifted = zero
        if TOKENS == "bf16":
            lifted = product(tl.full((BU, BK), -2.0, x.dtype), x, rest, zero, COMPUTE, INLINE)
        sums = ()
        for r in tl.static_range(ROWS):
            a1, a2 = scales(tl.load(word_ptr + r * UNIT)[:, None], INLINE)
            start = lifted if TOKENS == "bf16" and r < LIFTED else zero
            one = product(operand(w, 0, r, COMPUTE, TOKENS, INLINE), x, rest, start, COMPUTE, INLINE)
            two = product(operand(w, 1, r, COMPUTE, TOKENS, INLINE), x, rest, start, COMPUTE, INLINE)
            sums = sums + (acc[r] + one * a1 + two * a2,)
        acc = sums
        x_ptr += BK
        if PARTS == 1:
            w_ptr += W_STRIDE
            word_ptr += WORD_STRIDE
        else:
            end = (b + 1) % PARTS == 0
            w_ptr += tl.where(end, W_STRIDE - (PARTS - 1) * BK, BK)
            word_ptr += tl.where(end, WORD_STRIDE, 0)
    for r in tl.static_range(ROWS):
        n = row_of(u, r)
        y = tl.trans(acc[r])
        if TOKENS != "fp32":
            y = y * (1 / (STEP_BF16[r] if TOKENS == "bf16" else STEP_FP16[r]))
        if SPLIT > 1:
            at = (tl.program_id(2).to(tl.int64) * M + m.to(tl.int64)[:, None]) * N + n[None, :]
            tl.store(y_ptr + at, y, mask=(m < M)[:, None] & (n < N)[None, :])
        else:
            finish(y, m, n, None, row_scale_ptr, bias_ptr, y_ptr, M, N)


@triton.jit
def dual_dense(
    w_ptr,
    word_ptr,
    dense_ptr,
    N,
    K,
    W_STRIDE,
    WORD_STRIDE,
    SPAN: tl.constexpr,
    BU: tl.constexpr,
):
    """The rows in BU packed columns, of span `program_id(2)`, of dense [N, K], rounded once. An int16 dense_ptr takes the bits
    of bfloat16."""
    u = tl.program_id(1) * BU + tl.arange(0, BU)
    span = tl.program_id(2)
    column = span * SPAN + tl.arange(0, SPAN)
    w_ptr += span.to(tl.int64) * W_STRIDE + tl.program_id(1).to(tl.int64) * (BU * SPAN)
    packed = tl.load(w_ptr + (tl.arange(0, BU) * SPAN)[:, None] + tl.arange(0, SPAN)[None, :])
    word_ptr += span.to(tl.int64) * WORD_STRIDE + row_of(u, 0)
    for r in tl.static_range(ROWS):
        n = row_of(u, r)
        a1, a2 = scales(tl.load(word_ptr + r * UNIT)[:, None], False)
        one = (packed >> FIRST_BIT + r) & 1
        two = (packed >> ((FIRST_BIT + r) ^ 8)) & 1
        value = one.to(tl.float32) * a1 + two.to(tl.float32) * a2
        if dense_ptr.dtype.element_ty == tl.int16:
            value = bfloat16_bits(value)
        at = n.to(tl.int64)[:, None] * K + column[None, :]
        inside = (n < N)[:, None] & (column < K)[None, :]
        tl.store(dense_ptr + at, value.to(dense_ptr.dtype.element_ty), mask=inside)
