"""A packed model as the ordinary float model of its dequantized weights.

What the checkpoint's weights stand for is kept, and nothing else of quantization: tokens are not rounded, attention
probabilities neither. Saved, it is a checkpoint that any program reads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quant.embedding import PackedEmbedding, TiedHead, replace
from quant.experts import PARTS, stacks_of
from quant.linear import PackedLinear


def dense(model: Any, dtype: torch.dtype) -> Any:
    """Replace every packed module of a transformers model by a float one of `dtype`, in place; returns the model."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear | TiedHead)}
    tables: dict[nn.Module, tuple[str, nn.Embedding]] = {}  # packed -> its name, and what takes its place
    for name, module in packed.items():
        if isinstance(module, PackedEmbedding):
            table = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
            table.weight = parameter(module.weight, dtype)
            replace(model, name, table)
            tables[module] = name, table
        elif isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight = parameter(module.weight, dtype)
            if module.bias is not None:
                linear.bias = parameter(module.bias, dtype)
            replace(model, name, linear)
    for name, module in packed.items():
        if isinstance(module, TiedHead):
            head = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            source, table = tables[module.embedding]
            head.weight = table.weight
            replace(model, name, head)
            model.all_tied_weights_keys[f"{name}.weight"] = f"{source}.weight"
            for owner in model.modules():  # what `embedding.untie` set over the class's own
                owner.__dict__.pop("_tied_weights_keys", None)
    stack(model)
    model.config._attn_implementation = "sdpa"  # ours has no backward pass, and may round probabilities
    return model.to(dtype)


def parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A float tensor that takes no part in training unless it is asked to, as after loading."""
    return nn.Parameter(value.detach().to(dtype, copy=True), requires_grad=False)


def stack(model: nn.Module) -> None:
    """Put experts that were taken apart back into 3-D parameters; inverse of `experts.unstack`."""
    for name, experts in stacks_of(model).items():
        whole = copy.copy(experts.source)
        whole._parameters = {}
        members = [experts.get_submodule(str(index)) for index in range(experts.count)]
        for param in ("gate_up_proj" if experts.gated else "up_proj", "down_proj"):
            rows = [
                torch.cat([member.get_submodule(part).get_parameter("weight") for part in PARTS[param]]) for member in members
            ]
            whole._parameters[param] = nn.Parameter(torch.stack(rows), requires_grad=False)
        replace(model, name, whole)
