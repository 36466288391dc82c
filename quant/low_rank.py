"""A side path of low rank for what a quantizer loses: B A = argmin tr((E - B A) H (E - B A)'), E = W - quantized.

With H = L L' that is the nearest product to E L, times L^-1 (LQER, Zhang et al., 2024, with the whole Gram matrix). What the
side path holds, the quantizer need not: the two take turns (LoftQ, Li et al., 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.activation import Activation
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.low_rank import LowRank, nearest_product
from quant.passes.base import Quantizer
from quant.search import shrunk
from quant.stats import InputStats

TURNS = 3  # of the quantizer; further ones gain under 1 % of the error
SHRINK = 0.2  # of the Gram matrix that the side path is fitted by
DAMP = 0.01


def decide_beside(
    quantizer: Quantizer, aim: Tensor, stats: InputStats, fmt: LowRank, activation: Activation
) -> tuple[Codes, Fields]:
    """`Quantizer.decide` for a weight [N, K] with a side path: the best of TURNS turns by the error on the calibration data."""
    gram = shrunk(stats.gram, SHRINK)
    root = cholesky(gram)
    best, least = None, torch.inf
    rest = aim
    for _ in range(TURNS):
        coded, inputs = quantizer.decide(rest, stats, fmt.base, activation)
        lost = aim - fmt.base.dequantize(coded)
        codes = fmt.beside(coded, *fitted(lost, root, fmt.rank))
        _, side = fmt.parts(codes)
        product = side["side_out"].float() @ side["side_in"].float()
        error = float((((lost - product) @ gram) * (lost - product)).sum())
        if error < least:
            best, least = (codes, inputs), error
        rest = aim - product
    assert best is not None
    return best


def cholesky(gram: Tensor) -> Tensor:
    """L of a damped Gram matrix."""
    damp = DAMP * float(gram.diagonal().mean()) or 1.0
    lower: Tensor = torch.linalg.cholesky(gram + damp * torch.eye(len(gram), device=gram.device))
    return lower


def fitted(lost: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [N, r] and A [r, K] of least tr((lost - B A) L L' (lost - B A)'), columns and rows of equal norms."""
    left, right = nearest_product(lost @ root, rank)
    right = torch.linalg.solve_triangular(root, right, left=False, upper=False)
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    return left * balance, right / balance.unsqueeze(1)
