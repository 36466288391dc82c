"""`cpu_codebook`: vectors out of codebooks times float tokens, accumulated in float32.

    y[m, n] = s[n] * sum_j <x[m, tile j], sum_b C[b, code[n, j, b]]> + bias[n]

Few tokens read weights from the codebooks, which stay in the L1 cache; for many it is decoded once, and torch multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.codebook import Codebook

MANY = 192  # tokens from which decoding the whole weight is faster


def cpu_codebook(x: Tensor, codes: Tensor, books: Tensor, row_scale: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """x [M, K] -> [M, n] in x's dtype.

    codes uint8 [B, K / g, books, 32] of B blocks of 32 rows, books float32 [books, 256, g], row_scale float32 [32 B].
    """
    x = x.contiguous()
    (y,), arguments = library.arguments(x, codes.shape[1] * books.shape[2], codes.shape[0], [bias], [n])
    count, _, length = books.shape
    library.load().lowbit_codebook(*arguments, codes.data_ptr(), books.data_ptr(), count, length, row_scale.data_ptr())
    return y


torch.library.define(
    "lowbit::cpu_codebook", "(Tensor x, Tensor codes, Tensor books, Tensor row_scale, Tensor? bias, int n) -> Tensor"
)
torch.library.impl("lowbit::cpu_codebook", "cpu", cpu_codebook)
torch.library.register_fake("lowbit::cpu_codebook", lambda x, _c, _b, _r, _bias, n: x.new_empty((x.shape[0], n)))


@register
class CpuCodebook(Kernel):
    """codebook with float tokens; prepared = (codes, books, row_scale) as `cpu_codebook` takes them.

    Layers are not joined: after training each has codebooks of its own.
    """

    name: ClassVar[str] = "cpu_codebook"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, Codebook):
            return f"it serves codebook, not {fmt.name}"
        if spec.activation.name != "none":
            return f"it serves activation none, not {spec.activation}"
        if fmt.group % 4:
            return f"vectors of {fmt.group} are no whole number of quarters"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        assert isinstance(spec.format, Codebook)
        padded = layout.pad(fields["weight_packed"])
        tiles = padded.view(-1, layout.ROWS, spec.k // spec.format.group, spec.format.books)
        scale = nn.functional.pad(fields["weight_scale"].flatten(), (0, len(padded) - spec.n))
        return tiles.permute(0, 2, 3, 1).contiguous(), fields["codebook"].float(), scale

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        codes, books, scale = prepared
        packed = codes.permute(0, 3, 1, 2).flatten(0, 1)[: spec.n].flatten(1)
        return {
            "weight_packed": packed.contiguous(),
            "codebook": books.half(),
            "weight_scale": scale[: spec.n].unsqueeze(1).clone(),
        }

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        if x.shape[0] < MANY:
            return library.call(torch.ops.lowbit.cpu_codebook.default, x, *prepared, bias, spec.n)
        fields = self.restore(prepared, spec)
        weight = spec.format.dequantize(spec.format.unpack(fields, spec.n, spec.k)).to(x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
