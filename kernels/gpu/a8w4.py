"""`gpu_a8w4`: dual-grained 4-bit weights times int8 tokens on NVIDIA GPUs, exact up to the float32 epilogue.

Layout: `layout.py`, blocks of two halves, each half inside one group. A parameter word holds the bytes s_lo, b_lo, s_hi, b_hi
of the groups of the two halves, b = 128 + o. 4.25 bits per weight at halves of 64, 4.5 at 32.

u * s + b must not leave a byte for any of the 16 codes, so 15 * s <= 255: `Int4Dual.check` guarantees it (o >= -128 and
15 * s + o <= 127 give s <= 17) and `prepare` calls it, so a layer that does not fit is an error, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import pack_bits, unpack_bits
from quant.kernels.gpu import launch
from quant.kernels.gpu.layout import (
    POLICIES,
    blocks_of,
    from_words,
    group_of_run,
    pack_weight,
    to_words,
    unpack_weight,
)
from quant.kernels.gpu.plan import Layer


def half_block(group: int) -> int | None:
    """The longest half of 64 and 32 that divides the group length; None when neither does (int8 MMA needs 32)."""
    return next((half for half in (64, 32) if group % half == 0), None)


def policy_of(group: int) -> str:
    """Whether the two halves of a block share a group. A half of 32 means an odd number of halves per group."""
    return "dual4_pair" if group % 128 else "dual4"


def layer_of(n: int, k: int, group: int, x: torch.dtype, bias: Tensor | None) -> Layer:
    half = half_block(group)
    assert half is not None, f"group {group} has no half-block"
    policy = policy_of(group)
    bias_type = None if bias is None else launch.dtype_name(bias.dtype)
    groups = 2 if policy == "dual4_pair" else 1
    return Layer(policy=policy, n=n, k=k, slice=half, groups=groups, x=launch.dtype_name(x), bias=bias_type)


def to_device_layout(fields: Mapping[str, Tensor], n: int, k: int, group: int) -> Prepared:
    """`int4_dual` fields -> (weight, words, row_scale)."""
    half, policy = half_block(group), POLICIES[policy_of(group)]
    assert half is not None, f"group {group} has no half-block"
    weight = pack_weight(unpack_bits(fields["weight_packed"], 4, k), policy, half)
    scale = fields["group_scale"].to(torch.int64)
    offset = fields["group_offset"].to(torch.int64) + 128
    blocks = blocks_of(policy, k, half)
    pairs = (scale | offset << 8)[:, group_of_run(k, group, 2 * blocks, half).to(scale.device)].view(n, blocks, 2)
    return weight, to_words(pairs[..., 0] | pairs[..., 1] << 16), fields["row_scale"]


def from_device_layout(prepared: Prepared, n: int, k: int, group: int) -> Fields:
    """Exact inverse of `to_device_layout`."""
    weight, words, row_scale = prepared
    half = weight.shape[1]
    word = from_words(words, n)
    pairs = torch.stack([word & 0xFFFF, word >> 16], 2).reshape(n, -1)
    first = pairs[:, :: group // half][:, : k // group]  # the first half of each group
    return {
        "weight_packed": pack_bits(unpack_weight(weight, POLICIES[policy_of(group)], n, k), 4),
        "group_scale": (first & 255).to(torch.uint8),
        "group_offset": ((first >> 8) - 128).to(torch.int8),
        "row_scale": row_scale,
    }


@torch.library.custom_op("lowbit::gpu_a8w4", mutates_args=(), device_types="cuda")
def gpu_a8w4(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; the other tensors as `prepare` made them, bias [N] of any float dtype."""
    layer = layer_of(row_scale.shape[0], x.shape[1], group, x.dtype, bias)
    return launch.matmul(layer, x, bias, {"weight": weight, "words": words, "row_scale": row_scale})


@gpu_a8w4.register_fake
def _(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuA8W4(Kernel):
    """int4_dual with int8 tokens on NVIDIA GPUs of compute capability 8.0 and later."""

    name: ClassVar[str] = "gpu_a8w4"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, Int4Dual):
            return f"multiplies int4_dual, not {spec.format.name}"
        if spec.activation.name != "int8_token":
            return f"needs int8_token activations, not {spec.activation}"
        if half_block(spec.format.group) is None:
            return f"needs a group length that 32 divides, not {spec.format.group}"
        if spec.k > launch.MAX_K:
            return f"int32 sums allow K up to {launch.MAX_K}, not {spec.k}"
        return launch.device_refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        """Raises ValueError, naming the row, when a group leaves the range that one byte can hold."""
        assert isinstance(spec.format, Int4Dual)
        spec.format.check(fields, spec.n, spec.k)
        return to_device_layout(fields, spec.n, spec.k, spec.format.group)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        assert isinstance(spec.format, Int4Dual)
        return from_device_layout(prepared, spec.n, spec.k, spec.format.group)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, Int4Dual)
        y: Tensor = gpu_a8w4(x, *prepared, bias, spec.format.group)
        return y
