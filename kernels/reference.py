"""The reference kernel: dequantize, quantize the activations, multiply in torch. Always available, always right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields


@register
class Reference(Kernel):
    """Any format, any activation rule, any device torch has."""

    name: ClassVar[str] = "reference"
    priority: ClassVar[int] = -100

    def refuses(self, spec: MatmulSpec) -> str | None:
        return None

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        return tuple(fields[name] for name in spec.fields())

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        return dict(zip(spec.fields(), prepared, strict=True))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        return DECODED.matmul(x, self.unpacked(prepared, spec)[1], bias, spec)

    def unpacked(self, prepared: Prepared, spec: MatmulSpec) -> tuple[Kernel, Prepared]:
        weight = spec.format.dequantize(spec.format.unpack(self.restore(prepared, spec), spec.n, spec.k))
        return DECODED, (*prepared, weight)


class Decoded(Reference):
    """The second half of the reference kernel, its weight decoded before; never chosen for a layer that stays in memory."""

    def unpacked(self, prepared: Prepared, spec: MatmulSpec) -> tuple[Kernel, Prepared]:
        return self, prepared

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        return super().restore(prepared[:-1], spec)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        tokens = spec.activation.quantize(x, self.restore(prepared, spec))
        return nn.functional.linear(tokens, prepared[-1], None if bias is None else bias.float()).to(x.dtype)


DECODED = Decoded()
