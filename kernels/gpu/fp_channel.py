"""`gpu_fp_channel`: the 4- and 8-bit floats of LLM-FP4 times float tokens, or tokens rounded by `fp_shift`, on NVIDIA GPUs.

    y[m, n] = t[m] * row_scale[n] * sum_g scale[n, g] * sum_{k in g} x[m, k] * value(code[n, k]) + bias[n]

Values of codes are exact in the type of the tokens. For few tokens the scale multiplies the float32 sum of a group, so that no
weight is ever rounded; in tiles where it multiplies the weights, each is rounded once. t = 1 for float tokens; others are
rounded in torch first and multiplied without their scale t, so that they are exact in bfloat16.

Layout: `layout.py`. A parameter word holds the float16 bits of the scale and the shift that `jit/float4.py` or `jit/float8.py`
reads codes with. 8-bit codes come under one scale per row: scales of their groups are float32, which a word has no room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import Activation
from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int_group import pack_bits, unpack_bits
from quant.kernels.gpu import launch
from quant.kernels.gpu.layout import POLICIES, Policy, pack_weight, pick_rows, scale_words, scales_of, unpack_weight
from quant.kernels.gpu.plan import Layer

SHIFT = {4: 7, 8: 0}  # bits of a code -> what is added to its exponent bits in a word
FOLDED = {4: 1, 8: 16}  # likewise -> unpacked weights are value * 2^(b - this), b the bias


def policy_of(bits: int) -> Policy:
    return POLICIES[f"float{bits}"]


def layer_of(n: int, k: int, bits: int, group: int, x: torch.dtype, bias: Tensor | None, token_scale: bool) -> Layer:
    return launch.grouped_layer(policy_of(bits), n, k, group, x, bias, token_scale)


def folded(exponents: Tensor, bits: int) -> Tensor:
    """What the unpacked weights are too large by, float32 [1], for e exponent bits, uint8 [1]."""
    bias = ((1 << exponents.to(torch.int32) - 1) - 1).clamp_min(1)
    return torch.ldexp(torch.ones_like(bias, dtype=torch.float32), bias - FOLDED[bits])


def to_device_layout(fields: Mapping[str, Tensor], fmt: FpChannel, n: int, k: int) -> Prepared:
    """`fp_channel` fields -> (weight, words, row_scale)."""
    policy = policy_of(fmt.bits)
    blocking = policy.blocking(fmt.group)
    assert blocking is not None
    weight = pack_weight(unpack_bits(fields["weight_packed"], fmt.bits, k), policy, blocking[0])
    scale, exponents = fields["weight_scale"], fields["weight_exponents"]
    shift = (exponents.to(torch.int64) + SHIFT[fmt.bits]).expand(scale.shape)
    words, row_scale = scale_words(scale, shift, policy, blocking, k)
    return weight, words, row_scale / folded(exponents, fmt.bits)


def from_device_layout(prepared: Prepared, fmt: FpChannel, n: int, k: int) -> Fields:
    """Exact inverse of `to_device_layout`."""
    weight, words, row_scale = prepared
    policy = policy_of(fmt.bits)
    scale, high = scales_of(words, row_scale, policy, weight.shape[1], k, fmt.group)
    exponents = (high[0, :1] - SHIFT[fmt.bits]).to(torch.uint8)
    return {
        "weight_packed": pack_bits(unpack_weight(weight, policy, n, k), fmt.bits),
        "weight_scale": scale * folded(exponents, fmt.bits) if fmt.group == -1 else scale,
        "weight_exponents": exponents,
    }


def tokens_as(activation: Activation, x: torch.dtype) -> torch.dtype:
    """The dtype in which tokens of dtype `x` are multiplied: float16 has not the range of channels moved by powers of two."""
    return torch.float32 if isinstance(activation, FpShift) and x == torch.float16 else x


@torch.library.custom_op("lowbit::gpu_fp_channel", mutates_args=(), device_types="cuda")
def gpu_fp_channel(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    words: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    """x [M, K], x_scale float32 [M] -> [M, N] in x's dtype; the other tensors as `prepare` made them, bias [N] of any float
    dtype."""
    layer = layer_of(row_scale.shape[0], x.shape[1], bits, group, x.dtype, bias, x_scale is not None)
    tensors = {"weight": weight, "words": words, "row_scale": row_scale}
    return launch.matmul(layer, x, bias, tensors if x_scale is None else tensors | {"x_scale": x_scale})


@gpu_fp_channel.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    words: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuFpChannel(Kernel):
    """fp_channel on NVIDIA GPUs of compute capability 8.0 and later.

    prepared: that of `to_device_layout`, and after it the tensors of `fp_shift` where tokens are rounded.
    """

    name: ClassVar[str] = "gpu_fp_channel"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, FpChannel):
            return f"multiplies fp_channel, not {fmt.name}"
        if fmt.bits == 8 and fmt.group != -1:
            return f"takes 8-bit codes under one scale per row, not groups of {fmt.group}"
        if spec.activation.name != "none" and not isinstance(spec.activation, FpShift):
            return f"takes float tokens or those of fp_shift, not {spec.activation}"
        if policy_of(fmt.bits).blocking(fmt.group) is None:
            return f"needs a group length that 32 divides, not {fmt.group}"
        return fmt.refuses(spec.n, spec.k) or launch.device_refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        assert isinstance(spec.format, FpChannel)
        weight = to_device_layout(fields, spec.format, spec.n, spec.k)
        return (*weight, *(fields[name].clone() for name in spec.activation.fields(spec.k)))

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        assert isinstance(spec.format, FpChannel)
        inputs = dict(zip(spec.activation.fields(spec.k), prepared[3:], strict=True))
        return from_device_layout(prepared[:3], spec.format, spec.n, spec.k) | inputs

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        assert isinstance(spec.format, FpChannel)
        weight, words, row_scale, *_ = prepared
        count = rows.shape[0]
        picked = pick_rows(weight, spec.n, rows), pick_rows(words, spec.n, rows), row_scale[rows]
        return spec.format.unpack(from_device_layout(picked, spec.format, count, spec.k), count, spec.k)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, FpChannel)
        weight, words, row_scale, *inputs = prepared
        tokens, scale = x, None
        if isinstance(spec.activation, FpShift):
            tokens, scale = spec.activation.codes(x, dict(zip(spec.activation.fields(spec.k), inputs, strict=True)))
            tokens, scale = tokens.to(tokens_as(spec.activation, x.dtype)), scale.reshape(-1).expand(len(x)).contiguous()
        y: Tensor = gpu_fp_channel(tokens, scale, weight, words, row_scale, bias, spec.format.bits, spec.format.group)
        return y.to(x.dtype)
