"""`gpu_wna16`: 2, 3, 4 and 8-bit `int_group` weights times float tokens on NVIDIA GPUs, added in float32.

    y[m, n] = row_scale[n] * sum_g scale[n, g] * sum_{k in g} x[m, k] * (code[n, k] - zero[n, g]) + bias[n]

code - zero is exact in the type of the tokens. For few tokens the scale multiplies the float32 sum of a group, so no weight is
ever rounded; in tiles where it multiplies the weights instead, each is rounded once to the tokens' type.

Layout: `layout.py`. A parameter word holds the float16 bits of the scale and the spread zero point. With one group per row
(group -1) the scale is `row_scale`, float32, and the words of one block, of scale 1, serve all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.int_group import IntGroup, pack_bits, unpack_bits
from quant.kernels.gpu import launch
from quant.kernels.gpu.layout import (
    POLICIES,
    Policy,
    pack_weight,
    pick_rows,
    scale_words,
    scales_of,
    spread_zero,
    unpack_weight,
)
from quant.kernels.gpu.plan import Layer


def policy_of(bits: int) -> Policy:
    return POLICIES[f"int{bits}"]


def layer_of(n: int, k: int, bits: int, group: int, x: torch.dtype, bias: Tensor | None) -> Layer:
    return launch.grouped_layer(policy_of(bits), n, k, group, x, bias)


def to_device_layout(fields: Mapping[str, Tensor], fmt: IntGroup, n: int, k: int) -> Prepared:
    """`int_group` fields -> (weight, words, row_scale)."""
    policy = policy_of(fmt.bits)
    blocking = policy.blocking(fmt.group)
    assert blocking is not None
    weight = pack_weight(unpack_bits(fields["weight_packed"], fmt.bits, k), policy, blocking[0])
    scale = fields["weight_scale"]
    if fmt.symmetric:
        zero = torch.full(scale.shape, 2 ** (fmt.bits - 1), device=scale.device)
    else:
        zero = fields["weight_zero"].to(torch.int64)
    return weight, *scale_words(scale, spread_zero(zero, fmt.bits), policy, blocking, k)


def from_device_layout(prepared: Prepared, fmt: IntGroup, n: int, k: int) -> Fields:
    """Exact inverse of `to_device_layout`."""
    weight, words, row_scale = prepared
    policy = policy_of(fmt.bits)
    scale, high = scales_of(words, row_scale, policy, weight.shape[1], k, fmt.group)
    out = {"weight_packed": pack_bits(unpack_weight(weight, policy, n, k), fmt.bits), "weight_scale": scale}
    return out if fmt.symmetric else out | {"weight_zero": (high & (2**fmt.bits - 1)).to(torch.uint8)}


@torch.library.custom_op("lowbit::gpu_wna16", mutates_args=(), device_types="cuda")
def gpu_wna16(
    x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; the other tensors as `prepare` made them, bias [N] of any float dtype."""
    layer = layer_of(row_scale.shape[0], x.shape[1], bits, group, x.dtype, bias)
    return launch.matmul(layer, x, bias, {"weight": weight, "words": words, "row_scale": row_scale})


@gpu_wna16.register_fake
def _(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, bits: int, group: int) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuWnA16(Kernel):
    """int_group with float tokens on NVIDIA GPUs of compute capability 8.0 and later."""

    name: ClassVar[str] = "gpu_wna16"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, IntGroup):
            return f"multiplies int_group, not {spec.format.name}"
        if spec.activation.name != "none":
            return f"takes float tokens, not {spec.activation}"
        if f"int{spec.format.bits}" not in POLICIES:
            return f"has no layout for codes of {spec.format.bits} bits"
        if policy_of(spec.format.bits).blocking(spec.format.group) is None:
            return f"needs a group length that 32 divides, not {spec.format.group}"
        return launch.device_refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        assert isinstance(spec.format, IntGroup)
        return to_device_layout(fields, spec.format, spec.n, spec.k)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        assert isinstance(spec.format, IntGroup)
        return from_device_layout(prepared, spec.format, spec.n, spec.k)

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        assert isinstance(spec.format, IntGroup)
        weight, words, row_scale = prepared
        count = rows.shape[0]
        picked = pick_rows(weight, spec.n, rows), pick_rows(words, spec.n, rows), row_scale[rows]
        return spec.format.unpack(from_device_layout(picked, spec.format, count, spec.k), count, spec.k)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, IntGroup)
        y: Tensor = gpu_wna16(x, *prepared, bias, spec.format.bits, spec.format.group)
        return y
