"""Weights that are sums of entries of codebooks times float tokens, and the same weights as a dense matrix.

Entries are looked up inside the K loop. Global memory, or one table in shared memory, would serve the 32 lanes of a warp in
many turns, as the codes fall. So a program first copies the codebook into shared memory, each entry side by side as often as a
ROW of all banks holds it. The lanes that are served at once read copies of their own, in different banks whatever the codes.

A code is an operand of as many products as its entry has elements: element i of all entries meets columns i, i + g, .. of the
tokens. So entries are read where the MMA takes them and nothing moves between threads. Entries longer than PIECE are looked up
in pieces, books and pieces one after the other, each with the copies to itself. Products are added in float32, so no sum of
entries is rounded.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment, var-annotated"
# ruff: noqa: RUF005 (Triton has no iterable unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.gemm import bfloat16_bits, finish

ENTRIES = tl.constexpr(256)
ROW = tl.constexpr(128)  # bytes: all banks


@triton.constexpr_function
def reserve(piece):
    """Declare `book`, for the rest of the program the address of this lane's copy of entry 0. $0: 0, $1: unused.

    A name of the PTX, because `lookup` with a second argument, the same for all codes, is not hoisted to where the MMA reads.
    """
    return f""".reg .b32 book; .shared .align 128 .b8 copies[{ENTRIES.value * ROW.value}];
{{ .reg .b32 start; mov.u32 start, copies; mov.u32 book, %laneid; mul.lo.u32 book, book, {4 * max(1, piece // 2)};
and.b32 book, book, {ROW.value - 4}; add.u32 book, book, start; mov.u32 $0, 0; }}"""


@triton.constexpr_function
def fill(piece):
    """Copy one entry over its row. $1: the entry, $2..: its words. $0: 0."""
    words = [f"${2 + i}" for i in range(max(1, piece // 2))]
    value = ", ".join((words * 4)[:4])
    body = f"mov.u32 row, copies; mad.lo.u32 row, $1, {ROW.value}, row; mov.u32 at, %laneid; shl.b32 at, at, 4;\n"
    for _ in range(ROW.value // 16):  # neighbours begin with different banks
        body += f"and.b32 to, at, {ROW.value - 16}; add.u32 to, to, row; add.u32 at, at, 16;\n"
        body += f"st.shared.v4.b32 [to], {{{value}}};\n"
    return f"{{ .reg .b32 row, at, to;\n{body}mov.u32 $0, 0; }}"


@triton.constexpr_function
def lookup(piece):
    """Four codes in a word -> $(2 i) and $(2 i + 1): element i of their entries, read from the copies at `book`."""
    words, code = max(1, piece // 2), 2 * piece
    entries = [[f"e{i}{word}" for word in range(words)] for i in range(4)]
    body = f".reg .b32 c, at, {', '.join(name for entry in entries for name in entry)};\n"
    for i, entry in enumerate(entries):
        body += f"prmt.b32 c, ${code}, 0, {0x4440 + i:#x};\n"
        body += f"mad.lo.u32 at, c, {ROW.value}, book;\n"
        body += f"ld.shared{('', '', '.v2', '', '.v4')[words]}.b32 {{{', '.join(entry)}}}, [at];\n"
    for i in range(piece):
        for pair in range(2):
            low, high = entries[2 * pair][i // 2], entries[2 * pair + 1][i // 2]
            body += f"prmt.b32 ${2 * i + pair}, {low}, {high}, {0x7632 if i % 2 else 0x5410:#x};\n"
    return f"{{ {body}}}"


@triton.constexpr_function
def fill_registers(piece):
    """The constraints of `fill`."""
    return "=r,r" + ",r" * max(1, piece // 2)


@triton.jit
def copy_book(book_ptr, PIECE: tl.constexpr, GROUP: tl.constexpr):
    """Copy the pieces at book_ptr to shared memory, once every warp has read what was there."""
    entry = tl.arange(0, ENTRIES)
    tl.debug_barrier()
    if PIECE == 8:
        word = book_ptr.to(tl.pointer_type(tl.int64)) + entry * (GROUP // 4)
        one, two = tl.load(word), tl.load(word + 1)
        args = [entry, one.to(tl.int32), (one >> 32).to(tl.int32), two.to(tl.int32), (two >> 32).to(tl.int32)]
    elif PIECE == 4:
        one = tl.load(book_ptr.to(tl.pointer_type(tl.int64)) + entry * (GROUP // 4))
        args = [entry, one.to(tl.int32), (one >> 32).to(tl.int32)]
    elif PIECE == 2:
        args = [entry, tl.load(book_ptr.to(tl.pointer_type(tl.int32)) + entry * (GROUP // 2))]
    else:
        half = tl.load(book_ptr.to(tl.pointer_type(tl.int16)) + entry).to(tl.int32) & 0xFFFF
        args = [entry, half]
    tl.inline_asm_elementwise(fill(PIECE), fill_registers(PIECE), args, dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def elements(book_ptr, code, PIECE: tl.constexpr, GROUP: tl.constexpr, INLINE: tl.constexpr):
    """uint8 codes -> PIECE tiles of that shape: element i of the pieces at book_ptr, read from their copies."""
    if INLINE:
        FRAGMENT: tl.constexpr = lookup(PIECE)
        REGISTERS: tl.constexpr = "=r," * (2 * PIECE) + "r"
        if book_ptr.dtype.element_ty == tl.float16:
            return tl.inline_asm_elementwise(FRAGMENT, REGISTERS, [code], dtype=(tl.float16,) * PIECE, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(FRAGMENT, REGISTERS, [code], dtype=(tl.bfloat16,) * PIECE, is_pure=True, pack=4)
    else:
        out = ()
        for i in tl.static_range(PIECE):
            out = out + (tl.load(book_ptr + code.to(tl.int32) * GROUP + i),)
        return out


@triton.jit
def half(word, AT: tl.constexpr, TOKENS: tl.constexpr, COMPUTE: tl.constexpr):
    """16-bit float AT of those in an integer word."""
    bits = (word >> 16 * AT).to(tl.int16)
    if TOKENS == "fp16":
        return bits.to(tl.float16, bitcast=True)
    elif COMPUTE == "fp32":  # the interpreter gets bfloat16 arithmetic wrong
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.bfloat16, bitcast=True)


@triton.jit
def product(w, x, acc, SWAP: tl.constexpr, INLINE: tl.constexpr):
    PRECISION: tl.constexpr = "tf32" if INLINE else "ieee"  # of float32 only
    if SWAP:
        return tl.dot(w, x, acc, input_precision=PRECISION)
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def products(
    w,
    FIRST: tl.constexpr,
    x,
    acc,
    WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SWAP: tl.constexpr,
    INLINE: tl.constexpr,
):
    """acc + elements FIRST .. FIRST + WORD - 1 of the entries times the tokens in x."""
    if not SWAP:
        x = tl.trans(x)
    if TOKENS == "fp32":  # entries are exact in TF32, tokens in two of its numbers, or nearly so
        v = w[FIRST].to(tl.float32)
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        zero = tl.zeros(acc.shape, tl.float32)  # tensor cores cut what they add to a large sum: 2e-5 of it after 4096 columns
        return acc + product(v, high, product(v, x - high, zero, SWAP, INLINE), SWAP, INLINE)
    else:
        for i in tl.static_range(WORD):
            some = half(x, i, TOKENS, COMPUTE)
            acc = product(w[FIRST + i].to(some.dtype), some, acc, SWAP, INLINE)
        return acc


@triton.jit(do_not_specialize=["M"])
def codebook_gemm(
    x_ptr,
    code_ptr,
    book_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    X_STRIDE,
    TILES,
    BLOCK_STRIDE,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    BOOKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    WORD: tl.constexpr,
    SWAP: tl.constexpr,
    INLINE: tl.constexpr,
):
    """One tile of y [M, N], UNITS * UNIT tokens and BN rows of the weight, or with SPLIT > 1 of partial sums [SPLIT, M, N].

    x [M, X_STRIDE] in words of WORD elements; codes uint8 [BOOKS, blocks, N, BT], BLOCK_STRIDE = N * BT; TILES = K / GROUP;
    book [BOOKS, 256, GROUP] in the type of x, or float16 for float32 tokens, which meet it in float32; row_scale float32 [N].
    RAGGED: BT does not divide TILES. SWAP: weights are the left operand of the MMA. COMPUTE is TOKENS, the type of x, or fp32.
    """
    PIECES: tl.constexpr = GROUP // PIECE
    m = tl.program_id(0) * (UNITS * UNIT) + tl.arange(0, UNIT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = tl.arange(0, BT)
    code_row = tl.minimum(n, N - 1) * BT
    code_at = code_row[:, None] + tile[None, :] if SWAP else code_row[None, :] + tile[:, None]
    if WORD == 2:
        x_ptr = x_ptr.to(tl.pointer_type(tl.int32))
    elif TOKENS != "fp32":
        x_ptr = x_ptr.to(tl.pointer_type(tl.int16))
    x_at, acc = (), ()
    for u in tl.static_range(UNITS):
        x_row = tl.minimum(m + u * UNIT, M - 1).to(tl.int64) * X_STRIDE
        x_at = x_at + (x_row[None, :] + tile[:, None] * (GROUP // WORD),)
        acc = acc + (tl.zeros((BN, UNIT) if SWAP else (UNIT, BN), tl.float32),)
    if INLINE:
        tl.inline_asm_elementwise(reserve(PIECE), "=r,r", [M], dtype=tl.int32, is_pure=False, pack=1)
    trips = tl.cdiv(TILES, BT)
    stretch = tl.cdiv(trips * (BOOKS * PIECES), SPLIT)
    first = tl.program_id(2) * stretch
    last = tl.minimum(first + stretch, trips * (BOOKS * PIECES))
    for p in range(first // trips, tl.cdiv(last, trips)):
        book, piece = p // PIECES, p % PIECES
        entry_ptr = book_ptr + book * (ENTRIES * GROUP) + piece * PIECE
        if INLINE:
            copy_book(entry_ptr, PIECE, GROUP)
        for t in range(tl.maximum(first - p * trips, 0), tl.minimum(last - p * trips, trips)):
            code = tl.load(code_ptr + (book * trips + t) * BLOCK_STRIDE.to(tl.int64) + code_at)
            w = elements(entry_ptr, code, PIECE, GROUP, INLINE)
            sums = ()
            for u in tl.static_range(UNITS):
                inside = (m + u * UNIT < M)[None, :]
                if RAGGED:
                    inside = inside & (tile < TILES - t * BT)[:, None]
                added = acc[u]
                for i in tl.static_range(0, PIECE, WORD):
                    at = x_ptr + t * (BT * GROUP // WORD) + (piece * PIECE + i) // WORD + x_at[u]
                    added = products(w, i, tl.load(at, mask=inside, other=0), added, WORD, TOKENS, COMPUTE, SWAP, INLINE)
                sums = sums + (added,)
            acc = sums
    for u in tl.static_range(UNITS):
        y = tl.trans(acc[u]) if SWAP else acc[u]
        row = m + u * UNIT
        if SPLIT > 1:
            at = (tl.program_id(2).to(tl.int64) * M + row.to(tl.int64)[:, None]) * N + n[None, :]
            tl.store(y_ptr + at, y, mask=(row < M)[:, None] & (n < N)[None, :])
        else:
            finish(y, row, n, None, row_scale_ptr, bias_ptr, y_ptr, M, N)


@triton.jit
def entries(book_ptr, code, GROUP: tl.constexpr):
    """uint8 [R, T] -> their entries [R, T * GROUP]."""
    at = (code.to(tl.int32) * GROUP)[:, :, None] + tl.arange(0, GROUP)[None, None, :]
    return tl.reshape(tl.load(book_ptr + at), (code.shape[0], code.shape[1] * GROUP))


@triton.jit
def codebook_dense(
    code_ptr,
    book_ptr,
    row_scale_ptr,
    dense_ptr,
    N,
    K,
    TILES,
    BLOCK_STRIDE,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A [BN, BK] tile of dense [N, K], rounded once; codes and book as above, the book in float16. An int16 dense_ptr takes the
    bits of bfloat16."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = tl.program_id(2) * (BK // GROUP) + tl.arange(0, BK // GROUP)
    block = BLOCK_STRIDE.to(tl.int64)
    at = n[:, None] * BT + (tile // BT * block + tile % BT)[None, :]
    inside = (n < N)[:, None] & (tile < TILES)[None, :]
    value = tl.zeros((BN, BK), tl.float32)
    for b in tl.static_range(BOOKS):
        code = tl.load(code_ptr + b * tl.cdiv(TILES, BT) * block + at, mask=inside, other=0)
        value += entries(book_ptr + b * ENTRIES * GROUP, code, GROUP).to(tl.float32)
    value = value * tl.load(row_scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if dense_ptr.dtype.element_ty == tl.int16:
        value = bfloat16_bits(value)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    to = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dense_ptr + to, value.to(dense_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
