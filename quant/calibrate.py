"""Block-streamed calibration: two chains of hidden states, one block in memory.

The quantized chain is what a block sees behind quantized blocks; the float chain, what the float model sees, is carried
along where a pass compares the two. A stack's
inputs are caught by running the model up to the stack's first block; stacks that are done answer with their stored output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant.experts import Experts, routed, stacks_of
from quant.folds import InputGroup
from quant.kernels.activation import Activation
from quant.kernels.format import Fields
from quant.stacks import Stack
from quant.stats import ROWS_KEPT, InputStats


@dataclass
class Sample:
    """Keyword inputs of one forward pass [B, ...], and how much each token counts by sequence length: L -> [B, L].

    masks: bool (False = padding), or weights of errors, float32 in [0, 1]. predicted: bool [L], the positions whose output is
    a prediction; None for all.
    """

    inputs: dict[str, Tensor]
    masks: dict[int, Tensor] = field(default_factory=dict)
    predicted: Tensor | None = None


@dataclass
class Chain:
    """hidden: the block input of each sample. calls: what else the block is given, per sample (args, kwargs)."""

    hidden: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def run(self, block: nn.Module, index: int) -> Tensor:
        """The block's output for one sample, in the dtype of its input."""
        return self.output(block, index).to(self.hidden[index].dtype)

    def output(self, block: nn.Module, index: int) -> Tensor:
        """As `run`, in float32 where the block is."""
        hidden, (args, kwargs) = self.hidden[index], self.calls[index]
        if next(block.parameters()).dtype == torch.float32:
            hidden, args, kwargs = hidden.float(), as_float32(args), as_float32(kwargs)
        return first(block(hidden, *args, **kwargs))


class Caught(Exception):
    """Stops a forward pass at the block whose inputs were wanted."""


def first(output: Any) -> Tensor:
    """The hidden states of a block's output."""
    tensor = output if isinstance(output, Tensor) else output[0]
    assert isinstance(tensor, Tensor)
    return tensor


def as_float32(value: Any) -> Any:
    """Floating tensors inside tuples, lists and dicts as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(as_float32(v) for v in value)
    return {k: as_float32(v) for k, v in value.items()} if type(value) is dict else value


@contextmanager
def forwards(replacements: dict[nn.Module, Any]) -> Iterator[None]:
    """Replace the forward of some modules for a while."""
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replacements:
            del module.forward


def catch(model: nn.Module, stacks: list[Stack], at: int, samples: list[Sample], finals: list[list[Tensor]]) -> Chain:
    """The inputs of stack `at` for every sample; `finals[s][i]` is the output of stack s < at for sample i."""
    chain = Chain([], [])

    def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
        chain.hidden.append(hidden.detach())
        chain.calls.append((args, kwargs))
        raise Caught

    for index, sample in enumerate(samples):
        replacements: dict[nn.Module, Any] = {model.get_submodule(stacks[at].blocks[0]): stop}
        for stack, outputs in zip(stacks[:at], finals, strict=True):
            for position, name in enumerate(stack.blocks):
                stored = outputs[index] if position == 0 else None
                replacements[model.get_submodule(name)] = lambda x, *a, stored=stored, **k: x if stored is None else stored
        with forwards(replacements):
            try:
                model(**sample.inputs, use_cache=False)
            except Caught:
                continue
        raise ValueError(f"the model never ran {stacks[at].blocks[0]} on the calibration data; give data that reaches it")
    return chain


class Recorder:
    """Sees which tensor each linear reads, which norm made it, and which experts each token is sent to, while a block runs."""

    def __init__(self, name: str, block: nn.Module, targets: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        self.routes: dict[str, Tensor] = {}
        self.handles = []
        for target in targets:
            module = block.get_submodule(target.removeprefix(f"{name}."))
            self.handles.append(module.register_forward_pre_hook(self._reader(target)))
        for leaf, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 1:
                self.handles.append(module.register_forward_hook(self._maker(f"{name}.{leaf}")))
            if isinstance(module, Experts):
                self.handles.append(module.register_forward_pre_hook(self._router(f"{name}.{leaf}")))

    def _reader(self, target: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[target] = args[0]

        return hook

    def _maker(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.made[name] = output

        return hook

    def _router(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.routes[name] = args[1]

        return hook

    def clear(self) -> None:
        """Before another run: an expert that gets no token there must not show what it read before."""
        self.inputs, self.made, self.routes = {}, {}, {}

    def groups(self) -> list[tuple[list[str], str | None]]:
        """Targets that read one tensor, with the norm that made it, in the order they ran."""
        found: list[tuple[Tensor, list[str]]] = []
        for target, tensor in self.inputs.items():
            mates = next((names for other, names in found if other is tensor), None)
            if mates is None:
                found.append((tensor, [target]))
            else:
                mates.append(target)
        return [(names, next((m for m, out in self.made.items() if out is tensor), None)) for tensor, names in found]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def capture(
    name: str,
    block: nn.Module,
    targets: list[str],
    float_chain: Chain | None,
    quant_chain: Chain,
    samples: list[Sample],
    expert_tokens: int = 1,
    kept: int = ROWS_KEPT,
) -> list[InputGroup]:
    """Run a float block on the chains and sum the statistics of each linear's input.

    float_chain.hidden is replaced by the block's outputs; quant_chain is left as it is. Without a float chain there is
    no drift to sum, and none for experts, whose tokens differ between the chains. Experts that saw fewer than
    `expert_tokens` tokens have statistics without data. kept: tokens of each sequence to keep whole.
    """
    recorder = Recorder(name, block, targets)
    sets = tuple(f"{name}.{inside}." for inside in stacks_of(block))
    groups: dict[str, InputGroup] = {}
    finite = True
    try:
        for index, sample in enumerate(samples):
            inputs_float: dict[str, Tensor] = {}
            if float_chain is not None:
                float_chain.hidden[index] = float_chain.run(block, index)
                inputs_float = dict(recorder.inputs)
                recorder.clear()
            finite &= bool(quant_chain.run(block, index).isfinite().all())
            for names, maker in recorder.groups():
                x, routed_here = recorder.inputs[names[0]], names[0].startswith(sets)
                if names[0] not in groups:
                    drift = float_chain is not None and not routed_here
                    groups[names[0]] = InputGroup(names, InputStats.empty(x.shape[-1], x.device, drift, kept), maker)
                rows = x if x.dim() == 3 else x.view(1, -1, x.shape[-1])
                there = None if routed_here else inputs_float.get(names[0])
                mask = routed_mask(names[0], recorder.routes, sample) if routed_here else mask_for(x, sample)
                groups[names[0]].stats.add(rows, None if there is None else there.view_as(rows), mask)
            recorder.clear()
    finally:
        recorder.close()
    found = list(groups.values())
    missing = sorted(set(targets) - {n for g in found for n in g.names})
    found += unseen(block, name, [n for n in missing if n.startswith(sets)])
    missing = [n for n in missing if not n.startswith(sets)]
    if missing:
        raise ValueError(
            f"{missing[0]} received no calibration data; leave it in float with the rule {{match: {missing[0]}, skip: true}}"
        )
    for group in found:
        stats = group.stats
        if group.names[0].startswith(sets) and stats.tokens < expert_tokens:
            group.stats = InputStats.without_data(len(stats.gram), stats.gram.device, stats.tokens)
            continue
        stats.finish()
        stats.require_finite(group.names)
    if not finite:
        raise ValueError(
            f"the output of {name} on the calibration data holds a NaN or an infinity; check the model and the calibration data"
        )
    return found


def mask_for(x: Tensor, sample: Sample) -> Tensor | None:
    """The token mask [B, L] of an input [B, L, K], or [1, B * L] of one [B * L, K]; None where none fits."""
    if x.dim() == 3:
        return sample.masks.get(x.shape[1])
    return next((mask.view(1, -1) for mask in sample.masks.values() if mask.numel() == x.shape[0]), None)


def routed_mask(name: str, routes: dict[str, Tensor], sample: Sample) -> Tensor | None:
    """Which of the tokens that the expert of linear `name` reads are real: [1, tokens], or None where all are."""
    owner, number, _ = name.rsplit(".", 2)
    every = mask_for(routes[owner], sample)
    if every is None:
        return None
    tokens = next(tokens for index, tokens, _ in routed(routes[owner], int(number) + 1) if index == int(number))
    return every[:, tokens]


def unseen(block: nn.Module, name: str, targets: list[str]) -> list[InputGroup]:
    """Groups for the linears of experts that no token reached: those of one expert with one K read one tensor."""
    found: dict[tuple[str, int], InputGroup] = {}
    for target in targets:
        weight = block.get_parameter(f"{target.removeprefix(f'{name}.')}.weight")
        key = (target.rpartition(".")[0], weight.shape[1])
        if key not in found:
            found[key] = InputGroup([], InputStats.empty(weight.shape[1], weight.device, drift=False), None)
        found[key].names.append(target)
    return list(found.values())


@torch.no_grad()
def recapture(
    name: str, block: nn.Module, readers: dict[str, tuple[Activation, Fields]], chain: Chain, samples: list[Sample]
) -> dict[str, InputStats]:
    """Statistics of X as the packed layers will read it, rounded, for each of `readers` (the first layer of its group).

    The drift is that from X to the input before rounding.
    """
    recorder = Recorder(name, block, list(readers))
    sets = tuple(f"{name}.{inside}." for inside in stacks_of(block))
    found: dict[str, InputStats] = {}
    try:
        for index, sample in enumerate(samples):
            chain.run(block, index)
            for reader, x in recorder.inputs.items():
                activation, fields = readers[reader]
                rows = activation.rotated(x if x.dim() == 3 else x.view(1, -1, x.shape[-1]))
                mask = routed_mask(reader, recorder.routes, sample) if reader.startswith(sets) else mask_for(x, sample)
                stats = found.setdefault(reader, InputStats.empty(x.shape[-1], x.device, drift=True))
                stats.add(activation.quantize(rows, fields), rows, mask)
            recorder.clear()
    finally:
        recorder.close()
    for reader, stats in found.items():
        stats.finish()
        stats.inputs = readers[reader][1]
    return found


@torch.no_grad()
def advance(block: nn.Module, chain: Chain) -> None:
    """Replace the chain's hidden states by the block's outputs."""
    for index in range(len(chain.hidden)):
        chain.hidden[index] = chain.run(block, index)
