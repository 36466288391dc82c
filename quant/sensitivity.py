"""How much the model's loss feels an error of each layer: a backward pass over a few samples, one block in memory.

Let p be the float model's next-token distribution. An error dy of a layer's output moves it by

    KL = 1/2 dy^T F dy,    F = E[g g^T],    g = d(-log p(s)) / dy,  s drawn from p itself

to second order (F is the Fisher information; no label of the text is needed). With a weight error D = W - Q, dy = D x. For
rows of D that are independent, and rows of g whose sizes rise and fall together from token to token,

    KL(D) = 1/2 sum_n  E[g_n^2]  D_n A D_n^T,    A = E[|g|^2 x x^T] / E[|g|^2]        nats per prediction

(E is a sum over the tokens that the layer sees, divided by the predictions: an encoder sees more tokens than are predicted,
an expert fewer.) A counts a token's input as much as the loss feels the token. That still treats tokens as if each spoke for
itself, but an error is the same matrix at every token: what attention averages over tokens adds up (a v_proj of a tiny Llama
loses five times more than so predicted). Each layer's prediction is therefore multiplied by

    coherence = E |sum_t g_t x_t^T|^2  /  E sum_t |g_t|^2 |x_t|^2

over samples, which is 1 where tokens are independent. `fisher` [N] (coherence included) and `felt` = A [K, K] are what is kept
of a layer. (A product of two factors as in K-FAC, Martens and Grosse, 2015, with a diagonal output factor.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Sample, catch, forwards, mask_for
from quant.compile import materialize, release
from quant.plan import Plan
from quant.resources import compute_dtype


@dataclass
class Feeling:
    """One linear: weight float32 [N, K], gram [K, K] of its inputs (mean over tokens), and the factors felt and fisher."""

    weight: Tensor
    gram: Tensor
    felt: Tensor
    fisher: Tensor

    def divergence(self, error: Tensor) -> float:
        """KL(error [N, K]) in nats per prediction; of some of the rows if `fisher` was cut to the same rows."""
        rows = ((error @ self.felt) * error).sum(1)
        return 0.5 * float(self.fisher @ rows)


Progress = Callable[[int, int], None]  # blocks done, of how many


def feelings(plan: Plan, samples: list[Sample], device: torch.device, progress: Progress) -> Iterator[dict[str, Feeling]]:
    """The targets of each block, last block first."""
    for step in steps_back(plan, samples, device):
        yield feel(plan, step, samples)
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


def feel(plan: Plan, step: StepBack, samples: list[Sample]) -> dict[str, Feeling]:
    """What the targets of one block feel; experts that no token reached are left out."""
    name, block = step.name, step.block
    targets = [target for target in plan.targets if target.startswith(f"{name}.")]
    grams: dict[str, Tensor] = {}
    felts: dict[str, Tensor] = {}
    fishers: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    counts, together, apart = dict.fromkeys(targets, 0), dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0.0)
    sources: dict[str, str] = {}  # target -> the first that reads the same tensor

    def watch(target: str, sample: Sample) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach()
            inputs[target] = args[0]
            sources.setdefault(target, next(t for t, seen in inputs.items() if seen is args[0]))
            mask = mask_for(x, sample)
            keep = slice(None) if mask is None else mask.reshape(-1) > 0
            rows = x.reshape(-1, x.shape[-1])[keep].float()
            if sources[target] == target:
                grams[target] = grams.get(target, 0) + rows.T @ rows
            counts[target] += len(rows)

            def seen(grad: Tensor) -> None:
                g = grad.reshape(-1, grad.shape[-1])[keep].float()
                fishers[target] = fishers.get(target, 0) + g.square().sum(0)
                weighted = rows * g.norm(dim=1, keepdim=True)
                felts[target] = felts.get(target, 0) + weighted.T @ weighted
                together[target] += float((g.T @ rows).square().sum())
                apart[target] += float(weighted.square().sum())

            out.register_hook(seen)  # type: ignore[no-untyped-call]

        return hook

    for index, sample in enumerate(samples):
        inputs.clear()
        handles = [block.get_submodule(t.removeprefix(f"{name}.")).register_forward_hook(watch(t, sample)) for t in targets]
        try:
            step.propagate(index)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for target in fishers:
        weight = block.get_submodule(target.removeprefix(f"{name}.")).weight
        assert isinstance(weight, Tensor)
        coherence = together[target] / max(apart[target], 1e-30)
        gram, felt = grams[sources[target]] / counts[target], felts[target] / fishers[target].sum().clamp_min(1e-30)
        found[target] = Feeling(weight.detach().float(), gram, felt, coherence * fishers[target] / step.scored)
    return found
