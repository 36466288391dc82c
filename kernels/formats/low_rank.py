"""`low_rank`: a weight of any other format plus a product of two thin float16 matrices, its side path.

    w = base + B A          A: `side_in` [r, K], B: `side_out` [N, r]

What few bits lose is not spread evenly over directions: a few of them, kept in float16, hold much of it (ApiQ, Liao et al.,
2024; LQER, Zhang et al., 2024). `side_in` reads the tokens as the base does, rotated; tokens that are rounded are rounded for
both. 16 r (N + K) / (N K) bits per weight come on top, which stored sizes count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from quant.kernels.format import Codes, Field, Fields, Format, from_config, register
from quant.kernels.formats.int_group import IntGroup

SIDE = ("side_in", "side_out")


@register
@dataclass(frozen=True, kw_only=True)
class LowRank(Format):
    """rank: r, at least 1. base: the format of the rest, which must store what it stores row by row."""

    name: ClassVar[str] = "low_rank"
    whole: ClassVar[frozenset[str]] = frozenset({"side_in"})
    additive: ClassVar[frozenset[str]] = frozenset(SIDE)
    rank: int = 8
    base: Format = field(default_factory=lambda: IntGroup(bits=2))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"low_rank has no rank {self.rank}; give 1 or more, or the base format alone for 0")
        if isinstance(self.base, LowRank) or self.base.whole:
            raise ValueError(f"low_rank cannot stand beside {self.base.name}, parts of which belong to a weight as a whole")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> LowRank:
        """base: a format's config."""
        plain = dict(values)
        base = plain.pop("base", {"name": "int_group", "bits": 2})
        if not isinstance(base, Mapping):
            raise ValueError(f"format low_rank: base is {base!r}; it must be a format, e.g. {{name: int_group, bits: 2}}")
        if odd := plain.keys() - {"rank"}:
            raise ValueError(f"format low_rank has no parameter {min(odd)!r}; it has: rank, base")
        if type(rank := plain.get("rank", cls.rank)) is not int:
            raise ValueError(f"format low_rank: rank is {rank!r}; it must be of type int")
        return cls(rank=rank, base=from_config(base))

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "rank": self.rank, "base": self.base.config()}

    def __str__(self) -> str:
        return f"{self.base} + rank {self.rank}"

    @property
    def inner(self) -> Format:
        return self.base

    def refuses(self, n: int, k: int) -> str | None:
        if self.rank >= min(n, k):
            return f"rank {self.rank} of a [{n}, {k}] weight is not low; give less than {min(n, k)}"
        return self.base.refuses(n, k)

    def fields(self, n: int, k: int) -> dict[str, Field]:
        side = dict(zip(SIDE, (Field((self.rank, k), torch.float16), Field((n, self.rank), torch.float16)), strict=True))
        return self.base.fields(n, k) | side

    def pack(self, codes: Codes) -> Fields:
        coded, side = self.parts(codes)
        return self.base.pack(coded) | {name: t.contiguous() for name, t in side.items()}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        coded = self.base.unpack(fields, n, k)
        return Codes(coded.codes, {**coded.params, **{name: fields[name] for name in SIDE}})

    def dequantize(self, codes: Codes) -> Tensor:
        coded, side = self.parts(codes)
        return self.base.dequantize(coded) + side["side_out"].float() @ side["side_in"].float()

    def nearest(self, weight: Tensor) -> Codes:
        """The base's codes, and of what they lose the nearest matrix of rank r."""
        coded = self.base.nearest(weight)
        return self.beside(coded, *nearest_product(weight - self.base.dequantize(coded), self.rank))

    def shares(self, codes: Codes) -> dict[str, float]:
        return self.base.shares(self.parts(codes)[0])

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        self.base.check({name: t for name, t in fields.items() if name not in SIDE}, n, k)

    def parts(self, codes: Codes) -> tuple[Codes, dict[str, Tensor]]:
        """The base's codes, and the side path."""
        params = dict(codes.params)
        side = {name: params.pop(name) for name in SIDE}
        return Codes(codes.codes, params), side

    def beside(self, coded: Codes, side_out: Tensor, side_in: Tensor) -> Codes:
        """The base's codes with a side path [N, r], [r, K], stored in float16."""
        halves = (t.half().clone(memory_format=torch.contiguous_format) for t in (side_in, side_out))
        return Codes(coded.codes, {**coded.params, **dict(zip(SIDE, halves, strict=True))})


def nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[N, r] and [r, K], of equal norms, whose product is the nearest one to float32 [N, K]."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root.unsqueeze(1) * right[:rank]
