"""`fp4_block`: E2M1 codes under one 8-bit scale per block along K, stored byte for byte as compressed-tensors does.

    mxfp4   w[n, k] = e2m1(code) * 2^(u[n, k // 32] - 127)      u uint8 (E8M0)         `mxfp4-pack-quantized`
    nvfp4   w[n, k] = e2m1(code) * (S[n, k // 16] / D)          S float8 E4M3, D float32 [1], a divisor of the whole weight;
                                                                `nvfp4-pack-quantized`

A code is s ee m with exponent bias 1: 0, .5, 1, 1.5, 2, 3, 4, 6, then the negatives. Two per byte, even k in the low nibble.
The block length belongs to the kind, it is not a parameter. (OCP Microscaling 1.0; NVFP4 as compressed-tensors 0.20 reads it.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.format import Codes, Field, Fields, Format, register
from quant.kernels.formats.int_group import pack_bits, unpack_bits
from quant.kernels.minifloat import E2M1

BLOCKS = {"mxfp4": 32, "nvfp4": 16}
LARGEST_SCALE = 448.0  # of E4M3
SMALLEST_SCALE = 2.0**-6  # E4M3's smallest normal: below it readers such as Marlin lose bits
HEADROOM = 256.0  # 1.5 times it still fits E4M3, which four-over-six needs
BIAS = 127  # of E8M0


def e8m0_value(u: Tensor) -> Tensor:
    """2^(u - 127), float32, of uint8 u up to 254; exact, u = 0 is a subnormal."""
    return (u.to(torch.int32) << 23).clamp_min_(1 << 22).view(torch.float32)


def even_exponent(absmax: Tensor) -> Tensor:
    """E of compressed-tensors' rule EVEN, int32: absmax / 2^E lies in [3.5, 7); -127 to 127, 0 for a block of zeros."""
    raised = absmax.view(torch.int32) + (1 << 21) >> 23  # mantissas from 1.75 on carry into the exponent
    return torch.where(absmax > 0, raised - (BIAS + 2), 0).clamp_(-BIAS, BIAS)


def divisor_of(absmax: Tensor) -> Tensor:
    """D [1] that takes a weight of that absmax to the end of both ranges: 448 * 6 / absmax; 1 where that is not finite."""
    divisor = LARGEST_SCALE * E2M1.largest / absmax.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(divisor.isfinite(), divisor, 1.0).view(1)


def power_divisor(absmax: Tensor) -> Tensor:
    """The largest power of two D [1] with D * absmax / 6 at most 256: exact to divide by, 1.75 to 3.5 times from E4M3's end.

    1 where that is not finite.
    """
    divisor = 2.0 ** torch.floor(torch.log2(HEADROOM * E2M1.largest / absmax.clamp_min(torch.finfo(torch.float32).tiny)))
    return torch.where(divisor.isfinite(), divisor, 1.0).view(1)


@register
@dataclass(frozen=True, kw_only=True)
class Fp4Block(Format):
    """kind: mxfp4 (4.25 bits per weight) or nvfp4 (4.5)."""

    name: ClassVar[str] = "fp4_block"
    whole: ClassVar[frozenset[str]] = frozenset({"weight_global_scale"})
    kind: str = "nvfp4"

    def __post_init__(self) -> None:
        if self.kind not in BLOCKS:
            raise ValueError(f"fp4_block has no kind {self.kind!r}; allowed: {', '.join(BLOCKS)}")

    @property
    def group(self) -> int:
        """Block length along K."""
        return BLOCKS[self.kind]

    def refuses(self, n: int, k: int) -> str | None:
        return f"{self.kind} has blocks of {self.group} along K, which do not divide K = {k}" if k % self.group else None

    def fields(self, n: int, k: int) -> dict[str, Field]:
        out = {"weight_packed": Field((n, k // 2), torch.uint8)}
        if self.kind == "mxfp4":
            return out | {"weight_scale": Field((n, k // self.group), torch.uint8)}
        scale = {"weight_scale": Field((n, k // self.group), torch.float8_e4m3fn)}
        return out | scale | {"weight_global_scale": Field((1,), torch.float32)}

    def pack(self, codes: Codes) -> Fields:
        out = {"weight_packed": pack_bits(codes.codes, 4)}
        return out | {name: t.contiguous() for name, t in codes.params.items()}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        params = {name: fields[name] for name in self.fields(n, k) if name != "weight_packed"}
        return Codes(unpack_bits(fields["weight_packed"], 4, k), params)

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """What a code of value 1 stands for, float32 [N, K // G]."""
        if self.kind == "mxfp4":
            return e8m0_value(params["weight_scale"])
        return params["weight_scale"].float() / params["weight_global_scale"]

    def dequantize(self, codes: Codes) -> Tensor:
        n, k = codes.codes.shape
        grouped = E2M1.decode(codes.codes).view(n, -1, self.group)
        return grouped.mul_(self.steps(codes.params).unsqueeze(-1)).view(n, k)

    def nearest(self, weight: Tensor) -> Codes:
        """Every block's absmax mapped to the end of E2M1: rule EVEN for mxfp4, D = 448 * 6 / absmax for nvfp4."""
        absmax = weight.view(weight.shape[0], -1, self.group).abs().amax(-1)
        if self.kind == "mxfp4":
            return self.encode(weight, {"weight_scale": (even_exponent(absmax) + BIAS).to(torch.uint8)})
        divisor = divisor_of(absmax.amax())
        scale = (absmax / E2M1.largest * divisor).clamp_(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn)
        return self.encode(weight, {"weight_scale": scale, "weight_global_scale": divisor})

    def encode(self, weight: Tensor, params: Mapping[str, Tensor]) -> Codes:
        """Round a float32 [N, K] weight to the nearest codes under given scales. A small negative is code 8, -0 is code 0."""
        return Codes(self.project(weight, params), params)

    def project(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """As `encode`."""
        grouped = (weight + 0.0).view(weight.shape[0], -1, self.group) / self.steps(params).unsqueeze(-1)
        return E2M1.encode(E2M1.round(grouped)).view(weight.shape)

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        scale = fields["weight_scale"]
        if self.kind == "mxfp4":
            if int(scale.max()) > 254:
                raise ValueError("weight_scale holds 255, the NaN of E8M0; mxfp4 allows 0 to 254, quantize again")
            return
        if int(scale.view(torch.uint8).max()) > 0x7E:  # the sign bit, which a decoder may take for an exponent's
            raise ValueError("weight_scale holds a negative number; nvfp4 allows 0 to 448, quantize again")
        if (divisor := float(fields["weight_global_scale"])) <= 0:
            raise ValueError(f"weight_global_scale is {divisor:g}; it divides the weights, so it must be positive")
