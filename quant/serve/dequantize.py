"""`model.dequantize()`: the packed weights of a loaded model as floats, in modules that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quant.embedding import PackedEmbedding, TiedHead, replace
from quant.experts import restack
from quant.linear import PackedLinear


def dequantize(model: Any, dtype: torch.dtype) -> None:
    """Give a loaded model ordinary linears, embeddings and experts, in place, everything in `dtype`.

    The weights are what the packed bytes stand for, rounded to `dtype`; tokens, keys, values and attention probabilities
    are in floats from then on. A tied head is tied again. Raises ValueError, before anything is changed, for layers whose
    tensors are on disk.
    """
    away = [
        n for n, m in model.named_modules() if isinstance(m, PackedLinear) and "meta" in {b.device.type for b in m.buffers()}
    ]
    if away or "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError("dequantize was called on a model that is partly on disk; load it again without disk in device_map")
    for name in ("generate", "runtime"):  # compiled graphs of the packed layers
        vars(model).pop(name, None)
    model.to(dtype)
    tables: dict[nn.Module, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedEmbedding):
            table = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
            table.weight = tables[module] = nn.Parameter(module.weight)
            replace(model, name, table)
        elif isinstance(module, PackedLinear):
            replace(model, name, linear(nn.Parameter(module.weight), module.bias))
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedHead):
            replace(model, name, linear(tables[module.embedding], None))
    if tables:
        retie(model)
    restack(model)


def linear(weight: nn.Parameter, bias: torch.Tensor | None) -> nn.Linear:
    """nn.Linear around an existing parameter, which may be shared, and a bias; trainable as any."""
    module = nn.Linear(1, 1, bias=bias is not None, device="meta")
    module.weight = weight
    module.bias = None if bias is None else nn.Parameter(bias.detach())  # type: ignore[assignment]
    module.out_features, module.in_features = weight.shape
    return module


def retie(model: Any) -> None:
    """The inverse of quant.embedding.untie: ties are again those that the classes of the model declare."""
    for module in model.modules():
        vars(module).pop("_tied_weights_keys", None)
    for module in model.modules():
        if "all_tied_weights_keys" in vars(module):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=False)
