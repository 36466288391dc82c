"""Which tokens are read with 8 bits and which with 4: attention marks them, linears of `adaptive_token` read the marks.

After its own attention each block decides anew: a token is important where it pays the sink (kernels/sinks.py) at least the
block's threshold. The marks serve the output projection and the MLP of that block and q, k, v of the next; q, k, v of the first
block read all tokens with 8 bits. (The released code of EdgeQAT leaves the input of the output projection in float.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quant.kernels import sinks
from quant.kernels.activations.adaptive_token import AdaptiveToken
from quant.linear import PackedLinear
from quant.serve import attention

NAME = "lowbit_token_bits"
INPUTS = ("q_proj", "k_proj", "v_proj")


class Tags:
    """One per model: which of the tokens that went through the last attention are important, bool [B, T]."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The tags [...] of tokens x [..., K]. Raises ValueError where the last attention saw other tokens."""
        count = 0 if self.value is None else self.value.numel()
        if self.value is None or count * x.shape[-1] != x.numel():
            raise ValueError(
                f"a layer reads {list(x.shape[:-1])} tokens, the attention before it tagged {count}; run whole blocks"
            )
        return self.value.view(x.shape[:-1]).to(x.device)


@dataclass
class Sink:
    """What an attention module knows of it: the least importance of an important token, and where marks are left."""

    tags: Tags
    threshold: float

    def mark(self, importance: Tensor) -> None:
        """importance float32 [B, T]."""
        self.tags.value = importance >= self.threshold


@torch.no_grad()
def mark(module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float | None) -> None:
    """Leave marks for the layers behind an attention; arguments as of its forward."""
    seen = attention.visible(attention_mask, query.shape[2], key.shape[2], query.device)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    module.token_bits.mark(sinks.importance(query, key, seen, scale))


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """As serve.attention.forward."""
    mark(module, query, key, attention_mask, scaling)
    return attention.forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest)


def attentions(model: nn.Module) -> list[Any]:
    """The attention modules of a model whose linears are called as Llama's, in order."""
    return [m for m in model.modules() if all(isinstance(getattr(m, name, None), nn.Module) for name in INPUTS)]


def refuses(model: Any, blocks: int) -> str | None:
    """Why tokens of this model, which has so many blocks, cannot have bits of their own, or None."""
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return "it is no plain text decoder, and the tokens of an encoder have no attention sink"
    found = attentions(model)
    if len(found) != blocks:
        return f"{len(found)} of its {blocks} blocks have an attention with {', '.join(INPUTS)}"
    if not all(getattr(module, "is_causal", False) for module in found) or getattr(model.config, "is_causal", None) is False:
        return "its attention is not causal"
    return None


def install(model: Any, thresholds: Sequence[float]) -> None:
    """Connect a loaded model's attentions with its adaptive layers. Raises ValueError where that is impossible."""
    if reason := refuses(model, len(thresholds)):
        raise ValueError(f"config.json gives thresholds for the bits of tokens, but {reason}; quantize again")
    tags, found = Tags(), attentions(model)
    for module, threshold in zip(found, thresholds, strict=True):
        module.token_bits = Sink(tags, threshold)
    first = [getattr(found[0], name) for name in INPUTS]
    for layer in model.modules():
        adaptive = isinstance(layer, PackedLinear) and isinstance(layer.activation, AdaptiveToken)
        if adaptive and not any(layer is early for early in first):
            layer.tags, layer.siblings = tags, None
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, attention.mask)
    model.set_attn_implementation(NAME)
