"""FineQuant: weights only, no data; every matrix gets the group length, and if need be the bits, that it needs.

    J(g) = mean of R_g^2, R_g the largest |w| of a group of g     predicted noise power  J(g) / (12 qmax^2), qmax = 2^(b-1) - 1

(Kim et al., FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs, 2023. The paper halves the
group while that pays; its statistic and threshold could not be verified, so the rules below are ours.)

rate       go on to shorter groups while 0.5 log2(J(old) / J(new)), the bits that the finer scales are worth, exceeds `trade`
           times the bits per weight that they cost. Looks `ahead` steps before it stops, as an outlier may separate late.
threshold  halve while J(g / 2) / J(g) < `alpha`.

A matrix whose predicted relative noise is above `tau` even with the shortest groups gets 8 bits. The matrices that a serving
stack fuses get the shortest group and the most bits that one of them asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from quant.kernels.format import Codes, Format, fit_group
from quant.kernels.formats.int_group import IntGroup
from quant.passes.base import Choice, Quantizer, Refiner
from quant.search import by_rows
from quant.stats import InputStats
from quant.targets import Target

LENGTHS = (1024, 512, 256, 128, 64, 32, 16)
FALLBACK_BITS = 8
CLIPS = tuple(1.0 - 0.04 * i for i in range(11))  # 1.00 down to 0.60 of the signed step


class Pass(Quantizer, Refiner):
    """The first group length is the recipe's format.group (-1: a whole row); `smallest` is the last.

    grid: search  of CLIPS times the signed step, absmax / qmax, and what lies between: the step of least squared weight error
          signed  the extreme weight of a group becomes code -2^(b-1), so the step may be negative
          absmax  step = absmax / 2^(b-1), as in the kernels the paper was published with: a positive extreme is clipped
    """

    rule: Literal["rate", "threshold"] = "rate"
    trade: float = Field(1.0, ge=0)
    ahead: int = Field(2, ge=1)
    alpha: float = Field(0.8, gt=0, le=1)
    smallest: int = Field(32, ge=16)
    tau: float = Field(0.02, gt=0)
    grid: Literal["search", "signed", "absmax"] = "search"

    def refuses(self, fmt: Format) -> str | None:
        if not isinstance(fmt, IntGroup):
            return f"finequant writes int_group, not {fmt.name}"
        return None if fmt.symmetric else "finequant writes symmetric int_group: set format.symmetric to true"

    def refine(self, families: Sequence[Sequence[Target]], read: Callable[[str], Tensor]) -> dict[str, Choice]:
        chosen: dict[str, Choice] = {}
        for family in families:
            fmt = family[0].format
            assert isinstance(fmt, IntGroup)
            formats = candidates(fmt, family[0].k, self.smallest)
            place, bits = 0, fmt.bits
            for target in family:
                weight = read(target.name)
                spread = [relative_spread(weight, candidate) for candidate in formats]
                cost = [candidate.bits_per_weight(target.n, target.k) for candidate in formats]
                place = max(place, self.place(spread, cost))
                if noise(spread[-1], fmt.bits) > self.tau:
                    bits = max(bits, FALLBACK_BITS)
            final = replace(formats[place], bits=bits)
            note = "group chosen" if bits == fmt.bits else f"group chosen; {fmt.bits} bits have too much noise"
            chosen |= {target.name: Choice(final, note) for target in family}
        return chosen

    def place(self, spread: Sequence[float], cost: Sequence[float]) -> int:
        """Which of the candidates the rule stops at."""
        if self.rule == "threshold":
            return by_threshold(spread, self.alpha)
        return by_rate(spread, cost, self.trade, self.ahead)

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, IntGroup)
        half = 2 ** (fmt.bits - 1)
        w = weight.view(weight.shape[0], fmt.groups(weight.shape[1]), -1)  # [N, K // G, G]
        if self.grid == "absmax":
            step = fmt.storable(w.abs().amax(-1) / half)
        else:
            widest = half / (half - 1)  # absmax / qmax: a wider one would leave the last two codes unused
            ratios = (widest, (1 + widest) / 2, *CLIPS) if self.grid == "search" else (1.0,)
            (step,) = by_rows(lambda rows: (signed_steps(rows, fmt, ratios),), w)
        codes = torch.round(w / step.unsqueeze(-1)).clamp_(-half, half - 1) + half
        return Codes(codes.to(torch.uint8).view(weight.shape), fmt.params(step, step))


def candidates(fmt: IntGroup, k: int, smallest: int) -> list[IntGroup]:
    """`fmt` with its own group and with every shorter one of LENGTHS down to `smallest`, each fitted to K."""
    longest = k if fmt.group == -1 else fmt.group
    lengths = dict.fromkeys(fit_group(g, k) for g in LENGTHS if smallest <= g < longest)
    return [fmt, *(replace(fmt, group=g) for g in lengths if g and g < longest)]


def relative_spread(weight: Tensor, fmt: IntGroup) -> float:
    """J(g) / mean(w^2) of a float32 weight [N, K]: 1 for groups of constant size, more for longer tails; 0 if all is 0."""
    tops = weight.view(weight.shape[0], fmt.groups(weight.shape[1]), -1).abs().amax(-1)
    power = float(weight.double().square().mean())
    return float(tops.double().square().mean()) / power if power else 0.0


def noise(spread: float, bits: int) -> float:
    """Predicted noise power of round-to-nearest over that of the weights."""
    top = (1 << (bits - 1)) - 1
    return spread / (12 * top * top)


def by_rate(spread: Sequence[float], cost: Sequence[float], trade: float = 1.0, ahead: int = 2) -> int:
    """The candidate, from long groups to short, where no step and no `ahead` steps are worth their bits.

    spread: J of each candidate in any unit. cost: its bits per weight.
    """
    at = 0
    while True:
        steps = range(at + 1, min(at + ahead, len(spread) - 1) + 1)
        better = (i for i in steps if worth(spread[at], spread[i]) > trade * (cost[i] - cost[at]))
        found = next(better, None)
        if found is None:
            return at
        at = found


def worth(old: float, new: float) -> float:
    """Bits per weight that a uniform quantizer would need to lower its noise as a spread of `new` instead of `old` does."""
    return 0.5 * math.log2(old / new) if new > 0 else 0.0


def by_threshold(spread: Sequence[float], alpha: float = 0.8) -> int:
    """The candidate, from long groups to short, behind which the next no longer brings J below `alpha` of its value."""
    return next((i for i, (old, new) in enumerate(pairwise(spread)) if not new < alpha * old), len(spread) - 1)


def signed_steps(w: Tensor, fmt: IntGroup, ratios: Sequence[float]) -> Tensor:
    """Of w [N, K // G, G] the stored steps [N, K // G] that lose least, among `ratios` of the signed scale.

    Ratio 1 maps the extreme weight of a group to the lowest code, so that one more level is left on the other side.
    """
    half = 2 ** (fmt.bits - 1)
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.full_like(extreme, torch.inf)
    chosen = torch.ones_like(extreme)
    for ratio in ratios:
        step = fmt.storable(-extreme / half * ratio)
        s = step.unsqueeze(-1)
        lost = (w - torch.round(w / s).clamp_(-half, half - 1) * s).square_().sum(-1)
        better = lost < best
        best, chosen = torch.where(better, lost, best), torch.where(better, step, chosen)
    return chosen
