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
        fmt = spec.format
        fields = self.restore(prepared, spec)
        weight = fmt.dequantize(fmt.unpack(fields, spec.n, spec.k))
        y = nn.functional.linear(spec.activation.quantize(x, fields), weight, None if bias is None else bias.float())
        return y.to(x.dtype)
