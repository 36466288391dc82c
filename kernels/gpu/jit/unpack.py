"""Weight policies of the tile loop: each turns the packed bytes of one K block into tiles that the matrix unit takes.

A policy gets `planes` (tuple of uint8 tiles of one shape), `words` (tuple of int32 parameter tiles that broadcast to it, one
per group of the block) and returns one tile per slice of K. Every bit field of a byte belongs to another slice, so nothing is
joined, shuffled or interleaved (`kernels/gpu/layout.py`). A new format joins with one function here and a `Policy` there.

    dual4, dual4_pair   int4_dual -> int8: u * s + o, exact. Word: bytes s_lo, b_lo, s_hi, b_hi, b = 128 + o
    bytes8              int8 as it is; no words
    int2 int3 int4 int8 int_group -> COMPUTE: code - zero, exact; times the scale, rounded once, if SCALED.
                        Word: float16 bits of the scale | zero spread << 16, see `spread_zero` in `kernels/gpu/layout.py`

INLINE (NVIDIA) runs the PTX of `fragments.py`; the interpreter and other GPUs run the plain twin beside it.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"
# ruff: noqa: RUF005 (Triton has no iterable unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.fragments import (
    AFFINE,
    AFFINE_PAIR,
    BYTES_FP16,
    BYTES_FP16_PLACES,
    BYTES_FP32,
    NIBBLES_BF16,
    NIBBLES_BF16_PLACES,
    NIBBLES_FP16,
    NIBBLES_FP16_PLACES,
    PAIRS_BF16,
    PAIRS_BF16_PLACES,
    PAIRS_FP16,
    PAIRS_FP16_PLACES,
    TRIPLES_BF16,
    TRIPLES_BF16_PLACES,
    TRIPLES_FP16,
    TRIPLES_FP16_PLACES,
    ZERO,
)


@triton.jit
def affine_twin(packed, word, PAIR: tl.constexpr):
    s_low, b_low = word & 255, (word >> 8) & 255
    s_high, b_high = s_low, b_low
    if PAIR:
        s_high, b_high = (word >> 16) & 255, (word >> 24) & 255
    low = (((packed & 15).to(tl.int32) * s_low + b_low) ^ 128).to(tl.int8)
    high = (((packed >> 4).to(tl.int32) * s_high + b_high) ^ 128).to(tl.int8)
    return low, high


@triton.jit
def dual4(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    if INLINE:
        args = [planes[0], tl.broadcast_to(words[0], planes[0].shape)]
        return tl.inline_asm_elementwise(AFFINE, "=&r,=&r,r,r,r,r,r", args, dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        return affine_twin(planes[0], words[0], False)


@triton.jit
def dual4_pair(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    if INLINE:
        args = [planes[0], tl.broadcast_to(words[0], planes[0].shape)]
        return tl.inline_asm_elementwise(AFFINE_PAIR, "=&r,=&r,r,r,r,r,r", args, dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        return affine_twin(planes[0], words[0], True)


@triton.jit
def bytes8(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    return (planes[0].to(tl.int8, bitcast=True),)


@triton.constexpr_function
def float_type(COMPUTE):
    """A type, which a jitted function cannot return in Triton 3.6."""
    return tl.float16 if COMPUTE == "fp16" else (tl.bfloat16 if COMPUTE == "bf16" else tl.float32)


@triton.jit
def group_scale(word, T: tl.constexpr):
    """The scale of a parameter word in T; exact in float16 and float32."""
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(T)


@triton.jit
def from_fields(fields, words, PLACES: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr):
    """fields[i] = 2^p + code -> code - zero. PLACES[i] = (left shift, first bit, exponent) puts the zero where the code is."""
    out = ()
    T: tl.constexpr = float_type(COMPUTE)
    NARROW: tl.constexpr = tl.bfloat16 if COMPUTE == "bf16" else tl.float16  # float32 unpacks through float16: exact too
    for i in tl.static_range(len(fields)):
        word = words[i * len(words) // len(fields)]
        mask = tl.full(word.shape, (2**BITS - 1) << (PLACES[i][1] + 16), tl.int32)
        exponent = tl.full(word.shape, PLACES[i][2] * 0x10001, tl.int32)
        args = [word << PLACES[i][0], mask, exponent]
        both = tl.inline_asm_elementwise(ZERO, "=r,r,r,r", args, dtype=tl.int32, is_pure=True, pack=1)
        zero = (both >> 16).to(tl.int16).to(NARROW, bitcast=True)
        w = (fields[i] - zero).to(T)
        if SCALED:
            w = w * group_scale(word, T)
        out = out + (w,)
    return out


@triton.jit
def from_codes(codes, words, BITS: tl.constexpr, COMPUTE: tl.constexpr, SCALED: tl.constexpr):
    """The plain twin of a fragment and `from_fields`."""
    out = ()
    T: tl.constexpr = float_type(COMPUTE)
    for i in tl.static_range(len(codes)):
        word = words[i * len(words) // len(codes)]
        w = (codes[i].to(tl.int32) - ((word >> 16) & (2**BITS - 1))).to(T)
        if SCALED:
            w = w * group_scale(word, T)
        out = out + (w,)
    return out


@triton.jit
def int4(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    OUT: tl.constexpr = "=&r,=&r,=&r,=&r,r"
    if not INLINE:
        return from_codes((planes[0] & 15, planes[0] >> 4), words, 4, COMPUTE, SCALED)
    elif COMPUTE == "bf16":
        f = tl.inline_asm_elementwise(NIBBLES_BF16, OUT, planes, dtype=(tl.bfloat16,) * 2, is_pure=True, pack=4)
        return from_fields(f, words, NIBBLES_BF16_PLACES, 4, COMPUTE, SCALED)
    else:
        f = tl.inline_asm_elementwise(NIBBLES_FP16, OUT, planes, dtype=(tl.float16,) * 2, is_pure=True, pack=4)
        return from_fields(f, words, NIBBLES_FP16_PLACES, 4, COMPUTE, SCALED)


@triton.jit
def int2(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    OUT: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r"
    if not INLINE:
        p = planes[0]
        return from_codes((p & 3, (p >> 2) & 3, (p >> 4) & 3, p >> 6), words, 2, COMPUTE, SCALED)
    elif COMPUTE == "bf16":
        f = tl.inline_asm_elementwise(PAIRS_BF16, OUT, planes, dtype=(tl.bfloat16,) * 4, is_pure=True, pack=4)
        return from_fields(f, words, PAIRS_BF16_PLACES, 2, COMPUTE, SCALED)
    else:
        f = tl.inline_asm_elementwise(PAIRS_FP16, OUT, planes, dtype=(tl.float16,) * 4, is_pure=True, pack=4)
        return from_fields(f, words, PAIRS_FP16_PLACES, 2, COMPUTE, SCALED)


@triton.jit
def int3(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    OUT: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r"
    if not INLINE:
        codes = ()
        for i in tl.static_range(8):
            pair = (planes[i // 4] >> (2 * (i % 4))) & 3
            third = (planes[2] >> (2 * (i % 4) + 1 - i // 4)) & 1
            codes = codes + (pair | (third << 2),)
        return from_codes(codes, words, 3, COMPUTE, SCALED)
    elif COMPUTE == "bf16":
        f = tl.inline_asm_elementwise(TRIPLES_BF16, OUT, planes, dtype=(tl.bfloat16,) * 8, is_pure=True, pack=4)
        return from_fields(f, words, TRIPLES_BF16_PLACES, 3, COMPUTE, SCALED)
    else:
        f = tl.inline_asm_elementwise(TRIPLES_FP16, OUT, planes, dtype=(tl.float16,) * 8, is_pure=True, pack=4)
        return from_fields(f, words, TRIPLES_FP16_PLACES, 3, COMPUTE, SCALED)


@triton.jit
def int8(planes, words, COMPUTE: tl.constexpr, SCALED: tl.constexpr, INLINE: tl.constexpr):
    if not INLINE:
        return from_codes((planes[0],), words, 8, COMPUTE, SCALED)
    elif COMPUTE == "fp16":
        f = tl.inline_asm_elementwise(BYTES_FP16, "=&r,=&r,r", planes, dtype=tl.float16, is_pure=True, pack=4)
        return from_fields((f,), words, BYTES_FP16_PLACES, 8, COMPUTE, SCALED)
    else:
        T: tl.constexpr = float_type(COMPUTE)
        f = tl.inline_asm_elementwise(BYTES_FP32, "=&r,=&r,=&r,=&r,r", planes, dtype=tl.float32, is_pure=True, pack=4)
        zero = ((words[0] >> 16) | 0x4B000000).to(tl.float32, bitcast=True)
        w = (f - zero).to(T)
        if SCALED:
            w = w * group_scale(words[0], T)
        return (w,)
