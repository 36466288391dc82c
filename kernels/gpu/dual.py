"""`gpu_dual`: two planes of bits with a scale each times float tokens on NVIDIA GPUs, added in float32.

    y[m, n] = sum_g (a1[n, g] * sum_{k in g} B1[n, k] x[m, k] + a2[n, g] * sum_{k in g} B2[n, k] x[m, k]) + bias[n]

A plane is an operand of its own, so no weight is rounded. Many tokens: the weight is made dense, each rounded once, and torch
multiplies.

    weight  int16 [spans, columns, SPAN] + slack      bits of rows 128 i + 16 r + j, r from 0 to 7, in column 16 i + j: plane 1
                                                      of r at bit 7 + r, plane 2 at that bit of the other byte
    words   int32 [spans, 8 columns] + slack          by row, the float16 bits of a1 and above them of a2; where a row is one
                                                      group, int64 of float32 bits [1, 8 columns] + slack
    row_scale  float32 [N], ones: what the programs of all formats end with

A span is 64 of the K, or 32 where 64 does not divide the group. Rows are padded to whole columns, K to whole spans, with zeros;
the slack lets a tile that sticks out read without a mask. Tiles follow from the number of tokens by rule, the fastest of 18 on
an H200. Bundles do not hold these programs; where one is in use the reference serves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.gpu import deployed, launch
from quant.kernels.gpu.layout import group_of_run
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
    stride,
)
from quant.kernels.gpu.program import Plan, Step, Value

ROWS, UNIT, FIRST_BIT = 8, 16, 7  # as in `jit/dual.py`
SHARED = ROWS * UNIT  # rows in UNIT columns
BU = 32  # columns of a tile, and of the slack
BM = (8, 16)  # tokens of a tile
MOST_SPLITS = 16
TRIPS = 4  # a split K leaves each program at least so many spans


def span_of(group: int) -> int:
    """Columns of K that a trip multiplies, all in one group; 0 where the group allows none."""
    return next((span for span in (64, 32) if group == -1 or group % span == 0), 0)


def bit_of(row: int, plane: int) -> int:
    """Where plane 0 or 1 of each of the rows that share a column lies."""
    return (row + FIRST_BIT) ^ 8 * plane


def to_device_layout(fields: Mapping[str, Tensor], fmt: BinaryDual, n: int, k: int) -> Prepared:
    """`binary_dual` fields -> (weight, words, row_scale)."""
    span = span_of(fmt.group)
    codes = torch.nn.functional.pad(fmt.unpack(fields, n, k).codes.int(), (0, -k % span, 0, -n % SHARED))
    codes = codes.view(-1, ROWS, UNIT, codes.shape[1])
    bits = sum((codes[:, r] >> plane & 1) << bit_of(r, plane) for r in range(ROWS) for plane in (0, 1))
    assert isinstance(bits, Tensor)
    tiles = bits.to(torch.int16).view(-1, bits.shape[-1] // span, span).transpose(0, 1)  # [spans, columns, SPAN]
    weight = torch.cat((tiles.flatten(0, 1), tiles.new_zeros(BU, span)))
    scale = fields["weight_scale"].reshape(-1, 2)  # a view of other bytes needs the stride that this gives
    pairs = scale.view(torch.int64 if fmt.group == -1 else torch.int32).view(n, -1)  # [N, K // G]
    if fmt.group != -1:
        pairs = pairs[:, group_of_run(k, fmt.group, len(tiles), span).to(pairs.device)]
    words = torch.nn.functional.pad(pairs, (0, 0, 0, -n % SHARED)).t().flatten()
    return weight, torch.cat((words, words.new_zeros(ROWS * BU))), torch.ones(n, device=weight.device)


def read_rows(prepared: Prepared, rows: Tensor, fmt: BinaryDual, k: int) -> Codes:
    """Codes of `rows` int64 [M] of a weight of K columns, from the tensors of `to_device_layout`."""
    weight, words, _ = prepared
    block, row, unit = rows // SHARED, rows % SHARED // UNIT, rows % UNIT
    spans = -(-k // weight.shape[1])
    packed = weight[:-BU].view(spans, -1, UNIT, weight.shape[1])[:, block, unit].transpose(0, 1).flatten(1)[:, :k]
    places = torch.tensor([[bit_of(r, plane) for r in range(ROWS)] for plane in (0, 1)], device=rows.device)
    one, two = (packed >> places[:, row].unsqueeze(-1)) & 1
    per_row = fmt.group == -1
    pairs = words[: -ROWS * BU].view(1 if per_row else spans, -1)[:: 1 if per_row else fmt.group // weight.shape[1], rows]
    scale = pairs.t().reshape(-1).view(fmt.scale_dtype).view(len(rows), -1, 2)
    return Codes((one | two << 1).to(torch.uint8), {"weight_scale": scale})


def weight_arguments(n: int, span: int, per_row: bool) -> Arguments:
    columns = -(-n // SHARED) * UNIT
    return [
        stride("W_STRIDE", columns * span),
        ("WORD_STRIDE", "i32", 0 if per_row else columns * ROWS),
    ]


def pointers(per_row: bool) -> Arguments:
    return [("w_ptr", "*i16", "weight"), ("word_ptr", "*i64" if per_row else "*i32", "words")]


@functools.lru_cache(1024)
def plan(n: int, k: int, group: int, x: str, bias: str | None, bm: int, splits: int, target: str = "cuda") -> Plan:
    """The launches of a weight [N, K] and tokens of dtype `x`, `bm` of them at a time, K in `splits` parts."""
    span, per_row = span_of(group), group == -1
    scaled = row_scaled(bias)
    arguments: Arguments = [
        ("x_ptr", POINTER[x], "x"),
        *pointers(per_row),
        *scaled,
        result(x, splits),
        ("M", "i32", "M"),
        ("N", "i32", n),
        ("K", "i32", padded(k)),
        ("X_STRIDE", "i32", padded(k)),
        ("SPANS", "i32", -(-k // span)),
        *weight_arguments(n, span, per_row),
    ]
    constants: dict[str, Value] = {
        "COMPUTE": "fp32" if target == "interpreter" and x == "bfloat16" else COMPUTE[x],
        "TOKENS": COMPUTE[x],
        "SPAN": span,
        "BK": 16 if x == "float32" else span,
        "RAGGED": padded(k) % span != 0,
        "FEW": bm == BM[0],
        "SPLIT": splits,
        "BM": bm,
        "BU": BU,
        "INLINE": target == "cuda",
    }
    built, bound = program("dual_gemm", arguments, constants, 2, 3, True)
    step = Step(program=built, arguments=bound, rows=bm, columns=ROWS * BU, splits=splits, n=n)
    steps, scratch = combined(step, [("x_scale_ptr", "*fp32", ""), *scaled], x)
    return Plan(steps=tuple(steps), scratch=tuple(scratch))


@functools.lru_cache(1024)
def dense_plan(n: int, k: int, group: int, x: str) -> Plan:
    """The launch that makes the weight dense [N, K padded as the tokens] in the dtype `x`; torch multiplies."""
    span, per_row = span_of(group), group == -1
    arguments: Arguments = [
        *pointers(per_row),
        ("dense_ptr", output(x), "dense"),
        ("N", "i32", n),
        ("K", "i32", padded(k)),
        *weight_arguments(n, span, per_row),
    ]
    built, bound = program("dual_dense", arguments, {"SPAN": span, "BU": BU}, 4, 1, False)
    step = Step(program=built, arguments=bound, rows=NO_TOKENS, columns=ROWS * BU, splits=-(-k // span), n=n)
    return dense_with(step, x, padded(k))


def parts(m: int, n: int, k: int, group: int, x: str, processors: int) -> tuple[int, int]:
    """(tokens of a tile, parts of K): as many parts as make four programs for a processor, but none of fewer than TRIPS spans,
    and no more partial sums than the weight has bytes. A tile of 16 float32 tokens would spill."""
    bm = BM[0] if m <= BM[0] or x == "float32" else BM[1]
    tiles = -(-m // bm) * -(-n // (ROWS * BU))
    return bm, max(1, min(MOST_SPLITS, 4 * processors // tiles, k // (TRIPS * span_of(group)), k // (13 * bm)))


def multiply(
    x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int, processors: int
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; tensors as `prepare` makes them. On CPU tensors the programs must be interpreted."""
    (m, k), n, name = x.shape, len(row_scale), launch.dtype_name(x.dtype)
    y = x.new_empty(m, n)
    if m == 0:
        return y
    if m >= DENSE_TOKENS and x.dtype != torch.float32:
        steps = dense_plan(n, k, group, name)
    else:
        bias_type = None if bias is None else launch.dtype_name(bias.dtype)
        target = "cuda" if x.is_cuda else "interpreter"
        steps = plan(n, k, group, name, bias_type, *parts(m, n, k, group, name, processors), target)
    x = torch.nn.functional.pad(x, (0, padded(k) - k)) if padded(k) > k else x
    return launch.compute(steps, x, bias, {"weight": weight, "words": words, "row_scale": row_scale}, y)


@torch.library.custom_op("lowbit::gpu_dual", mutates_args=(), device_types="cuda")
def gpu_dual(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """As `multiply`, on x's device."""
    _, processors = launch.device_facts(x.get_device())
    return multiply(x, weight, words, row_scale, bias, group, processors)


@gpu_dual.register_fake
def _(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuDual(Kernel):
    """binary_dual with float tokens on NVIDIA GPUs of compute capability 8.0 and later; prepared: see the head of this file."""

    name: ClassVar[str] = "gpu_dual"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, BinaryDual):
            return f"multiplies binary_dual, not {fmt.name}"
        if spec.activation.name != "none":
            return f"takes float tokens, not {spec.activation}"
        if not span_of(fmt.group):
            return f"needs a group length that 32 divides, not {fmt.group}"
        if reason := fmt.refuses(spec.n, spec.k) or launch.device_refuses(spec):
            return reason
        if not deployed.has_triton() or deployed.on(torch.cuda.current_device()) is not None:
            return "is not in deployment bundles"
        return None

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        assert isinstance(spec.format, BinaryDual)
        return to_device_layout(fields, spec.format, spec.n, spec.k)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        return spec.format.pack(self.rows(prepared, torch.arange(spec.n, device=prepared[0].device), spec))

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        assert isinstance(spec.format, BinaryDual)
        return read_rows(prepared, rows, spec.format, spec.k)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, BinaryDual)
        y: Tensor = gpu_dual(x, *prepared, bias, spec.format.group)
        return y
