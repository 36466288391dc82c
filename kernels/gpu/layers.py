"""From a linear as the registry describes it to the `Layer` that the GPU programs are made for, on any machine."""

from __future__ import annotations

import torch

from quant.kernels.dispatch import Kernel, MatmulSpec
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu import a8w4, fp4, fp_channel, launch, w8a8, wna16
from quant.kernels.gpu.plan import Layer

KERNELS: tuple[Kernel, ...] = (a8w4.GpuA8W4(), w8a8.GpuW8A8(), wna16.GpuWnA16(), fp4.GpuFp4(), fp_channel.GpuFpChannel())


def layer_of(spec: MatmulSpec, x: torch.dtype, bias: torch.dtype | None) -> Layer | str:
    """The layer that serves `spec` with tokens of dtype `x`, or every GPU kernel's reason against it.

    What a kernel has against this machine does not count: the programs are for another one.
    """
    here = launch.device_refuses(spec)
    reasons = {kernel.name: kernel.refuses(spec) for kernel in KERNELS}
    fmt, vector = spec.format, None if bias is None else torch.empty(spec.n, dtype=bias, device="meta")
    for name, reason in reasons.items():
        if reason is not None and reason != here:
            continue
        if name == a8w4.GpuA8W4.name and isinstance(fmt, Int4Dual):
            return a8w4.layer_of(spec.n, spec.k, fmt.group, x, vector)
        if name == w8a8.GpuW8A8.name:
            divisor = torch.empty(spec.k, device="meta") if w8a8.DIVISOR in fmt.fields(spec.n, spec.k) else None
            return w8a8.layer_of(spec.n, spec.k, x, vector, divisor)
        if name == wna16.GpuWnA16.name and isinstance(fmt, IntGroup):
            return wna16.layer_of(spec.n, spec.k, fmt.bits, fmt.group, x, vector)
        if name == fp4.GpuFp4.name and isinstance(fmt, Fp4Block):
            return fp4.layer_of(spec.n, spec.k, fmt.kind, fp4.tokens_as(spec.activation, x), vector)
        if name == fp_channel.GpuFpChannel.name and isinstance(fmt, FpChannel):
            tokens = fp_channel.tokens_as(spec.activation, x)
            return fp_channel.layer_of(spec.n, spec.k, fmt.bits, fmt.group, tokens, vector, spec.activation.name != "none")
    return "; ".join(f"{name} {reason}" for name, reason in reasons.items())
