"""Attention over a static KV cache in a graph: append the new tokens, then attend to everything valid.

A cache is a tuple of tensors per decoder block, allocated for S tokens:
  float  keys, values [B, H, S, D] in the model's dtype
  int8   keys, values int8 [B, H, S, D], their scales float32 [B, H, S], and the keys' channel factors float32 [H, D]
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.cpu import attention

assert attention.MAX_DIM  # importing it registers the operators

Cache = tuple[Tensor, ...]
KINDS = ("float", "int8")
SMALLEST = 1e-6  # a channel's factor, so that a dead channel divides nothing by zero


def empty(kind: str, rows: int, capacity: int, dtype: torch.dtype, channel: Tensor) -> Cache:
    """A cache for `rows` texts of `capacity` tokens. channel [H, D]: see `channel_factors`; only int8 keeps it."""
    shape = (rows, channel.shape[0], capacity)
    if kind == "float":
        return tuple(torch.empty(*shape, channel.shape[1], dtype=dtype) for _ in range(2))
    codes = [torch.empty(*shape, channel.shape[1], dtype=torch.int8) for _ in range(2)]
    return *codes, torch.empty(shape), torch.empty(shape), channel


def grown(cache: Cache, capacity: int) -> Cache:
    """The same contents with room for `capacity` tokens."""
    new = tuple(part if part.dim() == 2 else part.new_empty(*part.shape[:2], capacity, *part.shape[3:]) for part in cache)
    for to, have in zip(new, cache, strict=True):
        if to is not have:
            to[:, :, : have.shape[2]] = have
    return new


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Cache, start: Tensor, first: Tensor, scale: float) -> Tensor:
    """New tokens' q [B, T, H, D] and k, v [B, T, H', D] -> [B, T, H * D]; k and v go to places start [] onwards.

    first [B]: how many places at the beginning of each row hold padding.
    """
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if len(cache) == 2:
        torch.ops.lowbit.cpu_append_kv(k, v, *cache, start)
        y: Tensor = torch.ops.lowbit.cpu_attention(q, *cache, start, first, scale)
    else:
        torch.ops.lowbit.cpu_append_kv_int8(k, v, *cache, start)
        y = torch.ops.lowbit.cpu_attention_int8(q, *cache, start, first, scale)
    return y.flatten(2)


def channel_factors(weight: Tensor, gain: Tensor, bias: Tensor | None, size: int, *, rotary: bool) -> Tensor:
    """How large each channel of K gets, [H, D] float32, from the weights alone.

    weight [H * D, K] and bias [H * D] of the key projection, gain [K] of the norm before it, whose output has channels of
    about that size: |k_i| is about sqrt(sum_j (weight_ij gain_j)^2 + bias_i^2). A rotary embedding turns channels i and
    i + D/2 into each other, so these share a factor. Factors need no precision: every token has its own scale on top.
    """
    power = (weight.float() * gain.float()).square().sum(1)
    if bias is not None:
        power = power + bias.float().square()
    power = power.view(-1, size)
    if rotary:
        power = (power + power.roll(size // 2, 1)) / 2
    return power.sqrt().clamp(min=SMALLEST)
