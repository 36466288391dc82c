"""How much the model's loss feels an error of each layer: a backward pass over a few samples, one block in memory.

Let p be the float model's next-token distribution. An error D = W - Q of a layer's weight moves it by

    KL(D) = 1/2 E <D, G>^2 / predictions per sample,    G = d(-log p(s)) / dW,  s drawn from p itself

to second order (Fisher information; no label of the text is needed). G [N, K] is summed over all tokens of a sample: an error
is the same matrix at every token, and what attention averages over tokens adds up. With rows of D that are independent,

    KL(D) = 1/2 sum_n E (D_n . G_n)^2 / predictions per sample        nats per prediction

so every row of every sample is a measurement, and few samples do. `grads` holds G / sqrt(predictions in all samples), of some
rows where a block has many weights.

A factor for outputs and one for inputs (K-FAC, Martens and Grosse, 2015) would take less memory, but a quantizer that knows
the inputs leaves its error where they have little energy, and there tokens agree far less than in their mean: such factors
put v_proj of SmolLM2-135M 2.6 times too high after GPTQ, and were right for round-to-nearest only. (48 families of SmolLM2 at 3
bits, one at a time: measured KL over predicted has a spread of 20 %, with factors 32 %.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Sample, catch, forwards, mask_for
from quant.compile import materialize, release
from quant.plan import Plan
from quant.resources import compute_dtype

HELD = 1 << 28  # numbers of a block's gradients that are kept
LEAST_ROWS = 16


@dataclass
class Feeling:
    """Rows of one linear that stand for all: weight float32 [R, K], grads [S, R, K]; gram [K, K] of its inputs."""

    weight: Tensor
    gram: Tensor
    grads: Tensor

    def divergence(self, error: Tensor) -> float:
        """KL(error [R, K]) of the whole layer in nats per prediction."""
        return 0.5 * float((self.grads * error).sum(2).square().sum())

    def sampled(self, count: int) -> Feeling:
        """`count` of the rows instead."""
        energy = self.grads.square().sum((0, 2))
        rows = spread(len(energy), count, energy.device)
        return Feeling(self.weight[rows], self.gram, scaled(self.grads[:, rows], energy, rows))


def spread(n: int, count: int, device: torch.device) -> Tensor:
    """At most `count` of n rows, evenly spread."""
    return torch.linspace(0, n - 1, min(count, n), device=device).round().long()


def scaled(grads: Tensor, energy: Tensor, rows: Tensor) -> Tensor:
    """Gradients [S, R, K] of some rows with the energy [N] of all."""
    return grads * (energy.sum() / energy[rows].sum().clamp_min(1e-30)).sqrt()


Progress = Callable[[int, int], None]  # blocks done, of how many


def feelings(
    plan: Plan, samples: list[Sample], rows: int, device: torch.device, progress: Progress
) -> Iterator[dict[str, Feeling]]:
    """`rows` of the targets of each block (fewer where HELD would be exceeded), last block first."""
    for step in steps_back(plan, samples, device):
        yield feel(plan, step, samples, rows)
        progress(step.done, sum(len(stack.blocks) for stack in plan.stacks))


@dataclass
class StepBack:
    """One block of a backward pass. chain: its inputs. scored: predictions in all samples. done: blocks, this one included.

    grads [B, L, H] of the block's output, by sample; `propagate` replaces them by those of its input.
    """

    name: str
    block: nn.Module
    chain: Chain
    grads: list[Tensor]
    scored: int
    done: int

    def propagate(self, index: int) -> None:
        """Take one sample's gradient through the block; whatever in it requires gradients gets them added."""
        with torch.enable_grad():
            hidden = self.chain.hidden[index].detach().requires_grad_()
            out = Chain([hidden], [self.chain.calls[index]]).run(self.block, 0)
            # what leads from an earlier stack to this one is shared by all blocks, hence kept
            torch.autograd.backward(out, self.grads[index].to(out.dtype), retain_graph=True)
        assert hidden.grad is not None
        self.grads[index] = hidden.grad


def steps_back(plan: Plan, samples: list[Sample], device: torch.device) -> Iterator[StepBack]:
    """Every block, last block first; the consumer must `propagate` each sample before it takes the next block.

    Holds the hidden states of `samples` at every block, and one block.
    """
    weights = plan.weights()
    inside = tuple(f"{block}." for stack in plan.stacks for block in stack.blocks)
    outer = [n for n, _ in plan.model.named_parameters() if not n.startswith(inside) and n in plan.disk]
    materialize(plan.model, outer, "", weights, plan.disk, compute_dtype(device), device)
    outer += tie(plan.model)
    chains: list[Chain] = []
    states: list[list[list[Tensor]]] = []  # stack, block, sample
    finals: list[list[Tensor]] = []
    for at in range(len(plan.stacks)):
        with torch.enable_grad():  # later stacks read the outputs of earlier ones through layers outside of both
            chain = catch(plan.model, plan.stacks, at, samples, finals)
        ahead, final = forward(plan, at, chain, device)
        states.append(ahead)
        chains.append(chain)
        finals.append([hidden.requires_grad_() for hidden in final])
    scored = 0
    for index, sample in enumerate(samples):
        scored += score(plan, sample, [final[index] for final in finals], plan.recipe.seed + index)
    release(plan.model, outer)
    done = 0
    for at in reversed(range(len(plan.stacks))):
        grads = [hidden.grad for hidden in finals[at] if hidden.grad is not None]
        assert len(grads) == len(samples)
        for position in reversed(range(len(plan.stacks[at].blocks))):
            name = plan.stacks[at].blocks[position]
            block = loaded(plan, name, device)
            done += 1
            yield StepBack(name, block, Chain(states[at].pop(), chains[at].calls), grads, scored, done)


def tie(model: Any) -> list[str]:
    """Give parameters that share another's tensor, such as those of a tied head, that tensor; returns their names."""
    for name, source in model.all_tied_weights_keys.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)
    return list(model.all_tied_weights_keys)


def loaded(plan: Plan, name: str, device: torch.device) -> nn.Module:
    """A float block."""
    block: nn.Module = copy.deepcopy(plan.model.get_submodule(name))
    params = [n for n, _ in block.named_parameters()]
    materialize(block, params, f"{name}.", plan.weights(), plan.disk, compute_dtype(device), device)
    return block


@torch.no_grad()
def forward(plan: Plan, at: int, chain: Chain, device: torch.device) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The input of every block of a stack, by block and sample, and the output of its last."""
    states = []
    hidden = chain.hidden
    for name in plan.stacks[at].blocks:
        states.append(hidden)
        block = loaded(plan, name, device)
        step = Chain(hidden, chain.calls)
        hidden = [step.run(block, index) for index in range(len(hidden))]
    return states, hidden


def score(plan: Plan, sample: Sample, finals: list[Tensor], seed: int) -> int:
    """Backpropagate -log p of tokens drawn from the model's own distribution into `finals`, the outputs of its stacks.

    Returns how many were drawn.
    """
    replacements: dict[nn.Module, Any] = {}
    for stack, final in zip(plan.stacks, finals, strict=True):
        for position, name in enumerate(stack.blocks):
            stored = final if position == 0 else None
            replacements[plan.model.get_submodule(name)] = lambda x, *a, stored=stored, **k: x if stored is None else stored
    with torch.enable_grad(), forwards(replacements):
        assert not plan.model.get_output_embeddings().weight.is_meta
        logits = plan.model(**sample.inputs, use_cache=False).logits[0].float()
        logits = logits if sample.predicted is None else logits[sample.predicted]
        scores = torch.log_softmax(logits, -1)
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=torch.Generator().manual_seed(seed))
        (-scores.gather(1, drawn.to(scores.device)).sum()).backward()  # type: ignore[no-untyped-call]
    return len(drawn)


def feel(plan: Plan, step: StepBack, samples: list[Sample], most: int) -> dict[str, Feeling]:
    """What the targets of one block feel; experts that no token reached are left out."""
    name, block = step.name, step.block
    targets = [target for target in plan.targets if target.startswith(f"{name}.")]
    width = len(samples) * sum(plan.targets[target].k for target in targets)
    count = max(LEAST_ROWS, min(most, HELD // width))
    grams: dict[str, Tensor] = {}
    energies: dict[str, Tensor] = {}
    grads: dict[str, list[Tensor]] = {}
    counts = dict.fromkeys(targets, 0.0)
    inputs: dict[str, Tensor] = {}  # of the sample at hand, as the gradient
    gradient: dict[str, Tensor] = {}
    sources: dict[str, str] = {}  # target -> the first that reads the same tensor

    def watch(target: str, sample: Sample) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach()
            inputs[target] = args[0]
            sources.setdefault(target, next(t for t, seen in inputs.items() if seen is args[0]))
            mask = mask_for(x, sample)
            rows = x.reshape(-1, x.shape[-1]).float()
            if sources[target] == target:
                weights = rows.new_ones(len(rows), 1) if mask is None else mask.reshape(-1, 1).float()
                grams[target] = grams.get(target, 0) + (rows * weights).T @ rows
                counts[target] += float(weights.sum())

            def seen(grad: Tensor) -> None:
                gradient[target] = gradient.get(target, 0) + grad.reshape(-1, grad.shape[-1]).float().T @ rows

            out.register_hook(seen)  # type: ignore[no-untyped-call]

        return hook

    for index, sample in enumerate(samples):
        inputs.clear()
        gradient.clear()
        handles = [block.get_submodule(t.removeprefix(f"{name}.")).register_forward_hook(watch(t, sample)) for t in targets]
        try:
            step.propagate(index)
        finally:
            for handle in handles:
                handle.remove()
        for target, grad in gradient.items():
            energies[target] = energies.get(target, 0) + grad.square().sum(1)
            grads.setdefault(target, []).append(grad[spread(len(grad), count, grad.device)])
    found = {}
    for target, kept in grads.items():
        weight = block.get_submodule(target.removeprefix(f"{name}.")).weight
        assert isinstance(weight, Tensor)
        rows = spread(len(weight), count, weight.device)
        stood = scaled(torch.stack(kept), energies[target], rows) / math.sqrt(step.scored)
        found[target] = Feeling(weight.detach()[rows].float(), grams[sources[target]] / counts[sources[target]], stood)
    return found
