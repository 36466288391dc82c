"""`gpu_codebook`: sums of vectors from codebooks times float tokens on NVIDIA GPUs, added in float32.

    y[m, n] = s[n] * sum_b sum_j <x[m, tile j], C[b, code[n, j, b]]> + bias[n]

float16 and float32 tokens meet the entries as they are, bfloat16 tokens meet entries rounded to bfloat16 once. Many tokens: the
weight is made dense, rounded once, and torch multiplies.

    codes      uint8 [books, blocks, N, 32]     32 neighbours of a row of codes in each block, the last padded with zeros
    book       float16 [books, 256, g]
    rounded    bfloat16, the book once more
    row_scale  float32 [N]

Shapes follow from the number of tokens by rule, the fastest of some 25 on an H200 with Triton 3.6, 8192 x 8192. Copies to all
banks are what counts there: 1x8g4 for one token took 18 us with 16 of them, 22 with 8, 27 with one, 28 from global memory.
Bundles do not hold these programs; where one is in use the reference serves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.codebook import ENTRIES, Codebook
from quant.kernels.gpu import deployed, launch
from quant.kernels.gpu.plan import (
    COMPUTE,
    DENSE_TOKENS,
    NO_TOKENS,
    POINTER,
    Arguments,
    combined,
    dense_with,
    output,
    padded,
    program,
    result,
    row_scaled,
)
from quant.kernels.gpu.program import Plan, Step, Value

BN, BK = 64, 128  # of the program that makes the weight dense
CODES = 32  # of a row in a block, which one trip multiplies: the fewest bytes that fill the MMA
MOST_SPLITS = 16
TRIPS = 2  # a split leaves each program at least so many
WORD = 2  # 16-bit tokens that are loaded at once
ROW = 128  # bytes, as in `jit/codebook.py`
UNASKED = 48 * 1024  # bytes of shared memory that a program gets without asking the driver


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides a program beside the layer and its dtypes; see `codebook_gemm`."""

    units: int = 1  # of tokens
    unit: int = 16  # tokens: 8 if swap, else 16
    bn: int = 128
    piece: int = 8  # elements of an entry that are looked up at once
    swap: bool = False
    warps: int = 4
    resident: int = 2  # programs that a processor holds, for the number of splits

    @property
    def bm(self) -> int:
        return self.units * self.unit

    def stages(self, group: int, x: str) -> int:
        """Of the pipeline, one more than its buffers.

        The copies of the codebook are static shared memory, of which Triton does not know: it asks the driver for more than
        48 KB only where its own part exceeds them. So both must fit in there, or its own part alone must not.
        """
        room = UNASKED - ENTRIES * ROW
        buffer = CODES * (self.bn + self.bm * min(group, self.piece) * (4 if x == "float32" else 2))
        buffers = min(3, room // buffer)
        if buffers < 2 or room < buffers * buffer <= UNASKED:
            buffers = UNASKED // buffer + 1
        return buffers + 1


def shape_of(m: int, group: int, x: str) -> Shape:
    """By rule. float32 tokens, which take twice the room, were not timed.

    Two warps where weights are on the left: of four, Triton 3.9 makes an instruction of the warp group, for which tokens go
    through shared memory.
    """
    if x == "float32":
        return Shape(bn=64 if group > 4 else 128)
    if m <= 8:
        return Shape(unit=8, swap=True, bn=64, warps=2, resident=4)
    if m > 16:
        return Shape(units=2, piece=4)
    return Shape(bn=256, warps=8, resident=1) if group > 4 else Shape()


def weight_arguments(x: str) -> Arguments:
    """The book is read as it is multiplied."""
    rounded = x == "bfloat16"
    return [("code_ptr", "*u8", "codes"), ("book_ptr", "*bf16" if rounded else "*fp16", "rounded" if rounded else "book")]


def blocks(k: int, group: int) -> int:
    """Of the codes of a row, and of a book."""
    return -(-k // (group * CODES))


@functools.lru_cache(1024)
def plan(
    n: int, k: int, books: int, group: int, x: str, bias: str | None, shape: Shape, splits: int, target: str = "cuda"
) -> Plan:
    """The launches of a weight [N, K] and tokens of dtype `x`, K and the books in `splits` parts."""
    piece = min(group, shape.piece)
    word = 1 if x == "float32" else min(piece, WORD)
    scaled = row_scaled(bias)
    arguments: Arguments = [
        ("x_ptr", POINTER[x], "x"),
        *weight_arguments(x),
        *scaled,
        result(x, splits),
        ("M", "i32", "M"),
        ("N", "i32", n),
        ("X_STRIDE", "i32", padded(k) // word),
        ("TILES", "i32", k // group),
        ("BLOCK_STRIDE", "i32", n * CODES),
    ]
    constants: dict[str, Value] = {
        "GROUP": group,
        "PIECE": piece,
        "BOOKS": books,
        "COMPUTE": "fp32" if target == "interpreter" else COMPUTE[x],  # which gets bfloat16 arithmetic wrong
        "TOKENS": COMPUTE[x],
        "RAGGED": k // group % CODES != 0,
        "SPLIT": splits,
        "UNITS": shape.units,
        "UNIT": shape.unit,
        "BN": shape.bn,
        "BT": CODES,
        "WORD": word,
        "SWAP": shape.swap,
        "INLINE": target == "cuda",
    }
    built, bound = program("codebook_gemm", arguments, constants, shape.warps, shape.stages(group, x), True)
    step = Step(program=built, arguments=bound, rows=shape.bm, columns=shape.bn, splits=splits, n=n)
    steps, scratch = combined(step, [("x_scale_ptr", "*fp32", ""), *scaled], x)
    return Plan(steps=tuple(steps), scratch=tuple(scratch))


@functools.lru_cache(1024)
def dense_plan(n: int, k: int, books: int, group: int, x: str) -> Plan:
    """The launch that makes the weight dense [N, K] in the dtype `x`; torch multiplies."""
    arguments: Arguments = [
        ("code_ptr", "*u8", "codes"),
        ("book_ptr", "*fp16", "book"),
        ("row_scale_ptr", "*fp32", "row_scale"),
        ("dense_ptr", output(x), "dense"),
        ("N", "i32", n),
        ("K", "i32", k),
        ("TILES", "i32", k // group),
        ("BLOCK_STRIDE", "i32", n * CODES),
    ]
    constants: dict[str, Value] = {"GROUP": group, "BOOKS": books, "BT": CODES, "BN": BN, "BK": BK}
    built, bound = program("codebook_dense", arguments, constants, 4, 1, False)
    step = Step(program=built, arguments=bound, rows=NO_TOKENS, columns=BN, splits=-(-k // BK), n=n)
    return dense_with(step, x, k)


def parts(m: int, n: int, k: int, books: int, group: int, shape: Shape, processors: int) -> int:
    """Of K and the books: as many as fill the processors once."""
    tiles = -(-m // shape.bm) * -(-n // shape.bn)
    trips = books * (group // min(group, shape.piece)) * blocks(k, group)
    return max(1, min(MOST_SPLITS, shape.resident * processors // tiles, trips // TRIPS))


def multiply(
    x: Tensor, codes: Tensor, book: Tensor, rounded: Tensor, row_scale: Tensor, bias: Tensor | None, processors: int
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; tensors as `prepare` makes them. On CPU tensors the programs must be interpreted."""
    (m, k), (books, _, n, _), group = x.shape, codes.shape, book.shape[-1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    name = launch.dtype_name(x.dtype)
    if m >= DENSE_TOKENS and x.dtype != torch.float32:
        steps = dense_plan(n, k, books, group, name)
    else:
        bias_type = None if bias is None else launch.dtype_name(bias.dtype)
        target = "cuda" if x.is_cuda else "interpreter"
        shape = shape_of(m, group, name)
        splits = parts(m, n, k, books, group, shape, processors)
        steps = plan(n, k, books, group, name, bias_type, shape, splits, target)
        x = torch.nn.functional.pad(x, (0, padded(k) - k)) if padded(k) > k else x
    return launch.compute(steps, x, bias, {"codes": codes, "book": book, "rounded": rounded, "row_scale": row_scale}, y)


@torch.library.custom_op("lowbit::gpu_codebook", mutates_args=(), device_types="cuda")
def gpu_codebook(x: Tensor, codes: Tensor, book: Tensor, rounded: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `multiply`, on x's device."""
    _, processors = launch.device_facts(x.get_device())
    return multiply(x, codes, book, rounded, row_scale, bias, processors)


@gpu_codebook.register_fake
def _(x: Tensor, codes: Tensor, book: Tensor, rounded: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[2])


@register
class GpuCodebook(Kernel):
    """codebook with float tokens on NVIDIA GPUs of compute capability 8.0 and later.

    prepared: codes, book, rounded, row_scale as at the head of this file.
    """

    name: ClassVar[str] = "gpu_codebook"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, Codebook):
            return f"multiplies codebook, not {fmt.name}"
        if spec.activation.name != "none":
            return f"takes float tokens, not {spec.activation}"
        if fmt.group & (fmt.group - 1):
            return f"needs a group that is a power of two, not {fmt.group}"
        if reason := fmt.refuses(spec.n, spec.k) or launch.device_refuses(spec):
            return reason
        if not deployed.has_triton() or deployed.on(torch.cuda.current_device()) is not None:
            return "is not in deployment bundles"
        return None

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        book = fields["codebook"].clone()
        codes = fields["weight_packed"].view(spec.n, -1, len(book)).permute(2, 0, 1)
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[2] % CODES)).view(len(book), spec.n, -1, CODES)
        return (
            codes.transpose(1, 2).clone(memory_format=torch.contiguous_format),
            book,
            book.bfloat16(),
            fields["weight_scale"].flatten().clone(),
        )

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        return spec.format.pack(self.rows(prepared, torch.arange(spec.n, device=prepared[0].device), spec))

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        codes, book, _, scale = prepared
        picked = codes[:, :, rows].permute(2, 1, 3, 0).flatten(1, 2)[:, : spec.k // spec.format.tile]
        return Codes(picked, {"codebook": book.clone(), "weight_scale": scale[rows].unsqueeze(1)})

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        y: Tensor = gpu_codebook(x, *prepared, bias)
        return y
