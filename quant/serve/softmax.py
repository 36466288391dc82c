"""Attention with coded probabilities (`kernels/softmax.py`) as a transformers attention implementation, in plain torch.

It stands for what a fused kernel would compute, for evaluation on any device; it is slower than float attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from quant.kernels.softmax import attend

PREFIX = "lowbit_sqrt2_"


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    bits: int,
    **rest: Any,
) -> tuple[Tensor, None]:
    """As serve.attention.forward. attention_mask: added to the logits; without one every query sees all keys."""
    for name in ("softcap", "s_aux", "position_bias"):
        if rest.get(name) is not None:
            raise ValueError(f"attention with {name} is not supported with a quantized softmax; quantize with softmax: null")
    if dropout:
        raise ValueError(f"dropout is {dropout}; attention with a quantized softmax is for inference: call model.eval()")
    return attend(query, key, value, attention_mask, query.shape[3] ** -0.5 if scaling is None else scaling, bits), None


def register(bits: int) -> str:
    """Make the implementation for `bits` known; returns its name."""
    name = f"{PREFIX}{bits}"
    AttentionInterface.register(name, partial(forward, bits=bits))
    AttentionMaskInterface.register(name, eager_mask)
    return name
