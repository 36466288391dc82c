"""`bits: B` in a recipe: a format per layer, so that the packed linears take at most B stored bits per weight and lose least.

Every family of layers that serving stacks fuse gets one int_group format, by what each is predicted to lose in each
(quant/losses.py). Predictions of different layers are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from quant.kernels.format import Format
from quant.kernels.formats.int_group import IntGroup
from quant.knapsack import choose
from quant.losses import Losses, Say, free_families, predicted
from quant.plan import Plan
from quant.refine import resolved


@dataclass(frozen=True)
class Mix:
    """Formats by layer name, bits per weight of all packed linears with them, and the predicted loss in nats per token."""

    formats: dict[str, Format]
    bits: float
    loss: float


def within(plan: Plan, device: torch.device, say: Say) -> Plan:
    """The plan with formats chosen for `plan.recipe.bits`; its recipe says them as rules. Raises ValueError in one line."""
    bits = plan.recipe.bits
    assert bits is not None
    if not free_families(plan):  # a recipe that was resolved before, or one that chooses formats itself
        taken = plan.bits_per_weight()
        if taken > bits:
            raise ValueError(f"recipe {plan.recipe.name} gives every layer a format, {taken:.3f} bits in all; bits is {bits:g}")
        return plan
    found = mix(plan, predicted([plan], device, say)[0], bits)
    targets = {
        name: replace(target, format=found.formats[name], pinned=True, note=f"of {bits:g} bits")
        if name in found.formats
        else target
        for name, target in plan.targets.items()
    }
    selection = replace(plan.selection, targets=targets)
    counts: dict[str, int] = {}
    for name, fmt in found.formats.items():
        target = plan.targets[name]
        counts[describe(fmt)] = counts.get(describe(fmt), 0) + target.n * target.k
    total = plan.packed_weights()
    shares = ", ".join(f"{text} {share / total:.0%}" for text, share in sorted(counts.items()))
    say(f"{found.bits:.3f} bits per weight of {bits:g} allowed, predicted KL {found.loss:.4f}: {shares}")
    return replace(plan, recipe=resolved(plan.recipe, selection), selection=selection)


def describe(fmt: Format) -> str:
    """A format in a word: 3-bit/64."""
    assert isinstance(fmt, IntGroup)
    return f"{fmt.bits}-bit/{fmt.group}"


def mix(plan: Plan, losses: Losses, bits: float) -> Mix:
    """The formats that lose least within `bits`. Raises ValueError when even the smallest do not fit."""
    free = free_families(plan)
    names = {target.name for family in free for target in family}
    fixed = sum(t.format.stored_bytes(t.n, t.k) for t in plan.targets.values() if t.name not in names)
    total = plan.packed_weights()
    options = [list(losses[family[0].name]) for family in free]
    costs = [
        [sum(f.stored_bytes(t.n, t.k) for t in family) for f in formats] for family, formats in zip(free, options, strict=True)
    ]
    lost = [[losses[family[0].name][f] for f in formats] for family, formats in zip(free, options, strict=True)]
    chosen = choose(costs, lost, math.floor(bits * total / 8) - fixed)
    if chosen is None:
        least = 8 * (sum(map(min, costs)) + fixed) / total
        raise ValueError(f"bits {bits:g} is less than any mix of formats takes; give at least {math.ceil(least * 100) / 100:g}")
    formats = {t.name: options[i][o] for i, o in enumerate(chosen) for t in free[i]}
    stored = fixed + sum(costs[i][o] for i, o in enumerate(chosen))
    return Mix(formats, 8 * stored / total, sum(lost[i][o] for i, o in enumerate(chosen)))
