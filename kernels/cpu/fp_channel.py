"""`cpu_fp_channel`: 4-bit floats under row or group scales times float tokens, or times tokens rounded by `fp_shift`.

    y[m, n] = t[m] * sum_g scale[n, g] * sum_{k in g} x[m, k] * value(code[n, k])

t = 1 for float tokens. Tokens of few bits are multiplied without their scale t: then they, the values of the codes and so
all products are exact in bfloat16. It is the weight-only kernel with a table of values in place of code - 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activations.fp_shift import SHORT, FpShift
from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.minifloat import constants


def cpu_fp_channel_multi(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    kinds: Tensor,
    token_scale: Tensor | None,
    biases: Sequence[Tensor | None],
    ns: Sequence[int],
    k: int,
    group: int,
) -> list[Tensor]:
    """x [M, k] -> [M, n] in x's dtype for each n of `ns`: layers that share the tokens.

    codes uint8 [B, K / 8, 128], scale float16 or float32 [B, K / group, 32], kinds uint8 [B, 1] (exponent bits), where a
    layer fills n / 32 blocks, rounded up, of the B. token_scale float32 [M].
    """
    x = x.contiguous()
    ys, arguments = library.arguments(x, k, codes.shape[0], biases, ns)
    if token_scale is not None and (token_scale.shape != x.shape[:1] or token_scale.dtype != torch.float32):
        raise ValueError(f"token_scale is {token_scale.dtype} {tuple(token_scale.shape)}; the kernel needs float32 [{len(x)}]")
    library.load().lowbit_fp_channel_multi(
        *(*arguments, codes.data_ptr(), scale.data_ptr(), scale.dtype == torch.float32, kinds.data_ptr(), group),
        None if token_scale is None else token_scale.data_ptr(),
    )
    return ys


def cpu_fp_channel(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    kinds: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    group: int,
) -> Tensor:
    """x [M, k] -> [M, n] in x's dtype: `cpu_fp_channel_multi` for one layer."""
    return cpu_fp_channel_multi(x, codes, scale, kinds, token_scale, [bias], [n], k, group)[0]


def cpu_fp_shift(
    x: Tensor, scale: Tensor, shift: Tensor, exponents: Tensor, bits: int, dynamic: bool, group: int
) -> tuple[Tensor, Tensor]:
    """`FpShift.codes` of x [M, K]: the rounded tokens without their scales, in x's dtype, and the scales float32 [M]."""
    x = x.contiguous()
    if shift.numel() != x.shape[-1]:
        raise ValueError(f"input_shift holds {shift.numel()} channels; x is {tuple(x.shape)}")
    y, scales = torch.empty_like(x), torch.empty(x.shape[0])
    numbers = constants(FpShift(bits=bits).kind(int(exponents)))
    length, shorten = (x.shape[-1], 0.0) if group == -1 else (group, SHORT / numbers[1])
    library.load().lowbit_fp_shift(
        *(x.data_ptr(), library.dtype_code(x), y.data_ptr(), scales.data_ptr(), shift.data_ptr(), *x.shape),
        *(float(scale), dynamic, *numbers, length, shorten),
    )
    return y, scales


_WEIGHT = "Tensor x, Tensor codes, Tensor scale, Tensor kinds, Tensor? token_scale"
torch.library.define("lowbit::cpu_fp_channel", f"({_WEIGHT}, Tensor? bias, int n, int k, int group) -> Tensor")
torch.library.impl("lowbit::cpu_fp_channel", "cpu", cpu_fp_channel)
torch.library.register_fake("lowbit::cpu_fp_channel", lambda x, _c, _s, _k, _t, _b, n, *_: x.new_empty((x.shape[0], n)))
torch.library.define("lowbit::cpu_fp_channel_multi", f"({_WEIGHT}, Tensor?[] biases, int[] ns, int k, int group) -> Tensor[]")
torch.library.impl("lowbit::cpu_fp_channel_multi", "cpu", cpu_fp_channel_multi)
torch.library.register_fake("lowbit::cpu_fp_channel_multi", lambda x, _c, _s, _k, _t, _b, ns, *_: library.fake_outputs(x, ns))
torch.library.define(
    "lowbit::cpu_fp_shift",
    "(Tensor x, Tensor scale, Tensor shift, Tensor exponents, int bits, bool dynamic, int group) -> (Tensor, Tensor)",
)
torch.library.impl("lowbit::cpu_fp_shift", "cpu", cpu_fp_shift)
torch.library.register_fake(
    "lowbit::cpu_fp_shift", lambda x, *_: (torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32))
)


@register
class FpChannelKernel(layout.BlockKernel):
    """fp_channel of 4 bits; prepared = (codes, scale, kinds), and the three tensors of fp_shift where tokens are rounded."""

    name: ClassVar[str] = "cpu_fp_channel"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, FpChannel):
            return f"it serves fp_channel, not {fmt.name}"
        if fmt.bits != 4:
            return f"it serves 4-bit codes, not {fmt.bits} bits"
        if spec.activation.name != "none" and not isinstance(spec.activation, FpShift):
            return f"it serves activations none and fp_shift, not {spec.activation}"
        if fmt.group != -1 and fmt.group % 16:
            return f"group {fmt.group} is neither -1 nor a multiple of 16"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        codes = layout.block_codes(fields["weight_packed"], 4, spec.k)
        kinds = fields["weight_exponents"].repeat(len(codes), 1)
        return (
            codes,
            layout.block_groups(fields["weight_scale"]),
            kinds,
            *(fields[name] for name in spec.activation.fields(spec.k)),
        )

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, scale, kinds, *inputs = prepared
        weight = {
            "weight_packed": layout.pack_nibbles(layout.unblock_codes(codes, 4, spec.n, spec.k)),
            "weight_scale": layout.unblock_groups(scale, spec.n),
            "weight_exponents": kinds[0].clone(),
        }
        return weight | dict(zip(spec.activation.fields(spec.k), inputs, strict=True))

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        codes, scale, kinds, *_ = prepared
        picked = layout.unblock_codes(codes, 4, rows.shape[0], spec.k, rows)
        scales = layout.unblock_groups(scale, rows.shape[0], rows)
        return Codes(picked, {"weight_scale": scales, "weight_exponents": kinds[0].clone()})

    def join(self, prepared: Sequence[Prepared]) -> tuple[Prepared, list[Prepared]] | None:
        """Layers whose tokens are rounded alike."""
        inputs = prepared[0][3:]
        if any(not torch.equal(a, b) for other in prepared[1:] for a, b in zip(inputs, other[3:], strict=True)):
            return None
        joined = super().join([layer[:3] for layer in prepared])
        assert joined is not None
        return (*joined[0], *inputs), [(*part, *inputs) for part in joined[1]]

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        tokens, weight, k, group = self._arguments(x, prepared, spec)
        y = library.call(torch.ops.lowbit.cpu_fp_channel.default, tokens, *weight, bias, spec.n, k, group)
        return y.to(x.dtype)

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        tokens, weight, k, group = self._arguments(x, joined, specs[0])
        ns = [spec.n for spec in specs]
        ys = library.call_multi(torch.ops.lowbit.cpu_fp_channel_multi.default, tokens, *weight, biases, ns, k, group)
        return [y.to(x.dtype) for y in ys]

    @staticmethod
    def _arguments(x: Tensor, prepared: Prepared, spec: MatmulSpec) -> tuple[Tensor, tuple[Tensor | None, ...], int, int]:
        """Tokens as the operators take them; codes, scale, kinds and token scales; K; group length."""
        assert isinstance(spec.format, FpChannel)
        codes, scale, kinds, *inputs = prepared
        tokens, token_scale, rule = x, None, spec.activation
        if isinstance(rule, FpShift):
            wide = x.float() if x.dtype == torch.float16 else x  # the values reach further than float16
            operator = torch.ops.lowbit.cpu_fp_shift.default
            tokens, token_scale = library.call_multi(operator, wide, *inputs, rule.bits, rule.dynamic, rule.group)
        return tokens, (codes, scale, kinds, token_scale), spec.k, spec.k if spec.format.group == -1 else spec.format.group
