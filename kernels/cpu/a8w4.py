"""`cpu_a8w4`: dual-grained 4-bit weights times int8 tokens, all in integers until the last step.

y[m, n] = sx[m] * s1[n] * sum_k qx[m, k] * w8[n, k] + bias[n]          w8 = u * s2 + o, the sum exact in int32
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int4_dual import Int4Dual

torch.library.define(
    "lowbit::cpu_a8w4", "(Tensor x, Tensor codes, Tensor scales, Tensor row_scale, Tensor? bias, int group) -> Tensor"
)


def cpu_a8w4(x: Tensor, codes: Tensor, scales: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype. codes uint8 [N/32, K/8, 32, 4], scales uint8 [N/32, K/G, 2, 32], row_scale [N]."""
    (m, k), n = x.shape, row_scale.shape[0]
    x = x.contiguous()
    library.check_input(x, codes.shape[1] * 8, bias, n)
    y = torch.empty((m, n), dtype=x.dtype)
    pointer, kind = (None, 0) if bias is None else (bias.data_ptr(), library.dtype_code(bias))
    library.load().lowbit_a8w4(
        *(x.data_ptr(), library.dtype_code(x), y.data_ptr(), m, n, k),
        *(codes.data_ptr(), scales.data_ptr(), group, row_scale.data_ptr(), pointer, kind),
    )
    return y


def _fake(x: Tensor, codes: Tensor, scales: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty((x.shape[0], row_scale.shape[0]))


torch.library.impl("lowbit::cpu_a8w4", "cpu", cpu_a8w4)
torch.library.register_fake("lowbit::cpu_a8w4", _fake)


@register
class A8W4(Kernel):
    """int4_dual with int8 tokens; prepared = (codes, scales, row_scale) as `cpu_a8w4` takes them."""

    name: ClassVar[str] = "cpu_a8w4"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, Int4Dual):
            return f"it serves int4_dual, not {spec.format.name}"
        if spec.activation != "int8_token":
            return f"it serves activation int8_token, not {spec.activation}"
        if spec.format.group % 16:
            return f"group {spec.format.group} is not a multiple of 16"
        return spec.format.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        codes = layout.block_nibbles(layout.unpack_nibbles(fields["weight_packed"]), layout.HALVES)
        both = (fields["group_scale"], fields["group_offset"].view(torch.uint8))
        scales = torch.stack([layout.block_groups(t) for t in both], 2)
        return codes, scales, fields["row_scale"].contiguous()

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, scales, row_scale = prepared
        return {
            "weight_packed": layout.pack_nibbles(layout.unblock_nibbles(codes, layout.HALVES, spec.n, spec.k)),
            "group_scale": layout.unblock_groups(scales[:, :, 0], spec.n),
            "group_offset": layout.unblock_groups(scales[:, :, 1], spec.n).view(torch.int8),
            "row_scale": row_scale,
        }

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, Int4Dual)
        codes, scales, row_scale = prepared
        return library.call(torch.ops.lowbit.cpu_a8w4.default, x, codes, scales, row_scale, bias, spec.format.group)
