"""`cpu_w4a16`: 4-bit group weights times float tokens, accumulated in float32.

    y[m, n] = sum_g scale[n, g] * (sum_{k in g} x[m, k] * (code[n, k] - 8) - (zero[n, g] - 8) * sum_{k in g} x[m, k])

Codes and scales stay apart until the group's float32 sum is known, so nothing is rounded to bfloat16 on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int_group import IntGroup

torch.library.define(
    "lowbit::cpu_w4a16", "(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int n, int k, int group) -> Tensor"
)


def cpu_w4a16(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, k: int, group: int
) -> Tensor:
    """x [M, k] -> [M, n] in x's dtype. codes uint8 [N/32, K/8, 32, 4]; scale float16 or float32, zero uint8 [N/32, K/G, 32]."""
    x = x.contiguous()
    library.check_input(x, k, bias, n)
    m = x.shape[0]
    y = torch.empty((m, n), dtype=x.dtype)
    pointer, kind = (None, 0) if bias is None else (bias.data_ptr(), library.dtype_code(bias))
    library.load().lowbit_w4a16(
        *(x.data_ptr(), library.dtype_code(x), y.data_ptr(), m, n, k),
        *(codes.data_ptr(), scale.data_ptr(), scale.dtype == torch.float32, None if zero is None else zero.data_ptr()),
        *(group, pointer, kind),
    )
    return y


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, k: int, group: int
) -> Tensor:
    return x.new_empty((x.shape[0], n))


torch.library.impl("lowbit::cpu_w4a16", "cpu", cpu_w4a16)
torch.library.register_fake("lowbit::cpu_w4a16", _fake)


@register
class W4A16(Kernel):
    """4-bit int_group with float tokens; prepared = (codes, scale) or (codes, scale, zero) as `cpu_w4a16` takes them."""

    name: ClassVar[str] = "cpu_w4a16"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, IntGroup) or fmt.bits != 4:
            return f"it serves 4-bit int_group, not {fmt}"
        if spec.activation != "none":
            return f"it serves activation none, not {spec.activation}"
        if fmt.group != -1 and fmt.group % 16:
            return f"group {fmt.group} is neither -1 nor a multiple of 16"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        codes = layout.block_nibbles(layout.unpack_nibbles(fields["weight_packed"]), layout.PAIRS)
        return codes, *(layout.block_groups(fields[name]) for name in ("weight_scale", "weight_zero") if name in fields)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, *groups = prepared
        out = {"weight_packed": layout.pack_nibbles(layout.unblock_nibbles(codes, layout.PAIRS, spec.n, spec.k))}
        names = ("weight_scale", "weight_zero")[: len(groups)]
        return out | {name: layout.unblock_groups(t, spec.n) for name, t in zip(names, groups, strict=True)}

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, IntGroup)
        codes, scale, *zero = prepared
        group = spec.k if spec.format.group == -1 else spec.format.group
        return library.call(
            torch.ops.lowbit.cpu_w4a16.default, x, codes, scale, zero[0] if zero else None, bias, spec.n, spec.k, group
        )
