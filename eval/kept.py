"""A reference model that was run once, for any number of models to be compared with.

An exact KL divergence needs every logit of the reference: 3.2 GB for eight windows of 2048 tokens at SmolLM2's vocabulary, or
half of it in float16 with a rounding of its own. The last hidden states are V / H times smaller (85 times, 38 MB), and the
head makes the very same logits of them again, slice by slice.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Module

from quant.eval.perplexity import HEAD_TOKENS, PROBE_TOKENS, Logits, Progress, Scorer


class Kept:
    """hidden [W, L, H] of all windows, and a head of its own: the rest of the model is free to go."""

    def __init__(self, hidden: Tensor, head: Module) -> None:
        self.hidden, self.head = hidden, head

    def slices(self, ids: Tensor, start: int) -> Iterator[Tensor]:
        """As `Logits.slices`."""
        assert ids.shape[1] == self.hidden.shape[1], (ids.shape, self.hidden.shape)
        yield from map(self.head, torch.split(self.hidden[start : start + len(ids), :-1], HEAD_TOKENS, dim=1))


@torch.inference_mode()
def keep(model: Module, windows: Tensor, progress: Progress = lambda done, total: None) -> Logits:
    """The logits of `model` on `windows` [W, L]: kept where its head is plain, else a Scorer that runs it again each time."""
    scorer = Scorer(model.eval(), windows[:1, :PROBE_TOKENS])
    if not scorer.split:
        return scorer
    parts = []
    for at, row in enumerate(windows):
        parts.append(scorer.hidden(row.unsqueeze(0)))
        progress(at + 1, len(windows))
    return Kept(torch.cat(parts), copy.deepcopy(scorer.head))
