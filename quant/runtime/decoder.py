"""Llama-like decoders as one graph: token ids and KV caches in, logits of each row's last token out.

The module is built around a transformers model and shares its memory. It covers pre-norm blocks of rotary attention and a
gated MLP: Llama, Mistral, Qwen2, Qwen3 and models of the same classes (SmolLM2 is a Llama). What it does not cover is
refused in words and stays with transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.runtime import attend
from quant.runtime.linears import Embedding, Linears, dtype_of, weight_of
from quant.serve import pointwise

TYPES = ("llama", "mistral", "qwen2", "qwen3")  # config.model_type; each is run in the tests
ROPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of the text


def refuses(model: Any) -> str | None:
    """Why this file cannot compile `model`, or None."""
    config = model.config
    if config.model_type not in TYPES:
        return f"it is a {config.model_type} model; compiled are {', '.join(TYPES)} and whisper"
    if getattr(config, "is_causal", None) is False:
        return "it attends to both sides"
    kind = config.rope_parameters["rope_type"]
    if kind not in ROPES:
        return f"its rotary embedding is of type {kind}; compiled are {', '.join(ROPES)}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
        return f"it attends to a sliding window of {window} tokens"
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D] with cos and sin [B, T, 1, D]; channel i pairs with i + D/2.

    Half by half, so that a graph writes the result in one pass; products are rounded where transformers rounds them.
    """
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (part.chunk(2, -1) for part in (x, cos, sin))
    return torch.cat((a * cos_a - b * sin_a, b * cos_b + a * sin_b), -1)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Linears(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Linears(attention.o_proj)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.gate_up = Linears(mlp.gate_proj, mlp.up_proj)
        self.down = Linears(mlp.down_proj)
        self.activation = mlp.act_fn
        self.head, self.scale = attention.head_dim, attention.scaling

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: attend.Cache, start: Tensor, first: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head)) for y in self.qkv(self.attention_norm(x)))
        if self.q_norm is not None:
            assert self.k_norm is not None
            q, k = self.q_norm(q), self.k_norm(k)
        y = attend.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, cache, start, first, self.scale)
        x = x + self.out(y)[0]
        gate, up = self.gate_up(self.mlp_norm(x))
        fused = isinstance(self.activation, pointwise.SiLU)
        hidden = torch.ops.lowbit.cpu_silu_mul(gate, up) if fused else self.activation(gate) * up
        out: Tensor = x + self.down(hidden)[0]
        return out


def channels(layer: Any) -> Tensor:
    """Sizes of the channels of a layer's K, [H, D]; see attend.channel_factors."""
    attention = layer.self_attn
    size, norm = attention.head_dim, getattr(attention, "k_norm", None)
    if norm is None:
        bias = attention.k_proj.bias
        return attend.channel_factors(weight_of(attention.k_proj), layer.input_layernorm.weight, bias, size, rotary=True)
    power = norm.weight.detach().float().square()  # it gives the channels of every head a known size
    both = ((power + power.roll(size // 2)) / 2).sqrt().clamp(min=attend.SMALLEST)
    wide: Tensor = both.expand(attention.k_proj.out_features // size, -1).contiguous()
    return wide


class Decoder(nn.Module):
    """ids [B, T] at places start [] onwards -> logits [B, V] after token T - 1; appends to `caches`, one per block.

    first [B]: padding at the beginning of each row, which nothing attends to. tables: see `rotations`; as an input, because a
    graph would compute cosines again in every block.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = model.model
        self.head = Linears(model.lm_head)
        self.embed = Embedding(inner.embed_tokens, dtype_of(model))  # after the head, which moves a table they share
        self.norm, self.rope = inner.norm, inner.rotary_emb
        self.blocks = nn.ModuleList(Block(layer) for layer in inner.layers)
        self.channels = [channels(layer) for layer in inner.layers]
        self.longest = model.config.max_position_embeddings

    def rotations(self, places: int, dtype: torch.dtype) -> list[Tensor]:
        """cos and sin [S, D] of the rotary embedding at the first S = `places` positions."""
        return [part[0] for part in self.rope(torch.empty(0, dtype=dtype), torch.arange(places)[None])]

    def forward(self, ids: Tensor, start: Tensor, first: Tensor, caches: list[attend.Cache], tables: list[Tensor]) -> Tensor:
        x = self.embed(ids)
        positions = (start + torch.arange(ids.shape[1], device=ids.device) - first[:, None]).clamp(min=0)  # [B, T]
        cos, sin = (nn.functional.embedding(positions, table)[:, :, None] for table in tables)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cos, sin, cache, start, first)
        logits: Tensor = self.head(self.norm(x[:, -1]))[0]
        return logits
