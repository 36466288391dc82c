"""Mixtures of experts: the 3-D parameters of a layer's experts taken apart into one linear per expert and projection.

transformers keeps `gate_up_proj [E, 2 I, H]` and `down_proj [E, H, I]` of all experts as single parameters, while most
checkpoints store every expert under a name of its own: `experts.3.gate_proj.weight`. Once taken apart, an expert's linear
is a linear like any other: rules, statistics, formats, sizes and reports need no word about experts, and a packed expert
lies on disk as `experts.3.gate_proj.weight_packed`, which is where serving stacks look for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# the stacked parameter -> the linears whose rows it holds, in order
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


class Experts(nn.Module):
    """y[t] = sum over the experts e chosen for token t of weight[t, e] * down_e(gate(gate_e(x[t]), up_e(x[t]))).

    Children "0" to "E - 1" hold an expert's linears. An expert without tokens does no work. Takes the arguments of the
    transformers module it stands for.
    """

    def __init__(self, source: nn.Module) -> None:
        """source: the module with the 3-D parameters, as `refuses` accepts it. New linears are empty, on its device."""
        super().__init__()
        stacks = {name: source.get_parameter(name) for name in PARTS if name in source._parameters}
        self.count = next(iter(stacks.values())).shape[0]
        self.gated = "gate_up_proj" in stacks
        for index in range(self.count):
            self.add_module(str(index), expert_of(stacks))
        for name, module in source.named_children():  # an activation may have parameters
            self.add_module(name, module)
        stripped = copy.copy(source)
        stripped._parameters = {}
        self.source: Any
        self.__dict__["source"] = stripped  # held for its way of gating, but not a submodule

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], top_k_index int64 [T, k] of experts, top_k_weights [T, k] -> [T, H]."""
        out = torch.zeros_like(hidden)
        for index, tokens, slots in routed(top_k_index, self.count):
            y = self.run(index, hidden[tokens]) * top_k_weights[tokens, slots].unsqueeze(-1)
            out.index_add_(0, tokens, y.to(out.dtype))
        return out

    def run(self, index: int, x: Tensor) -> Tensor:
        """One expert: [M, H] -> [M, H]."""
        expert: Any = self.get_submodule(str(index))
        if self.gated:
            inner = self.source._apply_gate(torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1))
        else:
            inner = self.source.act_fn(expert.up_proj(x))
        y: Tensor = expert.down_proj(inner)
        return y


def expert_of(stacks: dict[str, nn.Parameter]) -> nn.Module:
    """One expert's linears, empty, with the shapes, dtype and device of the stacks."""
    expert = nn.Module()
    for name, parts in PARTS.items():
        if name in stacks:
            _, rows, k = stacks[name].shape
            for part in parts:
                like = {"device": stacks[name].device, "dtype": stacks[name].dtype}
                expert.add_module(part, nn.Linear(k, rows // len(parts), bias=False, **like))
    return expert


def routed(top_k_index: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens int64 [m], the slot of each in 0 .. k - 1) for every expert below `count` that has tokens."""
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    at = 0
    for index, size in enumerate(flat.bincount(minlength=count)[:count].tolist()):
        if size:
            picked = order[at : at + size]
            yield index, picked // top_k_index.shape[-1], picked % top_k_index.shape[-1]
        at += size


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer as 3-D parameters."""
    shapes = {name: p.dim() for name, p in module._parameters.items() if name in PARTS and p is not None}
    return shapes.get("down_proj") == 3 and len(shapes) == 2 and set(shapes.values()) == {3}


def refuses(module: nn.Module) -> str | None:
    """Why a module with stacked experts cannot be taken apart, or None."""
    wanted = {"is_transposed": False, "has_bias": False, "has_post_expert_norm": False, "is_concatenated": True}
    if not hasattr(module, "is_transposed"):
        return "its experts are computed in a way of its own"
    wrong = [name for name, value in wanted.items() if getattr(module, name, value) != value]
    if wrong:
        return f"its experts differ from rows of [gate; up] without bias ({wrong[0]} is {getattr(module, wrong[0])})"
    extra = sorted(set(module._parameters) - set(PARTS))
    return f"its experts have {extra[0]} besides their projections" if extra else None


def rearranged(model: Any) -> tuple[str, ...]:
    """Ends of the names of parameters that transformers makes from a checkpoint by more than putting rows together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightConverter)]
    odd = [step for step in steps if not all(isinstance(op, MergeModulelist | Concatenate) for op in step.operations)]
    return tuple(target for step in odd for target in step.target_patterns)


def stacked(model: nn.Module) -> dict[str, tuple[nn.Module, str | None]]:
    """Every module that holds the experts of a layer as 3-D parameters, and why it must stay so, by name."""
    found = {name: module for name, module in model.named_modules() if is_stacked(module)}
    odd = rearranged(model) if found else ()
    reasons = {
        name: "transformers rearranges its experts while it loads them"
        for name in found
        if any(f"{name}.{param}".endswith(odd) for param in PARTS)
    }
    return {name: (module, reasons.get(name) or refuses(module)) for name, module in found.items()}


def unstack(model: nn.Module) -> None:
    """Take the experts of every layer apart, in place; modules that are refused stay as they are."""
    for name, (module, reason) in stacked(model).items():
        if reason is None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Experts(module))


def restack(model: nn.Module) -> None:
    """The inverse of `unstack` for experts whose linears are in floats, in place."""
    for name, experts in stacks_of(model).items():
        module = copy.copy(experts.source)
        module._parameters = {}
        for param in ("gate_up_proj" if experts.gated else "up_proj", "down_proj"):
            rows = [[experts.get_parameter(f"{i}.{part}.weight").data for part in PARTS[param]] for i in range(experts.count)]
            module.register_parameter(param, nn.Parameter(torch.stack([torch.cat(parts) for parts in rows])))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def stacks_of(model: nn.Module) -> dict[str, Experts]:
    """Every set of experts that was taken apart, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def still_stacked(model: nn.Module, inside: tuple[str, ...]) -> dict[str, str]:
    """3-D weights below the prefixes `inside` that stay in float, with the reason."""
    reasons = {name: str(reason) for name, (_, reason) in stacked(model).items()}
    return {
        f"{name}.{param}": reasons.get(name, "a 3-D weight of a module that is not known to hold experts")
        for name, module in model.named_modules()
        if name.startswith(inside) and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
        for param, value in module._parameters.items()
        if value is not None and value.dim() == 3 and value.shape[0] > 1
    }


def routers(model: nn.Module) -> set[str]:
    """Linears beside experts that choose or weigh them: one output, or one for each expert."""
    found = set()
    for name, experts in stacks_of(model).items():
        parent = name.rpartition(".")[0]
        beside = model.get_submodule(parent).named_modules(prefix=parent)
        found |= {
            n
            for n, m in beside
            if type(m) is nn.Linear and m.out_features in (1, experts.count) and not n.startswith(f"{name}.")
        }
    return found
