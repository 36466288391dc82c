"""`gpu_fp4`: MXFP4 and NVFP4 weights times float or FP4 tokens on NVIDIA GPUs, added in float32.

    y[m, n] = row_scale[n] * sum_g scale[n, g] * sum_{k in g} x[m, k] * e2m1(code[n, k]) + bias[n]

No weight is ever rounded: e2m1 * scale has six significant bits and is exact in every type of tokens. FP4 tokens are rounded in
torch first and then multiplied like float ones, which they are exactly; the divisor of nvfp4 tokens joins row_scale.

Layout: `layout.py`, K cut into slices of 16, then the codes of each 32-bit word scattered as `jit/e2m1.py` reads them. A byte
of a parameter word is a scale: nvfp4's, or mxfp4's power of two relative to the largest of its row, which is in row_scale.
Blocks under scale 0, and mxfp4's below 2^-24 of the largest of the row, count as zeros; the canonical tensors are then kept
beside the layout, which forgot them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import Activation
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.int_group import pack_bits, unpack_bits
from quant.kernels.gpu import launch
from quant.kernels.gpu.layout import POLICIES, blocks_of, from_words, pack_weight, pick_rows, to_words, unpack_weight
from quant.kernels.gpu.plan import Layer

POLICY = POLICIES["e2m1"]
SLICE = 16
WORDS = {"nvfp4": 2, "mxfp4": 1}  # per block of 128 codes, four scales each
PLACES = ((9, 15), (6, 13), (3, 12), (0, 14))  # as in `jit/e2m1.py`: ee m and s of slice 0, k and k + 2, and of slice 1
FOLDED = 2.0**14  # what the unpacked weights lack
NV_SHIFT = 64.0  # E4M3 times this is in float16 a normal number
TOP_EXPONENT = 30  # biased, of the byte that stands for the largest scale of a row of mxfp4
KEPT_BELOW = 24  # octaves: float16 products are exact so far down


def scatter(weight: Tensor) -> Tensor:
    """uint8 [R, SLICE], a nibble per code, -> the same codes in the bits where the program looks for them."""
    words = weight.view(torch.int32)
    out = torch.zeros_like(words)
    for i, (low, sign) in enumerate(PLACES):
        for half in (0, 1):
            code = words >> 8 * (2 * (i % 2) + half) + 4 * (i // 2)
            out |= (code & 7) << low + 16 * half | (code >> 3 & 1) << sign + 16 * half
    return out.view(torch.uint8)


def gather(weight: Tensor) -> Tensor:
    """Exact inverse of `scatter`."""
    words = weight.view(torch.int32)
    out = torch.zeros_like(words)
    for i, (low, sign) in enumerate(PLACES):
        for half in (0, 1):
            code = words >> low + 16 * half & 7 | (words >> sign + 16 * half & 1) << 3
            out |= code << 8 * (2 * (i % 2) + half) + 4 * (i // 2)
    return out.view(torch.uint8)


def layer_of(n: int, k: int, kind: str, x: torch.dtype, bias: Tensor | None) -> Layer:
    return Layer(
        policy=POLICY.name,
        n=n,
        k=k,
        slice=SLICE,
        groups=WORDS[kind],
        x=launch.dtype_name(x),
        bias=None if bias is None else launch.dtype_name(bias.dtype),
    )


def scale_bytes(fields: Mapping[str, Tensor], fmt: Fp4Block) -> tuple[Tensor, Tensor]:
    """(bytes of the parameter words int64 [N, groups], 0 where a block counts as zeros; row_scale float32 [N])."""
    scale = fields["weight_scale"]
    if fmt.kind == "nvfp4":
        bits = (scale.float() * NV_SHIFT).half().view(torch.int16).to(torch.int64) >> 7
        return bits, (FOLDED / NV_SHIFT / fields["weight_global_scale"]).expand(len(scale)).clone()
    top = scale.amax(1, keepdim=True).to(torch.int32)
    below = top - scale.to(torch.int32)
    bits = torch.where(below <= KEPT_BELOW, TOP_EXPONENT - below << 3, 0).to(torch.int64)
    return bits, torch.ldexp(torch.ones_like(top, dtype=torch.float32), top - 128).squeeze(1)


def to_device_layout(fields: Mapping[str, Tensor], fmt: Fp4Block, n: int, k: int) -> Prepared:
    """`fp4_block` fields -> (weight, words, row_scale), for nvfp4 the divisor [1] as it was, then what the layout forgets."""
    codes = unpack_bits(fields["weight_packed"], 4, k)
    bits, row_scale = scale_bytes(fields, fmt)
    zeros = (bits == 0).repeat_interleave(fmt.group, 1)
    weight = scatter(pack_weight(codes.masked_fill(zeros, 0), POLICY, SLICE))
    padded = torch.nn.functional.pad(bits, (0, 4 * WORDS[fmt.kind] * blocks_of(POLICY, k, SLICE) - bits.shape[1]))
    shifted = padded.view(n, -1, 4) << 8 * torch.arange(4, device=bits.device)
    prepared: Prepared = (weight, to_words(shifted.sum(-1)), row_scale)
    if fmt.kind == "nvfp4":
        prepared += (fields["weight_global_scale"].clone(),)
    if bool(zeros.any()):
        prepared += (fields["weight_packed"].clone(), fields["weight_scale"].clone())
    return prepared


def from_device_layout(prepared: Prepared, fmt: Fp4Block, n: int, k: int) -> Fields:
    """Exact inverse of `to_device_layout`."""
    weight, words, row_scale, *more = prepared
    out = {"weight_global_scale": more.pop(0).clone()} if fmt.kind == "nvfp4" else {}
    if more:
        return out | {"weight_packed": more[0].clone(), "weight_scale": more[1].clone()}
    out["weight_packed"] = pack_bits(unpack_weight(gather(weight), POLICY, n, k), 4)
    bits = (from_words(words, n).unsqueeze(-1) >> 8 * torch.arange(4, device=words.device) & 255).flatten(1)[
        :, : k // fmt.group
    ]
    if fmt.kind == "nvfp4":
        scale = (bits << 7).to(torch.int16).view(torch.float16).float() / NV_SHIFT
        return out | {"weight_scale": scale.to(torch.float8_e4m3fn)}
    top = torch.frexp(row_scale).exponent.unsqueeze(1) + 127
    return out | {"weight_scale": (top - TOP_EXPONENT + (bits >> 3)).to(torch.uint8)}


def tokens_as(activation: Activation, x: torch.dtype) -> torch.dtype:
    """The dtype in which tokens of dtype `x` are multiplied: float16 has not the range of mxfp4's powers of two."""
    return torch.float32 if activation.name == "mxfp4" and x == torch.float16 else x


def tokens(x: Tensor, activation: Activation, divisor: Tensor | None) -> Tensor:
    """x [M, K] as it is multiplied: rounded to FP4 where asked for, nvfp4 before the division by its divisor."""
    if isinstance(activation, NvFp4):
        assert divisor is not None
        return activation.multiples(x, divisor).to(x.dtype)
    if isinstance(activation, MxFp4):
        return activation.quantize(x, {}).to(tokens_as(activation, x.dtype))
    return x


@torch.library.custom_op("lowbit::gpu_fp4", mutates_args=(), device_types="cuda")
def gpu_fp4(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; the other tensors as `prepare` made them, bias [N] of any float dtype."""
    layer = layer_of(row_scale.shape[0], x.shape[1], kind, x.dtype, bias)
    return launch.matmul(layer, x, bias, {"weight": weight, "words": words, "row_scale": row_scale})


@gpu_fp4.register_fake
def _(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuFp4(Kernel):
    """fp4_block with float tokens, or tokens of its own kind, on NVIDIA GPUs of compute capability 8.0 and later.

    prepared: that of `to_device_layout`; before it, for nvfp4 tokens, their divisor [1], by which row_scale is divided as well.
    """

    name: ClassVar[str] = "gpu_fp4"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, Fp4Block):
            return f"multiplies fp4_block, not {spec.format.name}"
        if spec.activation.name not in ("none", spec.format.kind):
            return f"takes float or {spec.format.kind} tokens with {spec.format.kind} weights, not {spec.activation}"
        return spec.format.refuses(spec.n, spec.k) or launch.device_refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        assert isinstance(spec.format, Fp4Block)
        weight, words, row_scale, *more = to_device_layout(fields, spec.format, spec.n, spec.k)
        if isinstance(spec.activation, NvFp4):
            divisor = fields["input_global_scale"].clone()
            return (divisor, weight, words, row_scale / divisor, *more)
        return (weight, words, row_scale, *more)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        assert isinstance(spec.format, Fp4Block)
        if isinstance(spec.activation, NvFp4):
            fields = from_device_layout(prepared[1:], spec.format, spec.n, spec.k)
            return fields | {"input_global_scale": prepared[0].clone()}
        return from_device_layout(prepared, spec.format, spec.n, spec.k)

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        assert isinstance(spec.format, Fp4Block)
        weight, words, row_scale, *more = prepared[isinstance(spec.activation, NvFp4) :]
        divisor, kept = (more[:1], more[1:]) if spec.format.kind == "nvfp4" else ([], more)
        part = [pick_rows(weight, spec.n, rows), pick_rows(words, spec.n, rows), row_scale[rows]]
        picked = (*part, *divisor, *(t[rows] for t in kept))
        fields = from_device_layout(picked, spec.format, len(rows), spec.k)
        return spec.format.unpack(fields, len(rows), spec.k)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, Fp4Block)
        divided = isinstance(spec.activation, NvFp4)
        divisor, (weight, words, row_scale) = prepared[0] if divided else None, prepared[divided : divided + 3]
        y: Tensor = gpu_fp4(tokens(x, spec.activation, divisor), weight, words, row_scale, bias, spec.format.kind)
        return y.to(x.dtype)
