"""What each layer is predicted to lose in each format that it could have, for the quantizer of a recipe.

What a format costs a layer is the predicted KL divergence of quant/sensitivity.py, for the error that the recipe's own
quantizer leaves:

    KL(format) = KL(round-to-nearest error)  x  factor(reference)  x  factor(format) / factor(reference),
    factor     = KL(quantizer's error) / KL(round-to-nearest error), on some rows;  reference: 3 bits, G = 64

The first factor is measured in every layer (it differs two-fold among layers of one kind), the ratio of factors in every
STRIDE-th block and taken from the same kind of layer elsewhere (it differs by a tenth or two). Nothing but the weights and a
few calibration samples is read. Gradients depend on the model and the samples alone, so several recipes share one backward
pass; what was measured is kept in the cache, so another budget for the same model costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import every_number
from quant.kernels.format import Format, fit_group, from_config
from quant.kernels.formats.int_group import BITS, IntGroup
from quant.kernels.rotation import by_matrix, rotate_gram
from quant.passes.base import Quantizer
from quant.plan import Plan
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


def predicted(plans: Sequence[Plan], device: torch.device, say: Say) -> list[Losses]:
    """For each plan, of one model, the losses of all its free families, from the cache or measured now."""
    reduced, files = [], []
    for plan in plans:
        for family in free_families(plan):
            candidates(plan, family)  # a format that cannot be mixed is refused before anything is computed
        wanted = plan.recipe.calibration
        few = wanted.model_copy(update={"tokens": TOKENS, "length": min(LENGTH, wanted.length), "clips": CLIPS})
        small = replace(plan, recipe=plan.recipe.model_copy(update={"bits": None, "calibration": few}))
        facts = [REVISION, small.identity(data_identity(small)), GROUPS, ROWS, QUANTIZED, STRIDE]
        reduced.append(small)
        files.append(cache_folder() / "sensitivity" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json")
    together: dict[Any, dict[Path, Plan]] = {}  # plans of the same layers and samples
    for small, file in zip(reduced, files, strict=True):
        if not file.is_file():
            same = (small.recipe.calibration, small.recipe.seed, tuple(small.targets))
            together.setdefault(same, {})[file] = small
    for group in together.values():
        names = ", ".join(small.recipe.name for small in group.values())
        say(f"measuring what each layer would lose in each format ({names})")
        for file, losses in zip(group, measure(list(group.values()), device, say), strict=True):
            save(losses, file)
    return [load(file) for file in files]


def save(losses: Losses, file: Path) -> None:
    """Write losses in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    rows = {name: [[fmt.config(), loss] for fmt, loss in options.items()] for name, options in losses.items()}
    temporary.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def load(file: Path) -> Losses:
    """Losses as `save` wrote them."""
    stored: dict[str, list[list[Any]]] = json.loads(file.read_text(encoding="utf-8"))
    return {name: {from_config(config): loss for config, loss in rows} for name, rows in stored.items()}


def measure(plans: list[Plan], device: torch.device, say: Say) -> list[Losses]:
    """Losses of all free families of each plan; the plans have the same layers and calibration data."""
    samples, _ = make_samples(plans[0], device)
    records = [Record(plan) for plan in plans]

    def tell(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            say(f"[{done}/{total}] blocks measured")

    for block in feelings(plans[0], samples, ROWS, device, tell):
        for record in records:
            record.add(block)
    return [record.losses() for record in records]


class Record:
    """What was measured for one plan: blocks are added one by one, then its losses are known."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.quantizer, self.free = plan, plan.recipe.quantizer(), free_families(plan)
        self.nearest: Losses = {}
        self.own: dict[str, float] = {}  # first layer of a family -> factor of its reference format
        self.others: dict[tuple[str, Format], list[float]] = {}  # kind of layer, format -> factor over the reference's
        self.seen: dict[str, int] = {}

    def add(self, block: dict[str, Feeling]) -> None:
        """Try the formats on the families of a block."""
        for family in (f for f in self.free if f[0].name in block):
            name, kind, formats = family[0].name, every_number(family[0].name), candidates(self.plan, family)
            felt = [turned(block[target.name], target.activation.rotate) for target in family]
            self.nearest[name] = {fmt: sum(lost(x, fmt, None) for x in felt) for fmt in formats}
            few = [x.sampled(QUANTIZED) for x in felt]
            trial, middle = self.seen.get(kind, 0) % STRIDE == 0, reference(formats)
            self.seen[kind] = self.seen.get(kind, 0) + 1
            factors = {
                fmt: sum(lost(x, fmt, self.quantizer) for x in few) / max(sum(lost(x, fmt, None) for x in few), 1e-30)
                for fmt in (formats if trial else [middle])
            }
            self.own[name] = factors[middle]
            for fmt, factor in factors.items() if trial else ():
                self.others.setdefault((kind, fmt), []).append(factor / max(self.own[name], 1e-30))

    def losses(self) -> Losses:
        """Of all free families. Raises ValueError where no expert of a kind got a token."""
        found: Losses = {
            name: {f: loss * self.own[name] * geometric_mean(self.others[every_number(name), f]) for f, loss in options.items()}
            for name, options in self.nearest.items()
        }
        for name in (family[0].name for family in self.free if family[0].name not in found):  # experts that no token reached
            kin = [options for other, options in found.items() if every_number(other) == every_number(name)]
            if not kin:
                raise ValueError(f"no expert like {name} got a token of the calibration data; give more of it, or no bits")
            found[name] = {fmt: min(options[fmt] for options in kin) for fmt in kin[0]}
        return found


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
