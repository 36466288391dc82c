"""Attention whose queries, keys and maps can be had while two models run, and the loss that is made of them.

The maps of all layers are in memory at once, 4 L H T^2 bytes for each model: windows of 512 tokens are meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quant.calibrate import Sample
from quant.serve import attention, token_bits
from quant.train.attention_losses import Form, distribution_loss, entropy_loss
from quant.train.distill import divergence

NAME = "lowbit_watched"


class Watch:
    """queries [B, H, T, D], keys [B, Hkv, T, D] and maps [B, H, T, S] of the layers that ran, while it is open."""

    def __init__(self, model: Any) -> None:
        """From now on the model's attention is torch's plain one, with gradients, tags of tokens included."""
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.opened = False
        for module in token_bits.attentions(model):
            module.watch = self
        AttentionInterface.register(NAME, forward)
        AttentionMaskInterface.register(NAME, attention.mask)
        model.set_attn_implementation(NAME)

    @contextmanager
    def open(self) -> Iterator[None]:
        """What ran is there inside, and let go of at the end."""
        self.opened = True
        try:
            yield
        finally:
            self.opened = False
            for kept in (self.queries, self.keys, self.maps):
                kept.clear()


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """As serve.attention.forward, with the map [B, H, T, S]; softmax in float32."""
    if hasattr(module, "token_bits"):
        token_bits.mark(module, query, key, attention_mask, scaling)
    seen = attention.visible(attention_mask, query.shape[2], key.shape[2], query.device)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    keys, values = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query @ keys.transpose(2, 3)).float() * scale
    probabilities = torch.softmax(scores.masked_fill(~seen, torch.finfo(torch.float32).min), -1)
    watch: Watch = module.watch
    if watch.opened:
        watch.queries.append(query)
        watch.keys.append(key)
        watch.maps.append(probabilities)
    out = probabilities.to(value.dtype) @ values
    return out.transpose(1, 2).contiguous(), probabilities


class Guided:
    """KL as in `distill.py` + entropy * L_E + distribution * L_D, for two models that are watched from now on."""

    def __init__(self, teacher: Any, student: nn.Module, entropy: float, distribution: float, form: Form) -> None:
        self.entropy, self.distribution, self.form = entropy, distribution, form
        self.teacher, self.student = Watch(teacher), Watch(student)

    def __call__(self, teacher: Any, student: Any, sample: Sample) -> Tensor:
        """The loss of one sample; differentiable in the student."""
        with self.teacher.open(), self.student.open():
            loss = divergence(teacher, student, sample)
            if self.entropy:
                loss = loss + self.entropy * entropy_loss(self.student.queries, self.student.keys)
            if self.distribution:
                wanted = [one.float() for one in self.teacher.maps]
                loss = loss + self.distribution * distribution_loss(self.student.maps, wanted, self.form)
            return loss
