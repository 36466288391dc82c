"""Rounding on a given grid: GPTQ chooses codes one input channel at a time, coordinate descent then improves them.

GPTQ (Frantar et al., 2023, algorithm 1) with static groups: the grid (`grid.py`) is fixed before, so it may be any, and the
channels can be visited in order of falling Gram diagonal ("act-order") at no cost on disk.

GPTQ never looks back: a channel is fixed before the ones after it are known. Cyclic coordinate descent (QuantEase, Behdin
et al., 2023) visits each channel again with all others fixed and moves it to the best point of its grid, so the error can
only fall. On SmolLM2-135M three sweeps take 5 % off the squared output error, on the calibration text and on other text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.grid import Affine, Grid
from quant.kernels.rounding import descend_block, gptq_block

BLOCK = 128
DESCENT_BLOCK = 64
DESCENT_CHUNK = 1 << 21  # weights descended at a time


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor of (H + damp * mean(diag H) * I)^-1, float32 [K, K].

    Raises ValueError when H is not positive definite even after ten-fold damping, twice.
    """
    h = gram.double()
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    mean = h.diagonal().mean().clamp_min(1e-12)
    for strength in (damp, 10 * damp, 100 * damp):
        lower, info = torch.linalg.cholesky_ex(h + strength * mean * eye)
        if int(info) == 0:
            upper, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(bad) == 0:
                factor: Tensor = upper.float()
                return factor
    raise ValueError(f"the Gram matrix is not positive definite even with {100 * damp:g} damping; calibrate on more tokens")


def gptq_codes(
    weight: Tensor, gram: Tensor, step: Tensor, zero: Tensor, levels: int, *, act_order: bool = True, damp: float = 0.01
) -> Tensor:
    """`gptq` on a grid of equally spaced levels: step and zero [N, K // G]."""
    return gptq(weight, gram, Affine(step, zero, levels), act_order=act_order, damp=damp)


def descend(weight: Tensor, gram: Tensor, codes: Tensor, step: Tensor, zero: Tensor, levels: int, sweeps: int) -> Tensor:
    """`coordinate_descent` on a grid of equally spaced levels; arguments as in `gptq_codes`."""
    return coordinate_descent(weight, gram, codes, Affine(step, zero, levels), sweeps)


def gptq(weight: Tensor, gram: Tensor, grid: Grid, *, act_order: bool = True, damp: float = 0.01) -> Tensor:
    """uint8 codes [N, K] whose output error is small: weight float32 [N, K], gram [K, K].

    Raises ValueError when the Gram matrix cannot be factored.
    """
    k = weight.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(k, device=gram.device)
    factor = inverse_factor(gram[order][:, order], damp)
    # Channels are rows here: each visit reads and writes contiguous memory.
    w = weight.T[order].contiguous()  # [K, N]
    s, rule = grid.steps(order), grid.rule(order)
    levels = torch.empty_like(w)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        here = slice(start, stop)
        levels[here], errors = gptq_block(w[here], s[here], rule.block(here), factor[here, here])
        w[stop:].addmm_(factor[here, stop:].T, errors, alpha=-1)
    w[order] = levels
    return grid.codes(w.T).contiguous()


def coordinate_descent(weight: Tensor, gram: Tensor, codes: Tensor, grid: Grid, sweeps: int) -> Tensor:
    """uint8 codes [N, K] with d^T H d, d = w - q, no larger than that of `codes` in any row; arguments as in `gptq`."""
    if not sweeps:
        return codes
    n, rows = len(weight), max(1, DESCENT_CHUNK // len(gram))
    parts = (slice(at, min(at + rows, n)) for at in range(0, n, rows))
    return torch.cat([_descend_rows(weight[part], gram, codes[part], grid.rows(part), sweeps) for part in parts])


def _descend_rows(weight: Tensor, gram: Tensor, codes: Tensor, grid: Grid, sweeps: int) -> Tensor:
    k = len(gram)
    diagonal, order = gram.diagonal(), torch.arange(k, device=gram.device)
    inverse = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)
    s, rule = grid.steps(order), grid.rule(order)  # [K, N], channels as rows
    # from H d to the best move of one channel, in its steps; finite, as H d may be 0
    reach = (inverse.unsqueeze(1) / s).clamp_max_(torch.finfo(s.dtype).max)
    level = grid.levels(codes).T.contiguous()
    w = weight.T.contiguous()
    for _ in range(sweeps):
        pull = gram @ (w - level * s)  # H d: minus half the gradient; anew per sweep, so rounding does not add up
        for start in range(0, k, DESCENT_BLOCK):
            stop = min(start + DESCENT_BLOCK, k)
            here = slice(start, stop)
            moved = descend_block(pull[here], level[here], s[here], reach[here], rule.block(here), gram[here, here])
            pull[stop:].addmm_(gram[stop:, here], moved)
    return grid.codes(level.T).contiguous()
