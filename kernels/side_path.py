"""`side_path`: a low_rank weight on the kernel of its base format, the side path added as its result is written.

    y = base(x) + (x A^T) B^T + bias

For one token B (A x) goes into the base kernel as its bias, so nothing is read or written twice; more tokens add a thin product
to the result in place. Any device whose base kernel serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, choose, register
from quant.kernels.format import Fields
from quant.kernels.formats.low_rank import SIDE, LowRank


@cache
def base_of(spec: MatmulSpec) -> tuple[Kernel, MatmulSpec]:
    """The kernel of the base format."""
    assert isinstance(spec.format, LowRank)
    inner = replace(spec, format=spec.format.base)
    return choose(inner)[0], inner


@register
class SidePath(Kernel):
    """low_rank with float tokens; prepared = (A, B, the base kernel's tensors)."""

    name: ClassVar[str] = "side_path"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, LowRank):
            return f"it serves low_rank, not {spec.format.name}"
        if spec.activation.name != "none":
            return f"it serves activation none, not {spec.activation}"
        return None

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        kernel, inner = base_of(spec)
        rest = {name: t for name, t in fields.items() if name not in SIDE}
        return fields["side_in"], fields["side_out"], *kernel.prepare(rest, inner)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        kernel, inner = base_of(spec)
        return kernel.restore(prepared[2:], inner) | dict(zip(SIDE, prepared[:2], strict=True))

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        kernel, inner = base_of(spec)
        side_in, side_out = (t.float() for t in prepared[:2])
        thin = x.float() @ side_in.T  # [M, r]
        if len(x) == 1:
            own = (thin @ side_out.T).squeeze(0)
            return kernel.matmul(x, prepared[2:], own if bias is None else own + bias, inner)
        y = kernel.matmul(x, prepared[2:], bias, inner)
        return y.float().addmm_(thin, side_out.T).to(y.dtype)
