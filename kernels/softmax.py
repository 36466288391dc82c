"""Attention probabilities as powers of sqrt(2): finer than powers of 2 where probabilities are large, still only shifts.

    q = round(-2 log2(p)),    p is read as 2^(-q/2) = 2^-ceil(q/2) * (sqrt(2) if q is odd else 1)

p = exp(S - max S) of a row of logits S, so q = round(2 log2(e) (max S - S)) needs no exponential. Rows are normalized by the
sum of p before rounding, which errs less than the sum of rounded p. b bits hold q in 0 .. 2^b - 1; what is smaller counts as
zero. The factor sqrt(2) is not a shift, but sums over even and odd q apart need it once (`split_product`).
(RepQ-ViT, Li et al., 2023, and RepQuant, Li et al., 2024, log-sqrt2 quantizer; on unnormalized p with scale 1, which is ours.)

The relative error of a value that is kept is at most 2^(1/4) - 1 = 18.9 %, whatever b; b only decides how small values may be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUERIES = 256  # rows of the attention matrix that are in memory at a time


def codes_of_probabilities(p: Tensor, bits: int) -> Tensor:
    """int32 codes of p in [0, 1], any shape: round(-2 log2 p), and 2^bits, which stands for zero, for all above 2^bits - 1."""
    return torch.round(-2 * torch.log2(p)).clamp(0, 2**bits).to(torch.int32)


def codes_of_logits(scores: Tensor, bits: int) -> Tensor:
    """The same codes of exp(S - max S), rows along the last dimension, without the exponential."""
    return torch.round((scores.amax(-1, keepdim=True) - scores) * (2 * math.log2(math.e))).clamp(0, 2**bits).to(torch.int32)


def values(codes: Tensor, bits: int) -> Tensor:
    """What codes stand for, float32."""
    powers: Tensor = torch.exp2(codes.float() / -2)
    return powers.masked_fill(codes >= 2**bits, 0)


def split_product(codes: Tensor, v: Tensor, bits: int) -> Tensor:
    """values(codes) [..., T, S] @ integers v [..., S, D] with shifts and two sums: E over even q, O over odd q, E + sqrt(2) O.

    v is shifted left by 2^(bits-1) guard bits first, so nothing is lost; int64, v below 2^(62 - 2^(bits-1)) / S.
    """
    guard = 2 ** (bits - 1)
    shifted = (v.long() << guard).unsqueeze(-3) >> ((codes + 1) // 2).long().unsqueeze(-1)  # [..., T, S, D]
    kept = (codes < 2**bits).unsqueeze(-1)
    even, odd = ((shifted * (kept & (codes % 2 == bit).unsqueeze(-1))).sum(-2).double() for bit in (0, 1))
    product: Tensor = (even + math.sqrt(2) * odd) / 2**guard
    return product


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, bits: int) -> Tensor:
    """Attention with coded probabilities. query [B, H, T, D]; key, value [B, Hkv, S, D] -> [B, T, H, D] in query's dtype.

    mask, added to the logits, broadcasts to [B, H, T, S]. Computed in float32.
    """
    repeat = query.shape[1] // key.shape[1]
    k, v = (x.float().repeat_interleave(repeat, 1) for x in (key, value))
    out = torch.empty_like(query, dtype=torch.float32)
    for start in range(0, query.shape[2], QUERIES):
        rows = slice(start, start + QUERIES)
        scores = query[:, :, rows].float() @ k.transpose(2, 3) * scale
        if mask is not None:
            scores = scores + (mask[:, :, rows] if mask.shape[2] > 1 else mask)
        total = torch.exp(scores - scores.amax(-1, keepdim=True)).sum(-1, keepdim=True)
        out[:, :, rows] = values(codes_of_logits(scores, bits), bits) @ v / total
    return out.to(query.dtype).transpose(1, 2).contiguous()
