"""`bits: B` in a recipe: a format per layer, so that the packed linears take at most B stored bits per weight and lose least.

Every family of layers that serving stacks fuse gets one int_group format out of widths BITS and groups GROUPS. What a format
costs a layer is the predicted KL divergence of quant/sensitivity.py, for the error that the recipe's own quantizer leaves:

    KL(format) = KL(round-to-nearest error)  x  factor(reference)  x  factor(format) / factor(reference),
    factor     = KL(quantizer's error) / KL(round-to-nearest error), on some rows;  reference: 3 bits, G = 64

The first factor is measured in every layer (it differs two-fold among layers of one kind), the ratio of factors in every
STRIDE-th block and taken from the same kind of layer elsewhere (it differs by a tenth or two). Predictions of different layers
are added. Nothing but the weights and a few calibration samples is read; the measurements are kept in the cache, so another
budget for the same model costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import every_number
from quant.kernels.format import Format, fit_group, from_config
from quant.kernels.formats.int_group import BITS, IntGroup
from quant.kernels.rotation import by_matrix, rotate_gram
from quant.knapsack import choose
from quant.passes.base import Quantizer
from quant.plan import Plan
from quant.refine import resolved
from quant.samples import data_identity, make_samples
from quant.sensitivity import Feeling, feelings
from quant.stats import InputStats
from quant.targets import Target, families, refusal
from quant.wheels import cache_folder

GROUPS = (32, 64, 128)
TOKENS, LENGTH, CLIPS = 8192, 512, 8  # of the calibration data that sensitivities are measured on: many short windows
ROWS = 256  # of a layer that round-to-nearest is tried on; the quantizer takes QUANTIZED of them
QUANTIZED = 64
STRIDE = 5
REVISION = 3  # of what is measured: results of another one are not used

Say = Callable[[str], None]
Losses = dict[str, dict[Format, float]]  # first layer of a family -> format -> predicted KL, nats per token


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
        taken = 8 * plan.packed_bytes() / plan.packed_weights()
        if taken > bits:
            raise ValueError(f"recipe {plan.recipe.name} gives every layer a format, {taken:.3f} bits in all; bits is {bits:g}")
        return plan
    found = mix(plan, measured(plan, device, say), bits)
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


def free_families(plan: Plan) -> list[list[Target]]:
    """Families in which no rule gives a format."""
    return [family for family in families(plan.targets) if not any(target.pinned for target in family)]


def candidates(plan: Plan, family: list[Target]) -> list[IntGroup]:
    """The formats that all layers of a family could have."""
    base, quantizer = plan.recipe.base_format(), plan.recipe.quantizer()
    if not isinstance(base, IntGroup):
        raise ValueError(
            f"bits mixes widths of int_group, recipe {plan.recipe.name} packs {base.name}; give --recipe gptq, or no bits"
        )
    groups = {fit_group(group, family[0].k) for group in GROUPS}
    found = [replace(base, bits=bits, group=group) for bits in BITS for group in sorted(g for g in groups if g is not None)]
    return [f for f in found if not any(refusal(replace(t, format=f), quantizer) for t in family)]


def reference(formats: list[IntGroup]) -> IntGroup:
    """The one nearest to 3 bits in groups of 64."""
    return min(formats, key=lambda fmt: (abs(fmt.bits - 3), abs(fmt.group - 64)))


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


def measured(plan: Plan, device: torch.device, say: Say) -> Losses:
    """Predicted losses of all free families, from the cache or measured now."""
    for family in free_families(plan):
        candidates(plan, family)  # a format that cannot be mixed is refused before anything is computed
    wanted = plan.recipe.calibration
    few = wanted.model_copy(update={"tokens": TOKENS, "length": min(LENGTH, wanted.length), "clips": CLIPS})
    small = replace(plan, recipe=plan.recipe.model_copy(update={"bits": None, "calibration": few}))
    facts = [REVISION, small.identity(data_identity(small)), GROUPS, ROWS, QUANTIZED, STRIDE]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = cache_folder() / "sensitivity" / f"{key}.json"
    if not file.is_file():
        say("measuring what each layer would lose in each format")
        save(measure(small, device, say), file)
    stored: dict[str, list[list[Any]]] = json.loads(file.read_text(encoding="utf-8"))
    return {name: {from_config(config): loss for config, loss in rows} for name, rows in stored.items()}


def save(losses: Losses, file: Path) -> None:
    """Write losses in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    rows = {name: [[fmt.config(), loss] for fmt, loss in options.items()] for name, options in losses.items()}
    temporary.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def measure(plan: Plan, device: torch.device, say: Say) -> Losses:
    """Predicted losses of all free families on the plan's calibration data."""
    samples, _ = make_samples(plan, device)
    quantizer = plan.recipe.quantizer()
    free = free_families(plan)
    nearest: Losses = {}
    own: dict[str, float] = {}  # first layer of a family -> factor of its reference format
    others: dict[tuple[str, Format], list[float]] = {}  # kind of layer, format -> factor over that of the reference format
    seen: dict[str, int] = {}

    def tell(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            say(f"[{done}/{total}] blocks measured")

    for block in feelings(plan, samples, ROWS, device, tell):
        for family in (f for f in free if f[0].name in block):
            name, kind, formats = family[0].name, every_number(family[0].name), candidates(plan, family)
            felt = [turned(block[target.name], target.activation.rotate) for target in family]
            nearest[name] = {fmt: sum(lost(x, fmt, None) for x in felt) for fmt in formats}
            few = [x.sampled(QUANTIZED) for x in felt]
            trial, middle = seen.get(kind, 0) % STRIDE == 0, reference(formats)
            seen[kind] = seen.get(kind, 0) + 1
            factors = {
                fmt: sum(lost(x, fmt, quantizer) for x in few) / max(sum(lost(x, fmt, None) for x in few), 1e-30)
                for fmt in (formats if trial else [middle])
            }
            own[name] = factors[middle]
            for fmt, factor in factors.items() if trial else ():
                others.setdefault((kind, fmt), []).append(factor / max(own[name], 1e-30))
    losses = {
        name: {fmt: loss * own[name] * geometric_mean(others[every_number(name), fmt]) for fmt, loss in options.items()}
        for name, options in nearest.items()
    }
    for name in (family[0].name for family in free if family[0].name not in losses):  # experts that no token reached
        kin = [options for other, options in losses.items() if every_number(other) == every_number(name)]
        if not kin:
            raise ValueError(f"no expert like {name} got a token of the calibration data; give more of it, or no bits")
        losses[name] = {fmt: min(options[fmt] for options in kin) for fmt in kin[0]}
    return losses


def lost(felt: Feeling, fmt: Format, quantizer: Quantizer | None) -> float:
    """Predicted loss of one layer quantized by round-to-nearest (None) or by `quantizer`."""
    if quantizer is None:
        codes = fmt.nearest(felt.weight)
    else:
        codes = quantizer.quantize(felt.weight, InputStats(gram=felt.gram, tokens=1), fmt)
    return max(felt.divergence(felt.weight - fmt.dequantize(codes)), 0.0)


def turned(felt: Feeling, size: int) -> Feeling:
    """The layer as the quantizer meets it, its input channels rotated in blocks of `size`."""
    if not size:
        return felt
    return Feeling(by_matrix(felt.weight, size), rotate_gram(felt.gram, size), by_matrix(felt.grads, size))


def geometric_mean(values: list[float]) -> float:
    """Of positive values; 0 counts as 1e-30."""
    return math.exp(sum(math.log(max(value, 1e-30)) for value in values) / len(values))
