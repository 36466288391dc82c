"""`cpu_weight_only`: group weights of 2, 3, 4 or 8 bits times float tokens, accumulated in float32.

    y[m, n] = sum_g scale[n, g] * (sum_{k in g} x[m, k] * (code[n, k] - c) - (zero[n, g] - c) * sum_{k in g} x[m, k])

c = 2^(bits - 1). Codes and scales stay apart until the group's float32 sum is known, so no weight is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.int_group import IntGroup, pack_bits

BITS = (2, 3, 4, 8)


def cpu_weight_only_multi(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    biases: Sequence[Tensor | None],
    ns: Sequence[int],
    k: int,
    bits: int,
    group: int,
) -> list[Tensor]:
    """x [M, k] -> [M, n] in x's dtype for each n of `ns`: layers that share the tokens.

    codes uint8 [B, K / unit, bytes of a unit], scale float16 or float32 and zero uint8 [B, K / group, 32], where a layer
    fills n / 32 blocks, rounded up, of the B.
    """
    x = x.contiguous()
    ys, arguments = library.arguments(x, k, codes.shape[0], biases, ns)
    library.load().lowbit_weight_only_multi(
        *(*arguments, bits, codes.data_ptr(), scale.data_ptr(), scale.dtype == torch.float32),
        *(None if zero is None else zero.data_ptr(), group),
    )
    return ys


def cpu_weight_only(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, n: int, k: int, bits: int, group: int
) -> Tensor:
    """x [M, k] -> [M, n] in x's dtype: `cpu_weight_only_multi` for one layer."""
    return cpu_weight_only_multi(x, codes, scale, zero, [bias], [n], k, bits, group)[0]


_WEIGHT = "Tensor x, Tensor codes, Tensor scale, Tensor? zero"
torch.library.define("lowbit::cpu_weight_only", f"({_WEIGHT}, Tensor? bias, int n, int k, int bits, int group) -> Tensor")
torch.library.define(
    "lowbit::cpu_weight_only_multi", f"({_WEIGHT}, Tensor?[] biases, int[] ns, int k, int bits, int group) -> Tensor[]"
)
torch.library.impl("lowbit::cpu_weight_only", "cpu", cpu_weight_only)
torch.library.impl("lowbit::cpu_weight_only_multi", "cpu", cpu_weight_only_multi)
torch.library.register_fake("lowbit::cpu_weight_only", lambda x, _c, _s, _z, _b, n, *_: x.new_empty((x.shape[0], n)))
torch.library.register_fake("lowbit::cpu_weight_only_multi", lambda x, _c, _s, _z, _b, ns, *_: library.fake_outputs(x, ns))


@register
class WeightOnly(layout.BlockKernel):
    """int_group with float tokens; prepared = (codes, scale) or (codes, scale, zero) as `cpu_weight_only` takes them."""

    name: ClassVar[str] = "cpu_weight_only"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, IntGroup):
            return f"it serves int_group, not {fmt.name}"
        if spec.activation.name != "none":
            return f"it serves activation none, not {spec.activation}"
        if fmt.bits not in BITS:
            return f"it serves codes of {', '.join(map(str, BITS))} bits, not of {fmt.bits}"
        if fmt.group != -1 and fmt.group % 16:
            return f"group {fmt.group} is neither -1 nor a multiple of 16"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        assert isinstance(spec.format, IntGroup)
        codes = layout.block_codes(fields["weight_packed"], spec.format.bits, spec.k)
        return codes, *(layout.block_groups(fields[name]) for name in ("weight_scale", "weight_zero") if name in fields)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        assert isinstance(spec.format, IntGroup)
        blocks, *groups = prepared
        codes = layout.unblock_codes(blocks, spec.format.bits, spec.n, spec.k)
        names = ("weight_scale", "weight_zero")[: len(groups)]
        out = {"weight_packed": pack_bits(codes, spec.format.bits)}
        return out | {name: layout.unblock_groups(t, spec.n) for name, t in zip(names, groups, strict=True)}

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        assert isinstance(spec.format, IntGroup)
        blocks, *groups = prepared
        codes = layout.unblock_codes(blocks, spec.format.bits, rows.shape[0], spec.k, rows)
        names = ("weight_scale", "weight_zero")[: len(groups)]
        return Codes(codes, {n: layout.unblock_groups(t, rows.shape[0], rows) for n, t in zip(names, groups, strict=True)})

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        codes, scale, zero, *rest = self._arguments(prepared, spec)
        return library.call(torch.ops.lowbit.cpu_weight_only.default, x, codes, scale, zero, bias, spec.n, *rest)

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        codes, scale, zero, *rest = self._arguments(joined, specs[0])
        ns = [spec.n for spec in specs]
        return library.call_multi(torch.ops.lowbit.cpu_weight_only_multi.default, x, codes, scale, zero, biases, ns, *rest)

    @staticmethod
    def _arguments(prepared: Prepared, spec: MatmulSpec) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
        assert isinstance(spec.format, IntGroup)
        codes, scale, *zero = prepared
        group = spec.k if spec.format.group == -1 else spec.format.group
        return codes, scale, zero[0] if zero else None, spec.k, spec.format.bits, group
