"""How much attention tokens pay to the sink, the first real key: in trained decoders most of the mass goes there.

    importance[t] = mean over heads of P[h, t, sink],   P = softmax of the logits over the keys that t sees

It is causal, and a sequence's own: neither later tokens nor other sequences of a batch have a part in it. Published code ranks
the tokens of a window by logits summed over heads and averaged over the batch, which can be neither decoded nor compared across
lengths (EdgeQAT, Shen et al., 2024). The mass shrinks as contexts grow: thresholds on it are for a length.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 256  # rows of the attention matrix that are in memory at a time


def importance(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """float32 [B, T] in [0, 1], infinite for a token that sees one key only (the sink itself), 0 for one that sees none.

    query [B, H, T, D], key [B, Hkv, S, D]; visible bool [B or 1, 1, T, S]. The sink is the first key that any query sees.
    """
    batch, heads, tokens, dim = query.shape
    kv, keys = key.shape[1], key.float().transpose(2, 3)
    sink = visible.any(2).int().argmax(-1).expand(batch, 1).view(batch, 1, 1, 1)
    found = []
    for start in range(0, tokens, QUERIES):
        rows, seen = query[:, :, start : start + QUERIES].float(), visible[:, :, start : start + QUERIES]
        count = rows.shape[2]
        scores = (rows.reshape(batch, kv, -1, dim) @ keys).view(batch, heads, count, -1) * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        logit = scores.gather(3, sink.expand(batch, heads, count, 1)).squeeze(3)
        mass = torch.exp(logit - scores.logsumexp(3)).nan_to_num(0.0).mean(1)
        found.append(mass.masked_fill(seen.sum(-1).squeeze(1) == 1, torch.inf))
    return torch.cat(found, 1)


def threshold(importances: Tensor, share: float) -> float:
    """The least importance of the `share` of tokens that is to count as important; any shape.

    2, which no mean of probabilities reaches, for none: then only tokens of infinite importance do.
    """
    flat = importances.flatten()
    count = round(share * flat.numel())
    if count == 0:
        return 2.0
    return min(float(flat.topk(count).values[-1]), 2.0) if count < flat.numel() else 0.0
