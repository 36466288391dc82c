"""How much memory a plan's run will take, from shapes alone."""

from __future__ import annotations

import torch

from quant.passes.base import BlockTuner
from quant.plan import Plan
from quant.resources import compute_dtype, memory_bytes

LIBRARY_BYTES = 100_000_000  # what torch and transformers map on first use: thread pools, oneDNN kernels
TOKENIZER_BYTES = 2_000  # per entry of the vocabulary, measured on SmolLM2


def peak_memory_bytes(plan: Plan) -> int:
    """Predicted peak resident bytes of the run, this process as it is now included."""
    model, compute = plan.model, compute_dtype(torch.device("cpu")).itemsize
    inside = tuple(f"{block}." for stack in plan.stacks for block in stack.blocks)
    outer = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(inside) and n in plan.disk)
    blocks = [sum(p.numel() for p in model.get_submodule(b).parameters()) for s in plan.stacks for b in s.blocks]
    widest = max(t.k for t in plan.targets.values())
    # layers of one parent with one K read one tensor, or two of that size; each keeps two K x K sums
    inputs = {(t.name.rpartition(".")[0], t.k) for t in plan.targets.values()}
    grams = max(
        sum(k * k * 4 * 2 for parent, k in inputs if f"{parent}.".startswith(f"{b}.")) for s in plan.stacks for b in s.blocks
    )
    tallest = max(t.n * t.k for t in plan.targets.values())
    hidden = chain_elements(plan) * compute
    # a block in float32 beside its copy in the compute dtype, Gram matrices and their float64 factor, rows being searched
    block_bytes = max(blocks) * (4 + compute) + grams + 4 * widest * widest * 8 + 6 * tallest * 4
    # tensors outside the blocks as read, as converted, and as checked for finiteness
    outside = 3 * outer * compute + int(model.config.vocab_size) * TOKENIZER_BYTES
    tuned = any(isinstance(step, BlockTuner) for step in plan.recipe.build_passes())
    block_bytes = max(block_bytes, block_training_bytes(plan, max(blocks))) if tuned else block_bytes
    passes: int = outside + block_bytes + 3 * hidden
    total: int = memory_bytes() + LIBRARY_BYTES + max(passes, training_bytes(plan) if plan.recipe.tuners() else 0)
    return total


def block_training_bytes(plan: Plan, weights: int) -> int:
    """Of a block in training: its weights with latents, gradients and the best so far, and one sample's activations."""
    inner = sum(t.k + t.n for t in plan.targets.values()) // sum(len(stack.blocks) for stack in plan.stacks)
    return 40 * weights + plan.recipe.calibration.length * 4 * 3 * inner


def training_bytes(plan: Plan) -> int:
    """Of end-to-end training: both models, dense weights with gradients, one sample's activations, logits, attention maps.

    SmolLM2-135M with windows of 512 tokens: 3.0 GB; the process, libraries included, peaked at 3.6 GB.
    """
    config = plan.model.config.get_text_config(decoder=True)
    params, packed = sum(p.numel() for p in plan.model.parameters()), plan.packed_weights()
    length = plan.recipe.calibration.length
    inner = sum(t.k + t.n for t in plan.targets.values())  # channels that are kept of each token for the backward pass
    compute = compute_dtype(torch.device("cpu")).itemsize
    maps = max(tuner.maps for tuner in plan.recipe.tuners())
    total: int = (
        compute * params
        + 4 * (params - packed)
        + (2 * compute + 1) * packed
        + length * 4 * (2 * inner + 7 * int(config.vocab_size))
        + maps * int(config.num_hidden_layers) * int(config.num_attention_heads) * length**2 * 4
    )
    return total


def chain_elements(plan: Plan) -> int:
    """Elements of the hidden states of one chain."""
    config, wanted = plan.model.config, plan.recipe.calibration
    width = int(getattr(config, "hidden_size", None) or config.d_model)
    if plan.speech:
        return wanted.clips * int(config.max_source_positions) * width  # the decoder's states are few beside these
    return wanted.tokens * width
