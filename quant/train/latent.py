"""A trained linear whose codes follow a latent weight, straight through.

    V step:  codes <- nearest(latent step) in the tiles that may move,   latent <- (1 - decay) latent + decay W / step
    dL/dlatent := step dL/dW                                             latent: `steps`, [N, K], in steps of the grid

W is the coded part of the weight, without a low-rank side path. At first the latent is W / step, or, where the float weight is
known, leans from there to it as far as the code stays the nearest (`leaning`): GPTQ chose codes together, many of them not the
nearest of their weights, and a training that starts at the float weights throws that choice away; from the middle of its cell a
latent has half a step to the next code, which a short training does not go. Leaning keeps all codes, and those that were hard
to choose move first. A latent is held between the lowest and the highest level of its grid: from an end it is as far to the
next code as from anywhere else, and no weight is lost beyond it. A change of the scale alone changes no code.

tau = 1 is plain straight-through training, as EfficientQAT (Chen et al., 2024) trains weights, scales and zero points of a
block, by Adam, from latents at the float weight. tau < 1 is PV-Tuning's limit (Malinovskii et al., 2024): only the share tau of
a layer's tiles whose latent is furthest from what it is served as moves in one step, so that a large step stays within what its
gradient says. decay = 0 is its latent mode, decay = 1 its direct mode, which forgets what did not move. A tile is what shares
codes: one weight, or a vector of a codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.kernels.format import Codes, Format
from quant.linear import PackedLinear
from quant.train.layer import Trained

SPARE = 4  # times as many tiles are tried as may move: the nearest code of a distant latent can be the one it has


@dataclass(frozen=True)
class Discrete:
    """tau, decay: see above. trust: the largest |W_new - W| / |W| of a layer in one step, 0 for none."""

    tau: float = 1.0
    decay: float = 0.0
    trust: float = 0.0


class Latent(Trained):
    """In the place of a PackedLinear [N, K]; `settle` is the V step.

    toward: the float weight [N, K], rotated as the codes are.
    """

    def __init__(self, packed: PackedLinear, discrete: Discrete = Discrete(), toward: Tensor | None = None) -> None:
        super().__init__(packed)
        self.discrete = discrete
        self.coded = self.format.inner
        step = self.spread(self.coded.steps(self.start))
        bounded = self.coded.tile == 1  # a codebook has no ends
        self.low, self.high = (self.end(step, sign) if bounded else None for sign in (-1.0, 1.0))
        coded = Codes(self.codes, self.start)
        first = self.coded.dequantize(coded)
        if toward is not None and (
            bounded or bool(self.coded.reach(coded).any())
        ):  # not several books: too many sums to search
            first = leaning(self.coded, coded, toward - (self.format.dequantize(coded) - first))
        self.steps = nn.Parameter(first / step)

    def spread(self, step: Tensor) -> Tensor:
        """[N, K // G] -> [N, K]."""
        return step.repeat_interleave(self.k // step.shape[1], 1)

    def end(self, step: Tensor, sign: float) -> Tensor:
        """The lowest (sign -1) or highest level of each group's grid, in steps: [N, K // G, 1]; step [N, K]."""
        codes = self.coded.project(sign * 1e6 * step, self.start)
        levels = self.coded.dequantize(Codes(codes, self.start)) / step
        return levels.view(self.n, -1, self.k // self.coded.steps(self.start).shape[1])[..., :1].clone()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the latents back between the ends of their grids."""
        if self.low is not None and self.high is not None:
            self.steps.view(*self.low.shape[:2], -1).clamp_(self.low, self.high)

    def collect(self) -> Tensor | None:
        grad = super().collect()
        if grad is not None:
            with torch.no_grad():
                self.steps.grad = grad * self.spread(self.coded.steps(self.params()))
        return grad

    @torch.no_grad()
    def settle(self) -> int:
        """The V step; returns how many tiles got other codes."""
        params = self.params()
        step = self.spread(self.coded.steps(params))
        self.codes, moved = discrete_step(self.coded, Codes(self.codes, params), self.steps * step, self.discrete)
        if self.discrete.decay:
            self.steps.lerp_(self.coded.dequantize(Codes(self.codes, params)) / step, self.discrete.decay)
        return moved


HALVINGS = 6  # a weight that is further from its code than 2^6 cells leans nowhere


def leaning(fmt: Format, codes: Codes, toward: Tensor) -> Tensor:
    """From W of `codes` to `toward`, float32 [N, K], as far as halving the distance finds `codes` still the nearest."""
    level = fmt.dequantize(codes)
    gap = toward - level
    for _ in range(HALVINGS):
        gap = torch.where(stays(fmt, codes, level + gap), gap, gap / 2)
    return torch.where(stays(fmt, codes, level + gap), level + gap, level)


def stays(fmt: Format, codes: Codes, value: Tensor) -> Tensor:
    """Whether codes are those nearest to their tile of `value` [N, K]: bool [N, K]."""
    if fmt.tile == 1:
        return fmt.dequantize(Codes(fmt.project(value, codes.params), codes.params)) == fmt.dequantize(codes)
    return (fmt.nearer(value, codes) == codes.codes).all(-1).repeat_interleave(fmt.tile, 1)


def discrete_step(fmt: Format, codes: Codes, latent: Tensor, limits: Discrete) -> tuple[Tensor, int]:
    """New codes, and how many tiles changed; latent float32 [N, K].

    Of the tiles whose nearest code is another one, the share tau of all that lies furthest, as far as `trust` allows; one at
    least.
    """
    now = fmt.dequantize(codes)
    far = (latent - now).square().view(len(now), -1, fmt.tile).sum(-1)
    most = math.ceil(limits.tau * far.numel())
    if fmt.tile == 1:
        wanted = fmt.project(latent, codes.params)
        moved = fmt.dequantize(Codes(wanted, codes.params)) != now  # by value: a float format has two codes for zero
    else:
        wanted, moved = nearest_tiles(fmt, codes, latent, far, SPARE * most)
    count = int(moved.sum())
    if count > most or (limits.trust and count > 1):
        order = far.masked_fill(~moved, -1).flatten().topk(min(most, count)).indices
        if limits.trust:
            change = (fmt.dequantize(Codes(wanted, codes.params)) - now).square().view(*far.shape, -1).sum(-1)
            size = change.flatten()[order].cumsum(0).sqrt()
            order = order[: int((size <= limits.trust * now.norm()).sum()) + 1]
        moved = torch.zeros_like(moved).flatten().index_fill_(0, order, True).view_as(moved)
    there = moved if fmt.tile == 1 else moved.unsqueeze(-1)
    return torch.where(there, wanted, codes.codes), int(moved.sum())


def nearest_tiles(fmt: Format, codes: Codes, latent: Tensor, far: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K // tile, M] with those of the `most` furthest tiles replaced by nearer ones, and which tiles changed.

    Each tile is rounded as the weight [1, tile] that it is.
    """
    at = (far > fmt.reach(codes)).flatten().nonzero().squeeze(1)
    if len(at) > most:
        at = at[far.flatten()[at].topk(most).indices]
    tiles, old = latent.view(-1, fmt.tile)[at], codes.codes.flatten(0, 1)[at]
    found = fmt.nearer(tiles, Codes(old.unsqueeze(1), fmt.rows(codes.params, at // far.shape[1]))).squeeze(1)
    wanted = codes.codes.flatten(0, 1).index_put((at,), found).view_as(codes.codes)
    moved = torch.zeros(far.numel(), dtype=torch.bool, device=far.device).index_put((at,), (found != old).any(-1))
    return wanted, moved.view_as(far)
