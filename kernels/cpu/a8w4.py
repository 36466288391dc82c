"""`cpu_a8w4`: dual-grained 4-bit weights times tokens in integers of up to 8 bits, all in integers until the last step.

y[m, n] = sx[m] * s1[n] * sum_k qx[m, k] * w8[n, k] + bias[n]          w8 = u * s2 + o, the sum exact in int32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activations.int_token import IntToken
from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int4_dual import Int4Dual


def cpu_a8w4_multi(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    row_scale: Tensor,
    biases: Sequence[Tensor | None],
    ns: Sequence[int],
    group: int,
    top: int,
    reach: float,
) -> list[Tensor]:
    """x [M, K] -> [M, n] in x's dtype for each n of `ns`: layers that share the tokens, quantized once.

    codes uint8 [B, K/8, 32, 4], scales uint8 [B, K/G, 2, 32], row_scale float32 [32 B], where a layer fills n / 32
    blocks, rounded up, of the B. top, reach: see `quantize_token`.
    """
    x = x.contiguous()
    ys, arguments = library.arguments(x, codes.shape[1] * 8, codes.shape[0], biases, ns)
    library.load().lowbit_a8w4_multi(*arguments, codes.data_ptr(), scales.data_ptr(), group, row_scale.data_ptr(), top, reach)
    return ys


def cpu_a8w4(
    x: Tensor, codes: Tensor, scales: Tensor, row_scale: Tensor, bias: Tensor | None, group: int, top: int, reach: float
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype: `cpu_a8w4_multi` for one layer, row_scale [N]."""
    return cpu_a8w4_multi(x, codes, scales, row_scale, [bias], [row_scale.shape[0]], group, top, reach)[0]


torch.library.define(
    "lowbit::cpu_a8w4",
    "(Tensor x, Tensor codes, Tensor scales, Tensor row_scale, Tensor? bias, int group, int top, float reach) -> Tensor",
)
torch.library.define(
    "lowbit::cpu_a8w4_multi",
    "(Tensor x, Tensor codes, Tensor scales, Tensor row_scale, Tensor?[] biases, int[] ns, int group, int top, float reach)"
    " -> Tensor[]",
)
torch.library.impl("lowbit::cpu_a8w4", "cpu", cpu_a8w4)
torch.library.impl("lowbit::cpu_a8w4_multi", "cpu", cpu_a8w4_multi)
torch.library.register_fake(
    "lowbit::cpu_a8w4", lambda x, _c, _s, rows, _b, _g, _t, _e: x.new_empty((x.shape[0], rows.shape[0]))
)
torch.library.register_fake("lowbit::cpu_a8w4_multi", lambda x, _c, _s, _r, _b, ns, _g, _t, _e: library.fake_outputs(x, ns))


@register
class A8W4(layout.BlockKernel):
    """int4_dual with symmetric integer tokens; prepared = (codes, scales, row_scale) as `cpu_a8w4` takes them."""

    name: ClassVar[str] = "cpu_a8w4"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, Int4Dual):
            return f"it serves int4_dual, not {spec.format.name}"
        if not isinstance(spec.activation, IntToken):
            return f"it serves activations int8_token, int4_token and adaptive_token, not {spec.activation}"
        if spec.format.group % 16:
            return f"group {spec.format.group} is not a multiple of 16"
        return spec.format.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        codes = layout.block_nibbles(fields["weight_packed"], layout.HALVES)
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
        assert isinstance(spec.activation, IntToken)
        rule, group = spec.activation, spec.format.group
        return library.call(torch.ops.lowbit.cpu_a8w4.default, x, *prepared, bias, group, rule.top, rule.reach)

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        assert isinstance(specs[0].format, Int4Dual)
        assert isinstance(specs[0].activation, IntToken)
        ns, group, rule = [spec.n for spec in specs], specs[0].format.group, specs[0].activation
        return library.call_multi(torch.ops.lowbit.cpu_a8w4_multi.default, x, *joined, biases, ns, group, rule.top, rule.reach)
