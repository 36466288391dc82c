"""Formats chosen from the weights, while the plan is made: a pass may refine the targets before the run begins.

The choices become rules of the plan's recipe, so sizes stay exact, the recipe that is written with the result repeats them
without reading a weight, and whoever wants another format for a layer says so in a rule of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from quant.checkpoint import rules_for
from quant.kernels.rotation import by_matrix
from quant.models import Weights, require_finite
from quant.passes.base import Refiner
from quant.recipe import Recipe, Rule
from quant.targets import OUTSIDE, Selection, Target, families, matching, refusal


def refined(recipe: Recipe, selection: Selection, weights: Weights, disk: Mapping[str, str]) -> tuple[Recipe, Selection]:
    """The selection with the formats that the recipe's passes choose, and the recipe with rules that say the same.

    Families in which a rule gives a format already are left alone. disk: parameter in memory -> tensor on disk. Raises
    ValueError, naming the layer, for weights that are not finite and for a choice that cannot be stored.
    """

    def read(name: str) -> Tensor:
        weight = weights.read(disk[f"{name}.weight"])
        require_finite(f"{name}.weight", weight)
        return by_matrix(weight.float(), selection.targets[name].activation.rotate)

    for step in recipe.build_passes():
        if not isinstance(step, Refiner):
            continue
        free = [family for family in families(selection.targets) if not any(target.pinned for target in family)]
        chosen: dict[str, Target] = {}
        for name, choice in step.refine(free, read).items():
            target = selection.targets[name]
            chosen[name] = replace(target, format=choice.format, note=choice.note, pinned=True)
            reason = refusal(chosen[name], recipe.quantizer())
            if reason:
                raise ValueError(f"{name} cannot be quantized: {reason}")
        for family in families(chosen):
            assert len({target.format for target in family}) == 1, [target.name for target in family]
        selection = replace(selection, targets={**selection.targets, **chosen})
        recipe = resolved(recipe, selection)
    return recipe, selection


def resolved(recipe: Recipe, selection: Selection) -> Recipe:
    """The recipe with rules that give every target its scheme as it now is, and that skip what stays in float."""
    schemes = [Rule(**rule) for rule in rules_for(selection.targets)]
    inside = [name for name, why in selection.kept.items() if why != OUTSIDE]
    skipped = [name for name in inside if is_skipped(recipe, name) or matching(schemes, name)[1]]
    return recipe.model_copy(update={"rules": (*(Rule(match=name, skip=True) for name in skipped), *schemes)})


def is_skipped(recipe: Recipe, name: str) -> bool:
    """Whether a rule of the recipe leaves this linear in float."""
    rule = matching(recipe.rules, name)[1]
    return rule is not None and rule.skip
