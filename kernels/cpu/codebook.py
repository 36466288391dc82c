"""`cpu_codebook`: sums of vectors from codebooks times float tokens, accumulated in float32.

    y[m, n] = s[n] * sum_j <x[m, tile j], sum_b C[b, code[n, j, b]]> + bias[n]

Up to four tokens look the products of their tiles with all entries up, so no weight is made. More meet the sums of entries in
float32, rounded to bfloat16 for bfloat16 tokens where the processor multiplies that. Without AVX-512 they are looked up too, or
from MANY tokens on the weight is decoded and torch multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant.kernels.cpu import layout, library
from quant.kernels.dispatch import MatmulSpec, Prepared, register
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.codebook import Codebook

COLUMNS = 16  # whose tables of products are in the L1 cache together, see csrc/codebook.h
MANY = 96  # at 2048 x 2048 with AVX2, 64 tokens are looked up in 46 ms; decoding takes 28 (1x8g4) to 51 (2x8g8), torch 8
GROUPS = (2, 4, 8, 16, 32, 64)  # a slice of weights holds whole tiles, see csrc/avx512codebook.h


def cpu_codebook(x: Tensor, codes: Tensor, book: Tensor, row_scale: Tensor, bias: Tensor | None, n: int, k: int) -> Tensor:
    """x [M, k] -> [M, n] in x's dtype.

    codes uint8 [K / g * books / 16, N / 32, 16, 32], both rounded up, book float32 [books, g, 256], row_scale float32 [n].
    """
    books, group, _ = book.shape
    x = x.contiguous()
    ys, arguments = library.arguments(x, k, codes.shape[1], [bias], [n])
    library.load().lowbit_codebook(*arguments, codes.data_ptr(), book.data_ptr(), books, group, row_scale.data_ptr())
    return ys[0]


torch.library.define(
    "lowbit::cpu_codebook", "(Tensor x, Tensor codes, Tensor book, Tensor row_scale, Tensor? bias, int n, int k) -> Tensor"
)
torch.library.impl("lowbit::cpu_codebook", "cpu", cpu_codebook)
torch.library.register_fake("lowbit::cpu_codebook", lambda x, _c, _b, _s, _bias, n, _k: x.new_empty((x.shape[0], n)))


def block_columns(packed: Tensor) -> Tensor:
    """uint8 [N, C] -> [C / 16, N / 32, 16, 32], rounded up with zeros."""
    padded = layout.pad(packed, COLUMNS)
    return padded.view(-1, layout.ROWS, padded.shape[1] // COLUMNS, COLUMNS).permute(2, 0, 3, 1).contiguous()


def unblock_columns(blocks: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Rows int64 [M] of what `block_columns` was given: uint8 [M, columns]."""
    return blocks[:, rows // layout.ROWS, :, rows % layout.ROWS].flatten(1)[:, :columns].contiguous()


@register
class CpuCodebook(layout.BlockKernel):
    """codebook with float tokens; prepared = (codes, book, row_scale) as `cpu_codebook` takes them.

    Layers are not joined: each has codebooks of its own.
    """

    name: ClassVar[str] = "cpu_codebook"
    priority: ClassVar[int] = 10

    def refuses(self, spec: MatmulSpec) -> str | None:
        fmt = spec.format
        if not isinstance(fmt, Codebook):
            return f"it serves codebook, not {fmt.name}"
        if spec.activation.name != "none":
            return f"it serves activation none, not {spec.activation}"
        if fmt.group not in GROUPS:
            return f"group {fmt.group} is none of {', '.join(map(str, GROUPS))}"
        return fmt.refuses(spec.n, spec.k) or library.refuses(spec)

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        book = fields["codebook"].float().transpose(1, 2).contiguous()
        return block_columns(fields["weight_packed"]), book, fields["weight_scale"].flatten().clone()

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        return spec.format.pack(self.rows(prepared, torch.arange(spec.n), spec))

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        codes, book, scale = prepared
        assert isinstance(spec.format, Codebook)
        picked = unblock_columns(codes, rows, spec.k // spec.format.group * len(book))
        params = {"codebook": book.transpose(1, 2).half(), "weight_scale": scale[rows].unsqueeze(1)}
        return Codes(picked.view(len(rows), -1, len(book)), params)

    def join(self, prepared: Sequence[Prepared]) -> tuple[Prepared, list[Prepared]] | None:
        return super().join(prepared) if len(prepared) == 1 else None

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        if x.shape[0] >= MANY and not library.load().lowbit_codebook_shares():
            weight = spec.format.dequantize(self.rows(prepared, torch.arange(spec.n), spec)).to(x.dtype)
            return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return library.call(torch.ops.lowbit.cpu_codebook.default, x, *prepared, bias, spec.n, spec.k)
