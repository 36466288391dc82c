"""Block-wise reconstruction: a packed block learns to put out what the float block does, before the next one is quantized.

    loss = e(f_q(x_q), f(x)) + same * e(f_q(x_q), f(x_q)) + penalty,     e(a, b) = mean over tokens of |a - b|^2 / |b|^2

f the float block, f_q the packed one; x, x_q their inputs in the float model and behind quantized blocks, so a block repairs
some of what the ones before it lost. Every token counts the same however large it is: the first of a sequence is often a
hundred times larger than the rest, and the norms that read a block's output divide by its size. Scales, norms and,
through latent weights (`latent.py`), codes move by Adam, in float32. (Losses: ApiQ, Liao et al., 2024, there of plain squares.)

Memory is that of one block, about 32 bytes a weight where codes move, and the activations of one sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Sample, forwards
from quant.linear import PackedLinear
from quant.train.latent import Latent
from quant.train.layer import Trained
from quant.train.schedule import BETAS, EPSILON, share_of_rate, vector_rate

if TYPE_CHECKING:
    from quant.passes.base import BlockTuner
    from quant.train.pace import Pace


@dataclass
class PackedBlock:
    """A float32 block with its linears packed. Names are full names in the model.

    inputs: the quantized chain in front of the block. outputs: the float chain behind it, by sample. weights: what each linear
    was packed from, float32 [N, K], rotated as its codes are. changed: other parameters that were trained.
    """

    name: str
    module: nn.Module
    inputs: Chain
    outputs: list[Tensor]
    samples: list[Sample]
    layers: dict[str, PackedLinear] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    def put(self, name: str, layer: nn.Module) -> None:
        """Set what stands in the place of a linear."""
        parent, _, leaf = name.removeprefix(f"{self.name}.").rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, layer)

    def train(self, tuners: Sequence[BlockTuner], folder: Path, pace: Pace | None) -> list[dict[str, Any]]:
        """What each of them reports; nothing for a block whose linears all stay in float."""
        return [tuner.tune(self, folder, pace) for tuner in tuners] if self.layers else []


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of Adam, per step. codes: of latents, in steps of their grid; 0: codes stay. scales, vectors: relative."""

    codes: float
    scales: float
    vectors: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """steps of `windows` samples each, in an order drawn by `seed`. held: the last samples, never trained on.

    looks: how often the loss on them is taken. patience: looks without a new best after which training stops.
    """

    steps: int
    windows: int
    held: int
    looks: int
    patience: int
    seed: int


@dataclass
class Outcome:
    """held: loss on held-out samples at each look, the first before training; the block is left as it was at the least of them.

    losses: of each step, without penalty. codes: share of codes that changed. skipped: steps whose gradient was not finite.
    """

    held: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    codes: float = 0.0
    skipped: int = 0


class Penalty(Protocol):
    """A term of the loss on dense weights."""

    def begin(self, layers: dict[str, Trained], loss: float) -> None:
        """Before the first step; loss: on held-out samples."""

    def add_gradient(self, layers: dict[str, Trained]) -> None:
        """Add to the gradients of the layers' dense weights."""


def relative_error(found: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    """e(found, wanted) of [B, L, H]; weights [B, L] of the tokens, None for equal ones."""
    lost = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    return lost.mean() if weights is None else (lost * weights).sum() / weights.sum()


class Reconstruction:
    """A block in training, its linears `Trained`, until `finish` packs them again."""

    def __init__(self, block: PackedBlock, rates: Rates, same: float = 0.0) -> None:
        self.block, self.same = block, same
        self.layers: dict[str, Trained] = {
            name: Latent(layer, toward=block.weights[name]) if rates.codes else Trained(layer)
            for name, layer in block.layers.items()
        }
        for name, layer in self.layers.items():
            block.put(name, layer)
        inside = tuple(f"{name}." for name in self.layers)
        named = {f"{block.name}.{leaf}": value for leaf, value in block.module.named_parameters()}
        self.vectors = {n: p for n, p in named.items() if p.dim() == 1 and not n.startswith(inside)} if rates.vectors else {}
        biases = [layer.bias for layer in self.layers.values() if layer.bias is not None]
        for vector in self.vectors.values():
            vector.requires_grad_()
        self.latents = [layer for layer in self.layers.values() if isinstance(layer, Latent)]
        theta = [value for layer in self.layers.values() for value in layer.theta.values()]
        groups: list[dict[str, Any]] = [{"params": theta, "lr": rates.scales}]
        groups += [{"params": [layer.steps for layer in self.latents], "lr": rates.codes}]
        groups += [{"params": [v], "lr": vector_rate(v, rates.vectors)} for v in [*self.vectors.values(), *biases]]
        self.groups = [group | {"top": group["lr"]} for group in groups if group["params"] and group["lr"]]
        self.values = [value for group in self.groups for value in group["params"]]
        self.adam = torch.optim.Adam(self.groups, betas=BETAS, eps=EPSILON, fused=True) if self.groups else None
        self.same_input = self.float_outputs() if same else []

    @torch.no_grad()
    def float_outputs(self) -> list[Tensor]:
        """f(x_q) by sample, in the dtype of the chain."""

        def forward(layer: Trained, weight: Tensor, x: Tensor) -> Tensor:
            return nn.functional.linear(layer.activation.rotated(x), weight, layer.bias)

        floats: dict[nn.Module, Any] = {
            layer: partial(forward, layer, self.block.weights[name]) for name, layer in self.layers.items()
        }
        with forwards(floats):
            return [self.block.inputs.run(self.block.module, index) for index in range(len(self.block.samples))]

    def refresh(self) -> None:
        """Codes that follow their latents, and dense weights for the next forward passes."""
        for latent in self.latents:
            latent.settle()
        for layer in self.layers.values():
            layer.refresh(torch.float32)

    def error(self, index: int) -> Tensor:
        """The loss on one sample, penalty not included."""
        found = self.block.inputs.output(self.block.module, index).float()
        weights = self.block.samples[index].masks.get(found.shape[1])
        loss = relative_error(found, self.block.outputs[index].float(), weights)
        return loss + self.same * relative_error(found, self.same_input[index].float(), weights) if self.same else loss

    @torch.no_grad()
    def look(self, held: int) -> float:
        """The mean loss on the last `held` samples."""
        self.refresh()
        count = len(self.block.samples)
        return sum(float(self.error(index)) for index in range(count - held, count)) / held

    @torch.enable_grad()
    def gradient(self, indices: list[int], penalty: Penalty | None) -> float:
        """Set all .grad for the mean loss over samples, which is returned without the penalty."""
        self.refresh()
        for value in self.values:
            value.grad = None
        total = 0.0
        for index in indices:
            loss = self.error(index) / len(indices)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if penalty is not None:
            penalty.add_gradient(self.layers)
        for layer in self.layers.values():
            layer.collect()
        return total

    def fitting(self, pace: Pace, windows: int, held: int, looks: int, penalty: Penalty | None) -> int:
        """The steps that `pace` has time for, beside the looks at held-out samples and the pass that moves the chain on."""
        if self.adam is None:
            return 0
        if (chosen := pace.known()) is not None:  # by the first block: the others need not look and undo a step for it
            return chosen
        began = time.monotonic()
        loss = self.look(held)
        sample = (time.monotonic() - began) / held
        if penalty is not None:
            penalty.begin(self.layers, loss)

        def once() -> None:
            self.gradient([0] * windows, penalty)
            self.move(1.0)

        kept = self.state()
        steps = pace.steps(once, sample * ((looks + 1) * held + len(self.block.samples)))
        self.restore(kept)
        self.adam.state.clear()
        return steps

    def fit(self, schedule: Schedule, penalty: Penalty | None = None) -> Outcome:
        """Train. Raises ValueError where there are too few samples to keep some from training."""
        free = len(self.block.samples) - schedule.held
        if free < 1:
            raise ValueError(
                f"training of blocks keeps {schedule.held} samples to measure on, the calibration data has "
                f"{len(self.block.samples)}; give more calibration.tokens or clips"
            )
        outcome, draw = Outcome([self.look(schedule.held)]), torch.Generator().manual_seed(schedule.seed)
        first = {name: layer.codes for name, layer in self.layers.items()}
        best, waited, kept = outcome.held[0], 0, self.state()
        if penalty is not None:
            penalty.begin(self.layers, best)
        order: list[int] = []
        for step in range(schedule.steps if self.adam else 0):
            while len(order) < schedule.windows:
                order += torch.randperm(free, generator=draw).tolist()
            indices, order = order[: schedule.windows], order[schedule.windows :]
            outcome.losses.append(self.gradient(indices, penalty))
            moved = math.isfinite(outcome.losses[-1]) and self.move(share_of_rate(step, schedule.steps))
            outcome.skipped += not moved
            if (step + 1) * schedule.looks // schedule.steps > step * schedule.looks // schedule.steps:
                outcome.held.append(self.look(schedule.held))
                better = outcome.held[-1] < best
                waited = 0 if better else waited + 1
                if better:
                    best, kept = outcome.held[-1], self.state()
                if waited == schedule.patience:
                    break
        self.restore(kept)
        changed = sum(int((layer.codes != first[name]).sum()) for name, layer in self.layers.items())
        outcome.codes = changed / sum(layer.codes.numel() for layer in self.layers.values())
        return outcome

    def move(self, share: float) -> bool:
        """One step at a share of the rates; False, and none, where a gradient is not finite."""
        grads = [value.grad for value in self.values if value.grad is not None]
        finite = all(bool(grad.isfinite().all()) for grad in grads)
        if finite:
            assert self.adam is not None
            for group in self.adam.param_groups:
                group["lr"] = group["top"] * share
            self.adam.step()
            for layer in self.latents:
                layer.hold()
        return finite

    def state(self) -> list[Tensor]:
        """A copy of all that is trained."""
        return [value.detach().clone() for value in self.values]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Go back to a `state`."""
        for value, kept in zip(self.values, state, strict=True):
            value.copy_(kept)
        self.refresh()

    def finish(self) -> None:
        """Pack the layers where they stand, and let go of everything else."""
        block = self.block
        for name, layer in self.layers.items():
            bias = None if layer.bias is None else layer.bias.detach()
            packed = PackedLinear.from_fields(layer.fields(), layer.format, layer.activation, layer.n, layer.k, bias)
            block.layers[name] = packed
            block.put(name, packed)
            if bias is not None:
                block.changed.add(f"{name}.bias")
        for name, vector in self.vectors.items():
            vector.requires_grad_(False)
            block.changed.add(name)
