"""GPTQ rounding on a given grid: choose codes one input channel at a time, pushing each error onto the later channels.

GPTQ (Frantar et al., 2023, algorithm 1) with static groups: steps and zero points are fixed before, so any affine grid
can be used and the channels can be visited in order of falling Gram diagonal ("act-order") at no cost on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


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
    """uint8 codes [N, K] whose output error is small: weight float32 [N, K], gram [K, K], step and zero [N, K // G].

    Raises ValueError when the Gram matrix cannot be factored.
    """
    n, k = weight.shape
    group = k // step.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(k, device=gram.device)
    factor = inverse_factor(gram[order][:, order], damp)
    # Channels are rows here: each visit reads and writes contiguous memory.
    w = weight.T[order].contiguous()  # [K, N]
    s = step.T[order // group].contiguous()
    z = zero.T[order // group].contiguous()
    codes = torch.empty_like(w)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty_like(w[start:stop])
        for j in range(start, stop):
            code = (w[j] / s[j]).round_().add_(z[j]).clamp_(0, levels - 1)
            codes[j] = code
            error = (w[j] - (code - z[j]) * s[j]) / factor[j, j]
            errors[j - start] = error
            w[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    out = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    out[order] = codes.to(torch.uint8)
    return out.T.contiguous()
