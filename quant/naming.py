"""Tensor names on disk <-> parameter names in memory.

transformers renames tensors while it loads them, and merges the experts of a layer. Here, where experts are taken apart
(quant/experts.py), a merge is a renaming too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from quant.experts import PARTS, stacks_of
from quant.models import Entry

LAYER = ".weight"


def renamings(model: Any, conversions: Iterable[Any] | None = None) -> list[Any]:
    """The weight transforms with which transformers loads `model`, merges of experts that were taken apart as renamings.

    conversions: those of the whole model, if transformers has collected them already.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    stacks = tuple(f"{name}.{param}" for name in stacks_of(model) for param in PARTS)
    found = []
    for step in get_model_conversion_mapping(model) if conversions is None else conversions:
        target = step.target_patterns[0]
        if not isinstance(step, WeightConverter) or not any(name.endswith(target) for name in stacks):
            found.append(step)
            continue
        for source, part in zip(step.source_patterns, PARTS[target.rpartition(".")[2]], strict=True):
            before, _, after = source.removesuffix(LAYER).partition("*")
            old = f"{before}(\\d+){after}."
            new = f"{target.rpartition('.')[0]}.\\1.{part}."
            if old.replace("(\\d+)", "\\1") != new:
                renaming = WeightRenaming(source_patterns=old, target_patterns=new)
                renaming.scope_prefix, renaming.base_model_prefix = step.scope_prefix, step.base_model_prefix
                found.append(renaming)
    return found


def in_memory(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Tensor name on disk -> the name that it gets on loading, but for a leading component of the model."""
    from transformers.core_model_loading import WeightRenaming

    own = {name for name, _ in model.named_parameters()}
    steps = [step for step in renamings(model) if isinstance(step, WeightRenaming)]
    found = {}
    for name in stored:
        new = name
        for step in steps:
            new, _ = step.rename_source_key(new)
        found[name] = name if name in own else new
    return found


def match(model: nn.Module, wanted: Iterable[str], stored: Iterable[str], least: int, suffix: str = "") -> dict[str, str]:
    """wanted -> stored name: `match_names` after the renaming. suffix: what both lack of a parameter's name."""
    renamed = {
        new.removesuffix(suffix): old.removesuffix(suffix)
        for old, new in in_memory(model, (s + suffix for s in stored)).items()
    }
    return {name: renamed[found] for name, found in match_names(wanted, renamed, least).items()}


def match_names(wanted: Iterable[str], stored: Iterable[str], least: int) -> dict[str, str]:
    """wanted -> stored name. Equal, or else the longest common suffix of at least `least` components, if it is unique among
    the names that equal no wanted one.

    Names agree for most models; composite models are renamed by transformers on loading, and a checkpoint of a bare
    base model lacks the leading component.
    """
    known, wanted = set(stored), list(wanted)
    by_tail: dict[str, list[str]] = {}
    for name in known.difference(wanted):
        parts = name.split(".")
        for i in range(len(parts)):
            by_tail.setdefault(".".join(parts[i:]), []).append(name)
    found: dict[str, str] = {}
    for name in wanted:
        if name in known:
            found[name] = name
            continue
        parts = name.split(".")
        for i in range(len(parts) - least + 1):
            candidates = by_tail.get(".".join(parts[i:]), [])
            if len(candidates) == 1:
                found[name] = candidates[0]
            if candidates:
                break
    return found


def experts_apart(model: nn.Module, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a checkpoint, those that hold all experts of a layer shown as one tensor per expert and projection.

    Rows of experts follow one another on disk, so such a part is a byte range of its own. Raises ValueError for a shape
    that does not fit.
    """
    wanted = {f"{name}.{param}": (module, param) for name, module in stacks_of(model).items() for param in PARTS}
    whole = {disk: wanted[name] for name, disk in match(model, wanted, tensors, least=3).items()}
    renamed = in_memory(model, whole)
    found: dict[str, Entry] = {}
    for disk, entry in tensors.items():
        if disk not in whole:
            found[disk] = entry
            continue
        module, param = whole[disk]
        parts = PARTS[param]
        layer = module.get_submodule(f"0.{parts[0]}")
        assert isinstance(layer, nn.Linear)
        shape = (layer.out_features, layer.in_features)
        if entry.shape != (module.count, len(parts) * shape[0], shape[1]):
            asked = [module.count, len(parts) * shape[0], shape[1]]
            raise ValueError(f"{disk} is {list(entry.shape)} on disk; config.json asks for {asked}")
        size = (entry.stop - entry.start) // (module.count * len(parts))
        at = entry.start
        for index in range(module.count):
            for part in parts:
                name = f"{renamed[disk].removesuffix(param)}{index}.{part}{LAYER}"
                found[name] = Entry(entry.file, entry.dtype, shape, at, at + size)
                at += size
    return found
