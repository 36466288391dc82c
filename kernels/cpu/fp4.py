"""`cpu_fp4`: MXFP4 and NVFP4 weights times float or FP4 tokens, accumulated in float32.

    y[m, n] = row_scale[n] * sum_g scale[n, g] * sum_{k in g} x[m, k] * e2m1(code[n, k]) + bias[n]

row_scale is 1 / D for nvfp4 and absent for mxfp4; no weight is ever rounded. FP4 tokens are rounded in torch first; under their
divisor they are exact in bfloat16, so they take the same way as float tokens, and their divisor joins row_scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.fp4_block import Fp4Block

BITS = 4


def cpu_fp4_multi(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    biases: Sequence[Tensor | None],
    ns: Sequence[int],
    group: int,
) -> list[Tensor]:
    """x [M, K] -> [M, n] in x's dtype for each n of `ns`: layers that share the tokens.

    codes uint8 [B, K / 8, 128], scale uint8 [B, K / group, 32] (E8M0 in groups of 32, the bits of E4M3 in groups of 16),
    row_scale float32 [32 B], where a layer fills n / 32 blocks, rounded up, of the B.
    """
    x = x.contiguous()
    ys, arguments = library.arguments(x, codes.shape[1] * 8, codes.shape[0], biases, ns)
    rows = None if row_scale is None else row_scale.data_ptr()
    library.load().lowbit_fp4_multi(*arguments, codes.data_ptr(), scale.data_ptr(), group, rows)
    return ys


def cpu_fp4(
    x: Tensor, codes: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, n: int, group: int
) -> Tensor:
    """x [M, K] -> [M, n] in x's dtype: `cpu_fp4_multi` for one layer, row_scale [n]."""
    return cpu_fp4_multi(x, codes, scale, row_scale, [bias], [n], group)[0]


_WEIGHT = "Tensor x, Tensor codes, Tensor scale, Tensor? row_scale"
torch.library.define("lowbit::cpu_fp4", f"({_WEIGHT}, Tensor? bias, int n, int group) -> Tensor")
torch.library.define("lowbit::cpu_fp4_multi", f"({_WEIGHT}, Tensor?[] biases, int[] ns, int group) -> Tensor[]")
torch.library.impl("lowbit::cpu_fp4", "cpu", cpu_fp4)
torch.library.impl("lowbit::cpu_fp4_multi", "cpu", cpu_fp4_multi)
torch.library.register_fake("lowbit::cpu_fp4", lambda x, _c, _s, _r, _b, n, _g: x.new_empty((x.shape[0], n)))
torch.library.register_fake("lowbit::cpu_fp4_multi", lambda x, _c, _s, _r, _b, ns, _g: library.fake_outputs(x, ns))


@register
class Fp4(layout.BlockKernel):
    """fp4_block; prepared = (codes, scale), then for nvfp4 row_scale and D of every row, then D of the tokens if they have one.

    Divisors are kept beside their reciprocal: `restore` must give back their exact bytes.
    """

    name: ClassVar[str] = "cpu_fp4"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, Fp4Block):
            return f"it serves fp4_block, not {spec.format.name}"
        if spec.activation.name not in ("none", spec.format.kind):
            return f"it serves activations none and {spec.format.kind} with {spec.format.kind} weights, not {spec.activation}"
        return spec.format.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        codes = layout.block_codes(fields["weight_packed"], BITS, spec.k)
        scale = layout.block_groups(fields["weight_scale"].view(torch.uint8))
        divisors = [fields[name] for name in ("weight_global_scale", "input_global_scale") if name in fields]
        if not divisors:
            return codes, scale
        row_scale = 1 / torch.stack(divisors).prod(0)
        return codes, scale, *(t.repeat(spec.n) for t in (row_scale, *divisors))

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, scale, *rows = prepared
        out = {
            "weight_packed": layout.pack_nibbles(layout.unblock_codes(codes, BITS, spec.n, spec.k)),
            "weight_scale": layout.unblock_groups(scale, spec.n).view(spec.format.fields(spec.n, spec.k)["weight_scale"].dtype),
        }
        names = ("weight_global_scale", "input_global_scale")
        return out | {name: value[:1].clone() for name, value in zip(names, rows[1:], strict=False)}

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        codes, scale, *per_row = prepared
        kind = spec.format.fields(spec.n, spec.k)["weight_scale"].dtype
        params = {"weight_scale": layout.unblock_groups(scale, rows.shape[0], rows).view(kind)}
        if per_row:
            params["weight_global_scale"] = per_row[1][:1].clone()
        return Codes(layout.unblock_codes(codes, BITS, rows.shape[0], spec.k, rows), params)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, Fp4Block)
        weight, seen = weight_of(prepared), tokens(x, prepared, spec)
        y = library.call(torch.ops.lowbit.cpu_fp4.default, seen, *weight, bias, spec.n, spec.format.group)
        return y.to(x.dtype)

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        assert isinstance(specs[0].format, Fp4Block)
        weight, seen, ns = weight_of(joined), tokens(x, joined, specs[0]), [spec.n for spec in specs]
        ys = library.call_multi(torch.ops.lowbit.cpu_fp4_multi.default, seen, *weight, biases, ns, specs[0].format.group)
        return [y.to(x.dtype) for y in ys]


def weight_of(prepared: Prepared) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and row_scale as the operators take them."""
    codes, scale, *per_row = prepared
    return codes, scale, per_row[0] if per_row else None


def tokens(x: Tensor, prepared: Prepared, spec: MatmulSpec) -> Tensor:
    """x [M, K] as the operator takes it: rounded to FP4 where asked for, bfloat16 staying so and other types in float32."""
    if isinstance(spec.activation, NvFp4):
        seen = spec.activation.multiples(x, prepared[4][:1])
    elif isinstance(spec.activation, MxFp4):
        seen = spec.activation.quantize(x, {})
    else:
        return x
    return seen.to(x.dtype) if x.dtype == torch.bfloat16 else seen
