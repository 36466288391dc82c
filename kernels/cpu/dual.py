"""`cpu_dual`: two planes of bits with a scale each times float tokens, accumulated in float32.

    y[m, n] = sum_g (a1[n, g] * sum_{k in g} B1[n, k] x[m, k] + a2[n, g] * sum_{k in g} B2[n, k] x[m, k]) + bias[n]

Up to four tokens the inner sums are added up from subset sums of the tokens, so no weight is rounded; more bfloat16 tokens meet
weights that are rounded to bfloat16 once, where the processor multiplies bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.binary_dual import BinaryDual

UNIT = 16  # k of one 32-bit word, see csrc/dual.h


def cpu_dual_multi(
    x: Tensor, codes: Tensor, scale: Tensor, biases: Sequence[Tensor | None], ns: Sequence[int], k: int, group: int
) -> list[Tensor]:
    """x [M, k] -> [M, n] in x's dtype for each n of `ns`: layers that share the tokens.

    codes uint8 [B, K / 16, 32, 4], scale float16 or float32 [B, K / group, 2, 32], where a layer fills n / 32 blocks, rounded
    up, of the B.
    """
    x = x.contiguous()
    ys, arguments = library.arguments(x, k, codes.shape[0], biases, ns)
    library.load().lowbit_dual_multi(*arguments, codes.data_ptr(), scale.data_ptr(), scale.dtype == torch.float32, group)
    return ys


def cpu_dual(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, group: int) -> Tensor:
    """x [M, k] -> [M, n] in x's dtype: `cpu_dual_multi` for one layer."""
    return cpu_dual_multi(x, codes, scale, [bias], [n], k, group)[0]


torch.library.define(
    "lowbit::cpu_dual", "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int n, int k, int group) -> Tensor"
)
torch.library.define(
    "lowbit::cpu_dual_multi", "(Tensor x, Tensor codes, Tensor scale, Tensor?[] biases, int[] ns, int k, int group) -> Tensor[]"
)
torch.library.impl("lowbit::cpu_dual", "cpu", cpu_dual)
torch.library.impl("lowbit::cpu_dual_multi", "cpu", cpu_dual_multi)
torch.library.register_fake("lowbit::cpu_dual", lambda x, _c, _s, _b, n, *_: x.new_empty((x.shape[0], n)))
torch.library.register_fake("lowbit::cpu_dual_multi", lambda x, _c, _s, _b, ns, *_: library.fake_outputs(x, ns))


def block_planes(packed: Tensor, k: int) -> Tensor:
    """Words of 32 columns, uint8 [N, 8 * words] -> uint8 [N / 32, K / 16, 32, 4], 16 bits of plane 1 before 16 of plane 2."""
    halves = packed.view(torch.int16).view(len(packed), -1, 2, 2).transpose(2, 3).contiguous()  # [N, words, half, plane]
    units = halves.view(len(packed), -1).view(torch.int32)[:, : -(-k // UNIT)]
    return layout.block_words(layout.pad(units))


def unblock_planes(blocks: Tensor, n: int) -> Tensor:
    """Inverse of `block_planes`."""
    units = blocks.view(torch.int32).squeeze(-1).transpose(1, 2).flatten(0, 1)[:n]
    units = torch.nn.functional.pad(units, (0, units.shape[1] % 2)).contiguous()
    halves = units.view(torch.int16).view(n, -1, 2, 2).transpose(2, 3).contiguous()
    return halves.view(n, -1).view(torch.uint8)


@register
class CpuDual(layout.BlockKernel):
    """binary_dual with float tokens; prepared = (codes, scale) as `cpu_dual` takes them."""

    name: ClassVar[str] = "cpu_dual"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, BinaryDual):
            return f"it serves binary_dual, not {fmt.name}"
        if spec.activation.name != "none":
            return f"it serves activation none, not {spec.activation}"
        if fmt.group != -1 and fmt.group % UNIT:
            return f"group {fmt.group} is neither -1 nor a multiple of {UNIT}"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        scale = torch.stack([layout.block_groups(plane) for plane in fields["weight_scale"].unbind(-1)], 2)
        return block_planes(fields["weight_packed"], spec.k), scale

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, scale = prepared
        planes = [layout.unblock_groups(plane, spec.n) for plane in scale.unbind(2)]
        return {"weight_packed": unblock_planes(codes, spec.n), "weight_scale": torch.stack(planes, -1)}

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        return library.call(torch.ops.lowbit.cpu_dual.default, x, *prepared, bias, spec.n, *self._sizes(spec))

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        ns = [spec.n for spec in specs]
        return library.call_multi(torch.ops.lowbit.cpu_dual_multi.default, x, *joined, biases, ns, *self._sizes(specs[0]))

    @staticmethod
    def _sizes(spec: MatmulSpec) -> tuple[int, int]:
        """K and the group length."""
        assert isinstance(spec.format, BinaryDual)
        return spec.k, spec.k if spec.format.group == -1 else spec.format.group
