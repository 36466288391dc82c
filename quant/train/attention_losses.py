"""What EdgeQAT asks of attention besides the right logits: varied queries and keys, and the teacher's maps.

    L_E = -log mean over layers, sequences, heads of log(1 + var(q) var(k))        var over the tokens and channels of a head
    L_D = 1 - mean of cos(P, P*), or -log of that mean                             P, P* [T, T]: maps of student and teacher

(EdgeQAT, later Squat, Shen et al., 2024: entropy and distribution loss. Theirs sum where these take means, which adds a
constant to L_E. q and k are taken after the rotary embedding; ours are not rounded.)

The published L_D is +log of the sum, to be minimized: it rewards maps that differ. `published` is that form, to compare with.
L_E has no lower bound, it falls as q and k grow together: only the distillation beside it keeps logits in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["cosine", "log", "published"]


def entropy_loss(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """L_E of the queries [B, H, T, D] and keys [B, Hkv, T, D] of each layer; a key head's variance counts with each of its
    query heads. Infinite where every variance product is 0.
    """
    terms = []
    for q, k in zip(queries, keys, strict=True):
        spread_q, spread_k = (x.float().flatten(2).var(-1, correction=0) for x in (q, k))
        terms.append(torch.log1p(spread_q * spread_k.repeat_interleave(q.shape[1] // k.shape[1], 1)).mean())
    return -torch.log(torch.stack(terms).mean())


def mean_cosine(maps: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over layers, sequences and heads of the cosine between attention maps [B, H, T, S], each flattened."""
    pairs = zip(maps, wanted, strict=True)
    return torch.stack([torch.cosine_similarity(p.flatten(2), w.flatten(2), -1).mean() for p, w in pairs]).mean()


def distribution_loss(maps: Sequence[Tensor], wanted: Sequence[Tensor], form: Form = "cosine") -> Tensor:
    """L_D of each layer's maps [B, H, T, S] against the teacher's; 0 for equal ones, but for `published`."""
    mean = mean_cosine(maps, wanted)
    if form == "cosine":
        return 1 - mean
    return -torch.log(mean) if form == "log" else torch.log(mean)
