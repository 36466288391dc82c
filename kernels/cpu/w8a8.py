"""`cpu_w8a8`: int8 weights with one scale per row times int8 tokens.

y[m, n] = sx[m] * s[n] * sum_k qx[m, k] * (code[n, k] - 128) + bias[n]          the sum exact in int32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int_group import IntGroup


def cpu_w8a8_multi(
    x: Tensor, codes: Tensor, row_scale: Tensor, biases: Sequence[Tensor | None], ns: Sequence[int], k: int
) -> list[Tensor]:
    """x [M, K] -> [M, n] in x's dtype for each n of `ns`: layers that share the tokens, quantized once.

    codes uint8 [B, K/4, 32, 4] holding w8 + 128, row_scale float32 [32 B], where a layer fills n / 32 blocks, rounded
    up, of the B.
    """
    x = x.contiguous()
    ys, arguments = library.arguments(x, k, codes.shape[0], biases, ns)
    library.load().lowbit_w8a8_multi(*arguments, codes.data_ptr(), row_scale.data_ptr())
    return ys


def cpu_w8a8(x: Tensor, codes: Tensor, row_scale: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype: `cpu_w8a8_multi` for one layer, row_scale [N]."""
    return cpu_w8a8_multi(x, codes, row_scale, [bias], [row_scale.shape[0]], k)[0]


torch.library.define("lowbit::cpu_w8a8", "(Tensor x, Tensor codes, Tensor row_scale, Tensor? bias, int k) -> Tensor")
torch.library.define(
    "lowbit::cpu_w8a8_multi", "(Tensor x, Tensor codes, Tensor row_scale, Tensor?[] biases, int[] ns, int k) -> Tensor[]"
)
torch.library.impl("lowbit::cpu_w8a8", "cpu", cpu_w8a8)
torch.library.impl("lowbit::cpu_w8a8_multi", "cpu", cpu_w8a8_multi)
torch.library.register_fake("lowbit::cpu_w8a8", lambda x, _c, rows, _b, _k: x.new_empty((x.shape[0], rows.shape[0])))
torch.library.register_fake("lowbit::cpu_w8a8_multi", lambda x, _c, _r, _b, ns, _k: library.fake_outputs(x, ns))


@register
class W8A8(layout.BlockKernel):
    """8-bit symmetric int_group per row with int8 tokens; prepared = (codes, row_scale) as `cpu_w8a8` takes them."""

    name: ClassVar[str] = "cpu_w8a8"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, IntGroup) or fmt.bits != 8 or not fmt.symmetric or fmt.group != -1:
            return f"it serves 8-bit symmetric int_group with group -1, not {fmt}"
        if spec.activation.name != "int8_token":
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

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        ns = [spec.n for spec in specs]
        return library.call_multi(torch.ops.lowbit.cpu_w8a8_multi.default, x, *joined, biases, ns, specs[0].k)
