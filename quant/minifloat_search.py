"""LLM-FP4's searches: which number format and which range for a weight and for the tokens it meets, each given the other.

Both minimize the summed squared error of the output, ||X W^T - Xq Wq^T||^2 (Liu et al., 2023, eq. 10), without computing it:

    of the weight    row error = (w' - wq)^T A (w' - wq) + const,  A = Xq^T Xq,  w' = A^-1 Xq^T X w
    of the tokens    tr(E Wq^T Wq E^T) - 2 tr(E Wq^T (W - Wq) X^T) + const,  E = Xq - X, on a sample of tokens

A range is a ratio c of the largest magnitude, c = 1 included: no search loses to the full range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from quant.kernels.activation import ABSMAX_FLOOR
from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.format import Fields
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.minifloat import Minifloat
from quant.search import block_loss, by_rows

Space = Literal["clip", "paper"]
COARSE = (1.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2)
FINE = (-0.06, -0.04, -0.02, 0.02, 0.04, 0.06)
GAMMAS = (1.0, *(0.01 + 0.0119 * i for i in range(100)))  # g1 + i (g2 - g1) / K; the released code never tries i = K


def ratios(space: Space, kind: Minifloat, absmax: Tensor) -> list[Tensor]:
    """The ratios to try first, each broadcasting over absmax, 1 before all others.

    paper: exponent biases gamma * b, where b maps absmax to the largest value; as a ratio 2^(b (1 - gamma)).
    """
    if space == "clip":
        return [torch.tensor(c, device=absmax.device) for c in COARSE]
    bias = kind.bias + math.log2(kind.largest) - absmax.clamp_min(ABSMAX_FLOOR).log2()  # eq. 7
    return [torch.exp2(bias * (1 - gamma)) for gamma in GAMMAS]


def search_ratio(space: Space, kind: Minifloat, absmax: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The ratio of least loss for each entry of absmax, and that loss; `loss` takes ratios of absmax's shape."""
    best_loss, best = torch.full_like(absmax, torch.inf), torch.ones_like(absmax)

    def consider(ratio: Tensor) -> None:
        nonlocal best_loss, best
        ratio = ratio.expand_as(absmax)
        given = loss(ratio)
        better = given < best_loss
        best_loss, best = torch.where(better, given, best_loss), torch.where(better, ratio, best)

    for ratio in ratios(space, kind, absmax):
        consider(ratio)
    if space == "clip":
        center = best
        for offset in FINE:
            consider(center + offset)
    return best, best_loss


def search_weight(
    weight: Tensor, blocks: Tensor, fmt: FpChannel, exponents: Iterable[int], space: Space = "clip"
) -> tuple[Tensor, int]:
    """Scales [N, K // G] as stored and the exponent bits of least summed error d^T A d, d = w - q.

    blocks: diagonal blocks of A, [K // B, B, B], where B divides G, or K with one scale per row; B = K is the exact error.
    """

    def by_exponents(e: int) -> tuple[Tensor, Tensor]:
        kind = fmt.kind(e)

        def search(rows: Tensor) -> tuple[Tensor, Tensor]:
            grouped = rows.view(len(rows), fmt.groups(rows.shape[1]), -1)
            absmax = grouped.abs().amax(-1)  # [n, K // G]

            def loss(ratio: Tensor) -> Tensor:
                step = fmt.storable(absmax * ratio / kind.largest).unsqueeze(-1)
                lost = grouped - kind.round(grouped / step) * step
                return block_loss(lost.view(len(rows), *blocks.shape[:2]), blocks).view(*absmax.shape, -1).sum(-1)

            ratio, least = search_ratio(space, kind, absmax, loss)
            return fmt.storable(absmax * ratio / kind.largest), least

        step, least = by_rows(search, weight)
        return step, least.double().sum()

    found = {e: by_exponents(e) for e in exponents}
    chosen = min(found, key=lambda e: float(found[e][1]))
    return found[chosen][0], chosen


def channel_sizes(activation: FpShift, tokens: tuple[Tensor, Tensor], absmax: Tensor) -> Tensor:
    """What channels are compared by before they are shifted, [K]: their largest magnitudes, as in the paper.

    Where every token, or group of its channels, has a scale of its own: what 95 % of |x| lie below, relative to the largest
    under that scale. A maximum is then that of a sample, which new tokens exceed: on layers of SmolLM2-135M the quantile
    loses 3 % less at the output.
    """
    if not activation.dynamic:
        return absmax
    size = grouped(tokens[0].abs(), activation)
    relative = (size / size.amax(-1, keepdim=True).clamp_min(ABSMAX_FLOOR)).flatten(-2)
    return relative.kthvalue(math.ceil(0.95 * len(relative)), 0).values


def grouped(x: Tensor, activation: FpShift) -> Tensor:
    """x [..., K] as [..., groups, K / groups], the channels under one scale side by side."""
    return x.view(*x.shape[:-1], -1, x.shape[-1] if activation.group == -1 else activation.group)


def shifts(sizes: Tensor, top: Tensor, kind: Minifloat) -> Tensor:
    """n [K]: binades by which each channel's size lies below `top`, 0 to 2^e - 1 (eq. 15); a silent channel has the most."""
    return torch.where(sizes > 0, (top / sizes).log2().round(), kind.reach).clamp(0, kind.reach)


def search_input(
    activation: FpShift,
    tokens: tuple[Tensor, Tensor],
    sizes: Tensor,
    weight: Tensor,
    rounded: Tensor,
    exponents: Iterable[int],
    space: Space = "clip",
    shifted: bool = True,
) -> Fields:
    """What `activation` stores, of least output error on a sample of tokens [T, K] with a weight [T] each.

    sizes: of each channel [K], see `channel_sizes`. weight, rounded: the float and the packed weight, float32 [N, K].
    shifted: try pre-shifted channels as well as all of them under one exponent.
    """
    x, count = tokens
    pull = (x @ (weight - rounded).T) @ rounded
    wide = len(rounded) > rounded.shape[1]  # then a product with the Gram matrix is the shorter one
    factor = rounded.T @ rounded if wide else rounded.T
    by_group = grouped(sizes, activation)
    tops = by_group.amax(-1, keepdim=True).clamp_min(ABSMAX_FLOOR).expand_as(by_group).flatten()  # [K]
    top = tops.amax()
    least, best = math.inf, activation.fit(x, sizes)
    for e in exponents:
        kind = activation.kind(e)

        def stored(ratio: Tensor, move: bool, e: int = e, kind: Minifloat = kind) -> Fields:
            n = shifts(sizes, tops * ratio, kind) if move else torch.zeros_like(sizes)
            return activation.stored((ratio if activation.dynamic else top * ratio) / kind.largest, n, e)

        def loss(ratio: Tensor, move: bool, stored: Callable[[Tensor, bool], Fields] = stored) -> Tensor:
            lost = activation.quantize(x, stored(ratio, move)) - x
            moved = lost @ factor
            energy = (moved * (lost if wide else moved)).sum(-1)  # of E Wq^T, by token
            return ((energy - 2 * (pull * lost).sum(-1)).double() @ count.double()).float()

        for move in (False, True) if shifted else (False,):
            ratio, given = search_ratio(space, kind, top, lambda r, move=move, loss=loss: loss(r, move))  # type: ignore[misc]
            if float(given) < least:
                least, best = float(given), stored(ratio, move)
    return best


def noisy_gram(gram: Tensor, tokens: tuple[Tensor, Tensor], rounded: Tensor) -> tuple[Tensor, Tensor]:
    """Xq^T Xq and Xq^T X, [K, K], from X^T X and a sample of tokens [T, K], its weights [T], and the sample rounded [T, K].

    Bussgang's theorem: for Gaussian inputs a channel-wise rounding is a gain a[j] and noise that is uncorrelated with every
    channel: Xq^T X = diag(a) X^T X, Xq^T Xq = diag(a) X^T X diag(a) + diag(noise).
    """
    x, count = tokens
    energy, cross, power = (count @ t for t in (x * x, x * rounded, rounded * rounded))
    gain = torch.where(energy > 0, cross / energy, 1.0)
    relative = torch.where(energy > 0, power / energy - gain * gain, 0.0).clamp_min_(0)
    mixed = gain.unsqueeze(1) * gram
    return mixed * gain + torch.diag(relative * gram.diagonal()), mixed


def compensated(weight: Tensor, gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """w' [N, K], the float weight of least output error behind rounded tokens: w - (A + damp)^-1 (A - B) w.

    gram A and cross B [K, K] as `noisy_gram` gives them; damp is a share of A's mean diagonal and pulls w' towards w.
    """
    a = gram.double()
    a.diagonal().add_(damp * a.diagonal().mean().clamp_min(1e-12))
    change: Tensor = torch.linalg.solve(a, (gram.double() - cross.double()) @ weight.T.double())
    return weight - change.T.float()
