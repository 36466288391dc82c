"""Block Hadamard rotation: spread outliers evenly over a block of channels, exactly undone by the weight.

    y = x W^T = (x R) (W R)^T        R block-diagonal with blocks H / sqrt(size), so R = R^T = R^-1

A token's largest channel sets the step of all of them when it is quantized; after R the channels of a block are sums of
`size` channels with random signs, nearly Gaussian and of one size. (QuaRot, Ashkboos et al., 2024, online form; blocks
instead of one large transform as in MR-GPTQ, Egiazarian et al., 2025.) Cost: log2(size) additions per element.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int) -> Tensor:
    """H / sqrt(size), float32 [size, size], symmetric and orthonormal; size a power of two."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    scaled: Tensor = h / size**0.5
    return scaled


def by_matrix(x: Tensor, size: int) -> Tensor:
    """`rotate` as a product in float32: differentiable, on any device, and the same bits whatever kernels are loaded."""
    if not size:
        return x
    blocks = x.float().reshape(*x.shape[:-1], -1, size)
    turned: Tensor = (blocks @ hadamard(size).to(x.device)).view(x.shape).to(x.dtype)
    return turned


def rotate(x: Tensor, size: int) -> Tensor:
    """x [..., K] with every block of `size` channels rotated, computed in float32, rounded to x's dtype. Its own inverse.

    size 0 leaves x alone; else a power of two that divides K. By the fastest kernel of x's device.
    """
    if not size or (x.requires_grad and torch.is_grad_enabled()):
        return by_matrix(x, size)
    turned: Tensor = torch.ops.lowbit.rotate.default(x, size)
    return turned


def rotate_gram(gram: Tensor, size: int) -> Tensor:
    """R A R for A [K, K], such as the Gram matrix of the rotated tokens."""
    return by_matrix(by_matrix(gram, size).T, size).T.contiguous()


torch.library.define("lowbit::rotate", "(Tensor x, int size) -> Tensor")
torch.library.impl("lowbit::rotate", "CompositeExplicitAutograd", by_matrix)
torch.library.register_fake("lowbit::rotate", lambda x, _: torch.empty_like(x, memory_format=torch.contiguous_format))


def largest_block(asked: int, k: int) -> int:
    """The largest power of two that divides K and is at most `asked`; 0 when 0 was asked for."""
    return min(k & -k, 1 << asked.bit_length() - 1) if asked else 0
