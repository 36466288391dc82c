"""`adaptive_token`: 8 bits for the tokens that the model's attention sink marks, 4 bits for the others, one scale per token.

    code = round(x / s)        s = absmax / 127 where the token's tag is set, else clip * absmax / 7

Tags come with the tokens, from the attention before (quant/serve/token_bits.py); tokens without tags are all read with 8 bits,
as in calibration. So this rule is `int8_token` where every tag is set and `int4_token` where none is, bit for bit, and a kernel
that serves both serves it: the codes of either kind of row are integers that an int8 product takes.
(EdgeQAT, later Squat, Shen et al., 2024: token-adaptive quantization. Their scales are learned per tensor, these are measured.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import register
from quant.kernels.activations.int_token import Int4Token, Int8Token, IntToken

TAGS = "tags"  # name among the fields of a bool [...] that may come with tokens [..., K]; True: 8 bits


@register
@dataclass(frozen=True, kw_only=True)
class AdaptiveToken(IntToken):
    """clip: of tokens of 4 bits, as in `int4_token`. `top` is that of tokens without tags."""

    name: ClassVar[str] = "adaptive_token"
    top: ClassVar[int] = 127
    clip: float = 1.0

    def __post_init__(self) -> None:
        self.rules()  # which checks clip

    def rules(self) -> tuple[Int8Token, Int4Token]:
        """The rules of tagged tokens and of the others."""
        return Int8Token(rotate=self.rotate), Int4Token(rotate=self.rotate, clip=self.clip)

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        many, few = (rule.quantize(x, fields) for rule in self.rules())
        tags = fields.get(TAGS)
        return many if tags is None else torch.where(tags.unsqueeze(-1), many, few)


def by_tag(rule: AdaptiveToken, x: Tensor, tags: Tensor, multiply: Callable[[Tensor, IntToken], Tensor]) -> Tensor:
    """[M, N]: multiply(rows, their rule) of the rows of x [M, K] with and without a tag, bool [M], put back in order."""
    many, few = rule.rules()
    if bool(tags.all()):
        return multiply(x, many)
    if not bool(tags.any()):
        return multiply(x, few)
    tagged = multiply(x[tags], many)
    y = tagged.new_empty(x.shape[0], tagged.shape[1])
    y[tags] = tagged
    y[~tags] = multiply(x[~tags], few)
    return y
