"""`gpu_codebook`: sums of vectors from codebooks times float tokens on NVIDIA GPUs, added in float32.

    y[m, n] = s[n] * sum_b sum_j <x[m, tile j], C[b, code[n, j, b]]> + bias[n]

float16 and float32 tokens meet the entries as they are, bfloat16 tokens meet entries rounded to bfloat16 once. Many tokens: the
weight is made dense, rounded once, and torch multiplies. Written without a GPU: the programs are interpreted in the tests and
compiled for sm_80, 90 and 100; tiles follow from the number of tokens by rule, none has been timed. Bundles do not hold these
programs; where one is in use the reference serves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.codebook import Codebook
from quant.kernels.gpu import deployed, launch
from quant.kernels.gpu.plan import (
    COMPUTE,
    DENSE_TOKENS,
    NO_TOKENS,
    POINTER,
    Arguments,
    combine_step,
    output,
    padded,
    program,
    stride,
)
from quant.kernels.gpu.program import Plan, Scratch, Step, Value, run

BN, BK = 64, 128
BM = (16, 32, 64, 128)  # the smallest that holds the tokens, or the last
MOST_SPLITS = 8


def weight_arguments(x: str) -> Arguments:
    """The book is read as it is multiplied."""
    rounded = x == "bfloat16"
    return [("code_ptr", "*u8", "codes"), ("book_ptr", "*bf16" if rounded else "*fp16", "rounded" if rounded else "book")]


@functools.lru_cache(1024)
def plan(n: int, k: int, books: int, group: int, x: str, bias: str | None, bm: int, splits: int, target: str = "cuda") -> Plan:
    """The launches of a weight [N, K] and tokens of dtype `x`, `bm` of them at a time, K in `splits` parts."""
    scaled: Arguments = [
        ("row_scale_ptr", "*fp32", "row_scale"),
        ("bias_ptr", POINTER[bias or "float32"], "bias" if bias else ""),
    ]
    arguments: Arguments = [
        ("x_ptr", POINTER[x], "x"),
        *weight_arguments(x),
        *scaled,
        ("y_ptr", "*fp32" if splits > 1 else output(x), "partial" if splits > 1 else "y"),
        ("M", "i32", "M"),
        ("N", "i32", n),
        ("K", "i32", k),
        ("X_STRIDE", "i32", padded(k)),
        ("TILES", "i32", k // group),
        stride("PLANE_STRIDE", n * (k // group)),
    ]
    inside = target == "interpreter"  # which gets bfloat16 arithmetic wrong
    constants: dict[str, Value] = {
        "GROUP": group,
        "BOOKS": books,
        "COMPUTE": "fp32" if inside else COMPUTE[x],
        "RAGGED": k % BK != 0,
        "SPLIT": splits,
        "BM": bm,
        "BN": BN,
        "BK": BK,
        "PRECISION": "ieee" if inside else "tf32x3",  # float32 tokens only: three products restore what one loses
    }
    built, bound = program("codebook_gemm", arguments, constants, 4, 3, True)
    steps = [Step(program=built, arguments=bound, rows=bm, columns=BN, splits=splits, n=n)]
    if splits == 1:
        return Plan(steps=tuple(steps), scratch=())
    steps += [combine_step("*fp32", [("x_scale_ptr", "*fp32", ""), *scaled], x, n, splits)]
    return Plan(steps=tuple(steps), scratch=(Scratch(name="partial", dtype="float32", per_token=splits * n),))


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
        stride("PLANE_STRIDE", n * (k // group)),
    ]
    constants: dict[str, Value] = {"GROUP": group, "BOOKS": books, "BN": BN, "BK": BK}
    built, bound = program("codebook_dense", arguments, constants, 4, 1, False)
    step = Step(program=built, arguments=bound, rows=NO_TOKENS, columns=BN, splits=-(-k // BK), n=n)
    kind = "int16" if x == "bfloat16" else x
    return Plan(steps=(step,), scratch=(Scratch(name="dense", dtype=kind, fixed=n * k),), dense=True)


def parts(m: int, n: int, k: int, processors: int) -> tuple[int, int]:
    """(tokens of a tile, parts of K): parts only as far as tiles leave processors idle, two tiles to each."""
    bm = next((most for most in BM if m <= most), BM[-1])
    tiles = -(-m // bm) * -(-n // BN)
    return bm, max(1, min(MOST_SPLITS, 2 * processors // tiles, -(-k // BK)))


def multiply(
    x: Tensor, codes: Tensor, book: Tensor, rounded: Tensor, row_scale: Tensor, bias: Tensor | None, processors: int
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; tensors as `prepare` makes them. On CPU tensors the programs must be interpreted."""
    (m, k), (books, n, _), group = x.shape, codes.shape, book.shape[-1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    name = launch.dtype_name(x.dtype)
    if m >= DENSE_TOKENS and x.dtype != torch.float32:
        steps = dense_plan(n, k, books, group, name)
    else:
        bias_type = None if bias is None else launch.dtype_name(bias.dtype)
        target = "cuda" if x.is_cuda else "interpreter"
        steps = plan(n, k, books, group, name, bias_type, *parts(m, n, k, processors), target)
        x = torch.nn.functional.pad(x, (0, padded(k) - k)) if padded(k) > k else x
    known = {"x": x, "codes": codes, "book": book, "rounded": rounded, "row_scale": row_scale}
    known |= {"bias": bias} if bias is not None else {}
    run(steps, known | {"y": y.view(torch.int16) if y.dtype == torch.bfloat16 else y}, m)
    return y


@torch.library.custom_op("lowbit::gpu_codebook", mutates_args=(), device_types="cuda")
def gpu_codebook(x: Tensor, codes: Tensor, book: Tensor, rounded: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """As `multiply`, on x's device."""
    with torch.cuda.device(x.device):  # Triton launches on the current device
        _, processors = launch.device_facts(x.get_device())
        return multiply(x, codes, book, rounded, row_scale, bias, processors)


@gpu_codebook.register_fake
def _(x: Tensor, codes: Tensor, book: Tensor, rounded: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


@register
class GpuCodebook(Kernel):
    """codebook with float tokens on NVIDIA GPUs of compute capability 8.0 and later.

    prepared: codes uint8 [books, N, K / g], book float16 [books, 256, g], the book rounded to bfloat16, row_scale float32 [N].
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
        codes = fields["weight_packed"].view(spec.n, -1, len(book)).permute(2, 0, 1).contiguous().clone()
        return codes, book, book.bfloat16(), fields["weight_scale"].flatten().clone()

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        return spec.format.pack(self.rows(prepared, torch.arange(spec.n, device=prepared[0].device), spec))

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        codes, book, _, scale = prepared
        return Codes(codes[:, rows].permute(1, 2, 0), {"codebook": book.clone(), "weight_scale": scale[rows].unsqueeze(1)})

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        y: Tensor = gpu_codebook(x, *prepared, bias)
        return y
