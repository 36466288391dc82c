"""`gpu_w8a8`: 8-bit weights with one scale per row times int8 tokens on NVIDIA GPUs, exact up to the float32 epilogue.

    y[m, n] = sx[m] * s[n] * sum_k q[m, k] * (code[n, k] - 128) + bias[n],     q, sx = int8 of x[m, :] / divisor

The optional divisor (a vector over K) is what a method such as CrossQuant divides the tokens by before their rows are
quantized; its factor is already in the weights. It travels with the layer as the field `DIVISOR` where a format has one.
Layout: `layout.py`, the bytes being code - 128 as int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu import launch
from quant.kernels.gpu.layout import POLICIES, pack_weight, unpack_weight
from quant.kernels.gpu.plan import Layer

POLICY = POLICIES["bytes8"]
DIVISOR = "input_divisor"  # float32 [K]


def layer_of(n: int, k: int, x: torch.dtype, bias: Tensor | None, divisor: Tensor | None) -> Layer:
    return Layer(
        policy=POLICY.name,
        n=n,
        k=k,
        slice=POLICY.blockings[0][0],
        groups=1,
        x=launch.dtype_name(x),
        bias=None if bias is None else launch.dtype_name(bias.dtype),
        divisor=divisor is not None,
    )


@torch.library.custom_op("lowbit::gpu_w8a8", mutates_args=(), device_types="cuda")
def gpu_w8a8(x: Tensor, weight: Tensor, row_scale: Tensor, divisor: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; weight and row_scale as `prepare` made them, divisor float32 [K], bias [N]."""
    tensors = {"weight": weight, "row_scale": row_scale}
    if divisor is not None:
        tensors["divisor"] = divisor
    return launch.matmul(layer_of(row_scale.shape[0], x.shape[1], x.dtype, bias, divisor), x, bias, tensors)


@gpu_w8a8.register_fake
def _(x: Tensor, weight: Tensor, row_scale: Tensor, divisor: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuW8A8(Kernel):
    """8-bit symmetric int_group per row with int8 tokens on NVIDIA GPUs of compute capability 8.0 and later."""

    name: ClassVar[str] = "gpu_w8a8"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, IntGroup) or fmt.bits != 8 or not fmt.symmetric or fmt.group != -1:
            return f"multiplies 8-bit symmetric int_group with group -1, not {fmt}"
        if spec.activation.name != "int8_token":
            return f"needs int8_token activations, not {spec.activation}"
        if spec.k > launch.MAX_K:
            return f"int32 sums allow K up to {launch.MAX_K}, not {spec.k}"
        return launch.device_refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        weight = pack_weight(fields["weight_packed"] ^ 128, POLICY, POLICY.blockings[0][0])
        scale = fields["weight_scale"].flatten().clone()
        return (weight, scale, fields[DIVISOR].float()) if DIVISOR in fields else (weight, scale)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        weight, scale, *divisor = prepared
        out = {"weight_packed": unpack_weight(weight, POLICY, spec.n, spec.k) ^ 128, "weight_scale": scale.unsqueeze(1)}
        return out | ({DIVISOR: divisor[0]} if divisor else {})

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        weight, scale, *divisor = prepared
        y: Tensor = gpu_w8a8(x, weight, scale, divisor[0] if divisor else None, bias)
        return y
