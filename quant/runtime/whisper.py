"""Whisper as graphs: the encoder's output becomes keys and values once per clip, then each token is one decoder step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quant.runtime import attend
from quant.runtime.linears import Embedding, Linears, dtype_of, weight_of

TYPES = ("whisper",)


def refuses(model: Any) -> str | None:
    """Why this file cannot compile `model`, or None."""
    if model.config.model_type not in TYPES or not model.config.is_encoder_decoder:
        return f"it is a {model.config.model_type} model without an encoder; compiled are {', '.join(TYPES)}"
    return None


class Block(nn.Module):
    """One decoder layer: attention to the text so far, attention to the audio, MLP."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        mine, audio = layer.self_attn, layer.encoder_attn
        self.self_norm, self.audio_norm = layer.self_attn_layer_norm, layer.encoder_attn_layer_norm
        self.mlp_norm = layer.final_layer_norm
        self.qkv, self.out = Linears(mine.q_proj, mine.k_proj, mine.v_proj), Linears(mine.out_proj)
        self.audio_q, self.audio_out = Linears(audio.q_proj), Linears(audio.out_proj)
        self.up, self.down = Linears(layer.fc1), Linears(layer.fc2)
        self.activation = layer.activation_fn
        self.head, self.scale = mine.head_dim, mine.scaling

    def forward(self, x: Tensor, cache: attend.Cache, audio: attend.Cache, start: Tensor, first: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head)) for y in self.qkv(self.self_norm(x)))
        # q is scaled before the product and not in it, as in transformers: elsewhere it would be rounded elsewhere
        x = x + self.out(attend.attend(q * self.scale, k, v, cache, start, first, 1.0))[0]
        q = (self.audio_q(self.audio_norm(x))[0] * self.scale).unflatten(-1, (-1, self.head)).transpose(1, 2)
        y = torch.ops.lowbit.cpu_attention(q, *audio, None, None, 1.0)
        x = x + self.audio_out(y.flatten(2))[0]
        out: Tensor = x + self.down(self.activation(self.up(self.mlp_norm(x))[0]))[0]
        return out


class Decoder(nn.Module):
    """ids [B, T] at places start [] onwards -> logits [B, V] after token T - 1; appends to `caches`, one per block.

    audio: keys and values [B, H, S, D] of the clip for each block, from `Audio`. first: see runtime.decoder; zeros here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        inner = model.model.decoder
        self.head = Linears(model.proj_out)
        self.embed = Embedding(inner.embed_tokens, dtype_of(model))  # after the head, which moves a table they share
        self.embed, self.positions, self.norm = (
            Embedding(inner.embed_tokens, dtype_of(model)),
            inner.embed_positions,
            inner.layer_norm,
        )
        self.blocks = nn.ModuleList(Block(layer) for layer in inner.layers)
        self.longest = model.config.max_target_positions
        self.channels = [channels(layer) for layer in inner.layers]

    def forward(
        self, ids: Tensor, start: Tensor, first: Tensor, caches: list[attend.Cache], audio: list[attend.Cache]
    ) -> Tensor:
        places = start + torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids) + nn.functional.embedding(places, self.positions.weight)
        for block, cache, heard in zip(self.blocks, caches, audio, strict=True):
            x = block(x, cache, heard, start, first)
        # of every token, as transformers does: for another number of rows a BLAS adds in another order, and prompts are short
        logits: Tensor = self.head(self.norm(x))[0]
        return logits[:, -1].contiguous()


class Audio(nn.Module):
    """The encoder's output [B, S, C] -> keys and values [B, H, S, D] for every decoder block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        attentions = [layer.encoder_attn for layer in model.model.decoder.layers]
        self.kv = nn.ModuleList(Linears(attention.k_proj, attention.v_proj) for attention in attentions)
        self.head = attentions[0].head_dim

    def forward(self, hidden: Tensor) -> list[attend.Cache]:
        return [tuple(y.unflatten(-1, (-1, self.head)).transpose(1, 2).contiguous() for y in both(hidden)) for both in self.kv]


def channels(layer: Any) -> Tensor:
    """Sizes of the channels of a layer's K in attention to the text; see attend.channel_factors."""
    attention = layer.self_attn
    gain, projection = layer.self_attn_layer_norm.weight, attention.k_proj
    return attend.channel_factors(weight_of(projection), gain, projection.bias, attention.head_dim, rotary=False)
