"""`binary_dual`: two bits per weight, each under a scale of its own: four levels, two degrees of freedom per group.

    w[n, k] = a1[n, k // G] * B1[n, k] + a2[n, k // G] * B2[n, k]          code = B1 + 2 * B2: level 0, a1, a2 or a1 + a2

Plane bits lie in 64-bit words: 32 columns of B1, then the same 32 of B2, bit i of a half being column 32 c + i. K is padded
with zero bits to whole words. a1 and a2 lie side by side, float16, or float32 for one group per row (G = -1). They may have any
signs; where a1 > 0 > a2 and a1 > -a2 they are the FDB grid of DB-LLM (Chen et al., 2024), and s * {-1, 0, 1, 2} if a1 = -2 a2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quant.kernels.format import Codes, Field, Fields, Grouped, register, storable
from quant.kernels.formats.int_group import pack_bits, unpack_bits

WORD = 32  # columns


def levels(scales: Tensor) -> list[Tensor]:
    """What codes 0 to 3 stand for: scales float32 [..., 2] -> four of [...]."""
    a1, a2 = scales.unbind(-1)
    return [torch.zeros_like(a1), a1, a2, a1 + a2]


@register
@dataclass(frozen=True, kw_only=True)
class BinaryDual(Grouped):
    """group: any divisor of K, or -1. bits: 2, one per plane."""

    name: ClassVar[str] = "binary_dual"
    bits: int = 2
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits != 2:
            raise ValueError(f"binary_dual has two planes of one bit: bits is 2, not {self.bits}")
        super().__post_init__()

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of `weight_scale` on disk. Quantizers round to it before they choose codes."""
        return torch.float32 if self.group == -1 else torch.float16

    def refuses(self, n: int, k: int) -> str | None:
        return f"group {self.group} does not divide K = {k}" if self.group != -1 and k % self.group else None

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {
            "weight_packed": Field((n, -(-k // WORD) * 8), torch.uint8),
            "weight_scale": Field((n, self.groups(k), 2), self.scale_dtype),
        }

    def pack(self, codes: Codes) -> Fields:
        n, k = codes.codes.shape
        padded = nn.functional.pad(codes.codes, (0, -k % WORD)).view(n, -1, 1, WORD)
        planes = torch.cat((padded & 1, padded >> 1), 2)  # [N, words, plane, 32]
        return {
            "weight_packed": pack_bits(planes.view(n, -1), 1),
            "weight_scale": codes.params["weight_scale"].contiguous(),
        }

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        first, second = unpack_bits(fields["weight_packed"], 1, -(-k // WORD) * 2 * WORD).view(n, -1, 2, WORD).unbind(2)
        return Codes((first | second << 1).flatten(1)[:, :k].contiguous(), {"weight_scale": fields["weight_scale"]})

    def dequantize(self, codes: Codes) -> Tensor:
        n, k = codes.codes.shape
        scales = codes.params["weight_scale"].float().unsqueeze(2)  # [N, K // G, 1, 2]
        grouped = codes.codes.view(n, scales.shape[1], -1)
        return ((grouped & 1) * scales[..., 0] + (grouped >> 1) * scales[..., 1]).view(n, k)

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """The mean distance of neighbouring levels."""
        a1, a2 = params["weight_scale"].float().unbind(-1)
        return (a1.clamp_min(0) + a2.clamp_min(0) - a1.clamp_max(0) - a2.clamp_max(0)) / 3

    def project(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """For any two scales; of equally near levels the one with the smaller code."""
        scales = params["weight_scale"].float()
        grouped = weight.view(*scales.shape[:2], -1)
        best, codes = grouped.abs(), torch.zeros_like(grouped, dtype=torch.uint8)
        for code, level in enumerate(levels(scales)[1:], 1):
            distance = (grouped - level.unsqueeze(-1)).abs_()
            codes.masked_fill_(distance < best, code)
            best = torch.minimum(best, distance)
        return codes.view(weight.shape)

    def storable(self, scales: Tensor) -> Tensor:
        """Scales as they will be read back: float32, rounded to `scale_dtype`, never 0, and 1 where both are 0."""
        tiny = torch.finfo(self.scale_dtype).smallest_normal
        used = (scales != 0).any(-1, keepdim=True)
        return storable(torch.where((scales == 0) & used, tiny, scales), self.scale_dtype)

    def encode(self, weight: Tensor, scales: Tensor) -> Codes:
        """Round a float32 [N, K] weight to the nearest levels under `storable` scales [N, K // G, 2]."""
        params = {"weight_scale": scales.to(self.scale_dtype)}
        return Codes(self.project(weight, params), params)

    def nearest(self, weight: Tensor) -> Codes:
        """Equal steps s * {-1, 0, 1, 2}, or their mirror image, with the weight of largest magnitude at 2 s."""
        grouped = weight.view(weight.shape[0], self.groups(weight.shape[1]), -1)
        farthest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
        return self.encode(weight, self.storable(torch.cat((farthest, -farthest / 2), -1)))

    def shares(self, codes: Codes) -> dict[str, float]:
        """zero_bits of plane 1 and 2, and weights of which both are 0: what an addition could skip."""
        first, second = ((codes.codes & bit == 0) for bit in (1, 2))
        zeros = {"zero_bits_1": first, "zero_bits_2": second, "zero_weights": first & second}
        return {name: float(mask.float().mean()) for name, mask in zeros.items()}

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        spare = unpack_bits(fields["weight_packed"][:, -8:], 1, 2 * WORD).view(n, 2, WORD)[..., (k - 1) % WORD + 1 :]
        if int(spare.sum()):
            raise ValueError(f"weight_packed has bits set beyond column {k}; the checkpoint is damaged, quantize again")
