"""`cpu_w8a8`: int8 weights with one scale per row times int8 tokens.

y[m, n] = sx[m] * s[n] * sum_k qx[m, k] * (code[n, k] - 128) + bias[n]          the sum exact in int32
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

torch.library.define("lowbit::cpu_w8a8", "(Tensor x, Tensor codes, Tensor row_scale, Tensor? bias, int k) -> Tensor")


def cpu_w8a8(x: Tensor, codes: Tensor, row_scale: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype. codes uint8 [N/32, K/4, 32, 4] holding w8 + 128, row_scale float32 [N]."""
    m, n = x.shape[0], row_scale.shape[0]
    x = x.contiguous()
    library.check_input(x, k, bias, n)
    y = torch.empty((m, n), dtype=x.dtype)
    pointer, kind = (None, 0) if bias is None else (bias.data_ptr(), library.dtype_code(bias))
    library.load().lowbit_w8a8(
        *(x.data_ptr(), library.dtype_code(x), y.data_ptr(), m, n, k),
        *(codes.data_ptr(), row_scale.data_ptr(), pointer, kind),
    )
    return y


def _fake(x: Tensor, codes: Tensor, row_scale: Tensor, bias: Tensor | None, k: int) -> Tensor:
    return x.new_empty((x.shape[0], row_scale.shape[0]))


torch.library.impl("lowbit::cpu_w8a8", "cpu", cpu_w8a8)
torch.library.register_fake("lowbit::cpu_w8a8", _fake)


@register
class W8A8(Kernel):
    """8-bit symmetric int_group per row with int8 tokens; prepared = (codes, row_scale) as `cpu_w8a8` takes them."""

    name: ClassVar[str] = "cpu_w8a8"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, IntGroup) or fmt.bits != 8 or not fmt.symmetric or fmt.group != -1:
            return f"it serves 8-bit symmetric int_group with group -1, not {fmt}"
        if spec.activation != "int8_token":
            return f"it serves activation int8_token, not {spec.activation}"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        return layout.block_bytes(fields["weight_packed"]), fields["weight_scale"].flatten()

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, row_scale = prepared
        return {
            "weight_packed": layout.unblock_bytes(codes, spec.n, spec.k),
            "weight_scale": row_scale.unsqueeze(1),
        }

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        codes, row_scale = prepared
        return library.call(torch.ops.lowbit.cpu_w8a8.default, x, codes, row_scale, bias, spec.k)
