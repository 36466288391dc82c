"""Our CPU attention as a transformers attention implementation: `model.set_attn_implementation("lowbit")`.

It takes what generation with a growing cache asks for: causal or full attention on the CPU, grouped heads, padding on the
left. Anything else (other masks, dropout, training, other devices) goes to torch's attention, which says so once with the
reason. The mask of a padded batch is the position of each sequence's first token, [B], instead of a [B, 1, T, S] table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import logging

from quant.kernels.cpu import attention, library

NAME = "lowbit"
_logger = logging.get_logger(__name__)


def first_tokens(attention_mask: Tensor) -> Tensor | None:
    """[B] int64 position of the first True of each row of a bool [B, S]; None where a row is not False ... True ..."""
    keys = attention_mask.shape[1]
    first = keys - attention_mask.sum(1)
    return first if torch.equal(attention_mask, torch.arange(keys, device=first.device) >= first[:, None]) else None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **rest: Any,
) -> Tensor | None:
    """None, [B] first tokens of causal attention over all keys before and the queries, or torch's table for the rest."""
    plain = mask_function is causal_mask_function and allow_is_causal_skip and isinstance(q_offset, int) and not kv_offset
    if plain and q_offset + q_length == kv_length and not torch.compiler.is_compiling():
        if attention_mask is None:
            return None if q_length in (1, kv_length) else torch.zeros(batch_size, dtype=torch.int64, device=rest["device"])
        if attention_mask.shape[1] == kv_length and (first := first_tokens(attention_mask)) is not None:
            return first if first.any() or q_length not in (1, kv_length) else None
    table: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **rest,
    )
    return table


def visible(attention_mask: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor:
    """What `mask` returns for causal attention as a table: bool [B or 1, 1, T, S], True where a query sees a key."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    first = keys - tokens if attention_mask is not None or tokens == 1 else 0  # else a static cache that is still empty
    places = torch.arange(keys, device=device)
    table = torch.arange(first, first + tokens, device=device)[:, None] >= places
    return table.view(1, 1, tokens, keys) if attention_mask is None else table & (places >= attention_mask[:, None, None, None])


def refuses(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float) -> str | None:
    """Why our kernel cannot serve this call, in words; None when it can."""
    if query.device.type != "cpu":
        return f"it runs on cpu, not on {query.device.type}"
    if attention_mask is not None and attention_mask.dim() != 1:
        return "the mask is neither causal nor padding on the left"
    if dropout:
        return f"dropout is {dropout}"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients are wanted"
    if query.dtype not in library.DTYPES or not query.dtype == key.dtype == value.dtype:
        return f"the dtypes are {query.dtype}, {key.dtype}, {value.dtype}"
    dim = query.shape[3]
    if dim % 8 or dim > attention.MAX_DIM or value.shape[3] != dim:
        return f"the head dimensions are {dim} and {value.shape[3]}"
    return None


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
    """query [B, H, T, D], key and value [B, Hkv, S, D] -> ([B, T, H, D], None). Raises ValueError for unknown terms."""
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if rest.get(name) is not None:
            raise ValueError(f"attention with {name} is not supported by {NAME!r}; load with attn_implementation='eager'")
    tokens, keys = query.shape[2], key.shape[2]
    reason = refuses(query, key, value, attention_mask, dropout)
    if reason is not None:
        _logger.warning_once(f"lowbit attention: {reason}; torch's attention serves instead")
        if attention_mask is not None and attention_mask.dim() == 1:
            attention_mask = visible(attention_mask, tokens, keys, query.device)
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest
        )
        return out
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = (is_causal if is_causal is not None else getattr(module, "is_causal", True)) and tokens > 1
    start = None
    if attention_mask is not None:
        start = torch.tensor([keys - tokens])
    elif causal:
        start = torch.zeros(1, dtype=torch.int64)  # a longer key tensor is a static cache that is still empty
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    return torch.ops.lowbit.cpu_attention(query, key, value, start, attention_mask, scale), None


def register() -> None:
    """Make "lowbit" a known attn_implementation."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)
