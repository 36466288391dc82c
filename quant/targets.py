"""Which linears are packed, in which format: rules over the live module tree."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from quant.embedding import Head, UnpackableHead, find_head
from quant.experts import routers, stacks_of, still_stacked
from quant.kernels.activation import Activation, fields_of
from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Field, Format, fit_group, from_config
from quant.kernels.formats.low_rank import LowRank
from quant.kernels.rotation import largest_block
from quant.passes.base import Quantizer
from quant.recipe import Recipe, Rule
from quant.stacks import Stack

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # serving stacks fuse these: one scheme for all

OUTSIDE = "outside the blocks (head or projector)"


@dataclass(frozen=True)
class Target:
    """One linear to pack. note: what differs from the recipe and why. pinned: a rule gives its format.

    new_bias: it gets a bias that the float layer lacks.
    family: equal for layers that must share one scheme, because serving stacks fuse them; see `family_of`.
    """

    name: str
    n: int
    k: int
    bias: bool
    format: Format
    activation: Activation
    note: str = ""
    pinned: bool = False
    family: str = ""
    new_bias: bool = False

    def fields(self) -> dict[str, Field]:
        """Name -> shape and dtype of every stored tensor."""
        return fields_of(self.format, self.activation, self.n, self.k)


@dataclass(frozen=True)
class Selection:
    """Linears to pack by name in module order, everything that stays in float with its reason, and the packed head.

    table: the target that is the head's table, named after the embedding where the two are tied.
    """

    targets: dict[str, Target]
    kept: dict[str, str]
    head: Head | None = None
    table: Target | None = None


def select(model: nn.Module, stacks: list[Stack], recipe: Recipe) -> Selection:
    """Apply the recipe's rules to every nn.Linear, those of experts included.

    Linears outside the stacks (heads, projectors) stay in float, unless the recipe packs the head, and so do routers, unless
    a rule gives them a format. Raises ValueError for a rule that matches nothing, a layer whose K no group fits, fused
    neighbours with different schemes, and a head that cannot be packed.
    """
    quantizer, base = recipe.quantizer(), recipe.base_format()
    blocks = tuple(f"{block}." for stack in stacks for block in stack.blocks)
    targets: dict[str, Target] = {}
    kept: dict[str, str] = {}
    used: set[int] = set()
    experts, gates = stacks_of(model), routers(model)
    head_format = recipe.head_format()
    head = None if head_format is None else find_head(model)
    table = None if head_format is None or head is None else table_for(model, head, head_format)
    shifted: tuple[str, ...] = ()
    if any(step.shifts for step in recipe.build_passes()):
        shifted = tuple(block for block in blocks if has_shifted_norm(model.get_submodule(block.removesuffix("."))))
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        if not name.startswith(blocks):
            if head is None or name != head.linear:
                kept[name] = OUTSIDE
            continue
        index, rule = matching(recipe.rules, name)
        used.add(index)
        if rule is not None and rule.skip:
            kept[name] = f"rule {rule.match!r}"
            continue
        if name in gates and not (rule is not None and rule.format):
            kept[name] = "chooses or weighs experts"
            continue
        target = target_for(name, module, base, recipe.activation_of(rule), rule, quantizer)
        new_bias = module.bias is None and name.startswith(shifted)
        targets[name] = replace(target, family=family_of(name, experts), new_bias=new_bias)
    for i, rule in enumerate(recipe.rules):
        if i not in used:
            known = ", ".join(list(targets)[:3])
            raise ValueError(f"rule {rule.match!r} decides no layer; it must match names such as {known}")
    if not targets:
        raise ValueError(f"recipe {recipe.name} leaves every layer in float; its rules skip all of them")
    require_fused(targets, {name: family_of(name, experts) for name in kept})
    return Selection(targets, {**kept, **still_stacked(model, blocks)}, head, table)


def matching(rules: Sequence[Rule], name: str) -> tuple[int, Rule | None]:
    """The first rule that matches a layer's name, and its place; (-1, None) where none does."""
    for index, rule in enumerate(rules):
        patterns = (rule.match,) if isinstance(rule.match, str) else rule.match
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return index, rule
    return -1, None


def has_shifted_norm(block: nn.Module) -> bool:
    """Whether a norm of the block adds a bias, into which a pass could fold a shift."""
    found = (m for m in block.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 1)
    return any(getattr(norm, "bias", None) is not None for norm in found)


def table_for(model: nn.Module, head: Head, fmt: Format) -> Target:
    """The scheme of the head's table, its group fitted to K."""
    linear = model.get_submodule(head.linear)
    assert isinstance(linear, nn.Linear)
    n, k = linear.out_features, linear.in_features
    fmt, note = fitted(head.table, fmt, k, "give another head, or null")
    reason = fmt.refuses(n, k)
    if spanning := fmt.whole & fmt.fields(n, k).keys():
        reason = f"a table is packed slice by slice, and {min(spanning)} spans all of them"
    if reason:
        raise UnpackableHead(f"{head.table} cannot be packed: {reason}; give another head, or null")
    return Target(head.table, n, k, linear.bias is not None, fmt, Unquantized(), note)


Scheme = TypeVar("Scheme", Format, Activation)


def fitted(name: str, fmt: Scheme, k: int, advice: str) -> tuple[Scheme, str]:
    """`fmt` with its group fitted to K, and a note where that changed it; one without that parameter stays.

    Raises ValueError, ending in `advice`, where no group fits.
    """
    if isinstance(fmt, LowRank):
        base, note = fitted(name, fmt.base, k, advice)
        return replace(fmt, base=base), note
    if isinstance(fmt, Format) and fmt.tile > 1:  # its group is no scale's
        return fmt, ""
    asked: Any = vars(fmt).get("group", -1)
    group = fit_group(asked, k)
    if group is None:
        raise ValueError(f"{name} has K = {k}, which no multiple of 16 up to group {asked} divides; {advice}")
    if group == asked:
        return fmt, ""
    return replace(fmt, group=group), f"group {group}: {asked} does not divide K = {k}"  # type: ignore[call-arg]


def target_for(
    name: str, module: nn.Linear, base: Format, activation: Activation, rule: Rule | None, quantizer: Quantizer
) -> Target:
    """The scheme of one linear, its group fitted to K."""
    n, k = module.out_features, module.in_features
    fmt = base
    if rule is not None and rule.format:
        same = rule.format.get("name", base.name) == base.name
        fmt = from_config({**(base.config() if same else {}), **rule.format})
    advice = f"add the rule {{match: {name}, skip: true}} or {{match: {name}, format: {{group: -1}}}}"
    fmt, note = fitted(name, fmt, k, advice)
    if reason := fmt.refuses(n, k):
        raise ValueError(f"{name} cannot be quantized: {reason}; add the rule {{match: {name}, skip: true}}")
    block = largest_block(activation.rotate, k)
    if block != activation.rotate:
        note = "; ".join(filter(None, [note, f"rotated in blocks of {block}: {activation.rotate} does not divide K = {k}"]))
        activation = replace(activation, rotate=block if block > 1 else 0)
    activation, fit = fitted(name, activation, k, f"add the rule {{match: {name}, activation: none}}")
    note = "; ".join(filter(None, [note, fit and f"inputs: {fit}"]))
    pinned = rule is not None and bool(rule.format)
    target = Target(name, n, k, module.bias is not None, fmt, activation, note, pinned)
    reason = refusal(target, quantizer)
    if reason:
        raise ValueError(f"{name} cannot be quantized: {reason}")
    return target


def refusal(target: Target, quantizer: Quantizer) -> str | None:
    """Why this layer cannot be stored, or written by this quantizer, in its scheme; None where it can."""
    stored = target.format.refuses(target.n, target.k) or quantizer.refuses(target.format.inner)
    return stored or target.activation.refuses(target.k)


def family_of(name: str, experts: Container[str]) -> str:
    """What a layer shares with those that serving stacks fuse with it: q, k, v; gate, up; one projection of all experts.

    experts: names of the sets of experts. "layers.0.mlp.experts.3.up_proj" is of "layers.0.mlp.experts.*.gate_proj".
    """
    parent, _, leaf = name.rpartition(".")
    owner = parent.rpartition(".")[0]
    if owner in experts:
        parent = f"{owner}.*"
    return f"{parent}.{next((mates[0] for mates in FUSED if leaf in mates), leaf)}"


def families(targets: Mapping[str, Target]) -> list[list[Target]]:
    """The targets in sets that must share one scheme; most sets hold one layer. K differs in no set."""
    found: dict[tuple[str, int], list[Target]] = {}
    for target in targets.values():
        found.setdefault((target.family, target.k), []).append(target)
    return list(found.values())


def require_fused(targets: Mapping[str, Target], kept: Mapping[str, str]) -> None:
    """Raise ValueError where layers of one family differ in scheme. kept: families of the linears in float, by name."""
    floats = {family: name for name, family in kept.items()}
    for first, *others in families(targets):
        odd = next((t.name for t in others if (t.format, t.activation) != (first.format, first.activation)), None)
        odd = odd or floats.get(first.family)
        if odd:
            raise ValueError(f"{first.name} and {odd} need one scheme, as serving stacks fuse them; let one rule match both")
