"""Importance is the softmax mass on the first real key: as computed by the book, causal, and a sequence's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels import sinks
from quant.serve.attention import visible

B, H, KV, T, D = 3, 6, 2, 21, 8


def drawn() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return 2 * torch.randn(B, H, T, D, generator=draw), 2 * torch.randn(B, KV, T, D, generator=draw)


def by_the_book(query: Tensor, key: Tensor, first: int) -> Tensor:
    """float64 [T] of one sequence, H heads one by one."""
    out = torch.zeros(T, dtype=torch.float64)
    for t in range(first, T):
        for h in range(H):
            logits = (key[h // (H // KV), first : t + 1].double() @ query[h, t].double()) * D**-0.5
            out[t] += torch.softmax(logits, 0)[0] / H
    return out


@pytest.mark.parametrize("first", [[0, 0, 0], [0, 5, 20]])
def test_it_is_the_mass_on_the_first_real_key(first: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "QUERIES", 4)
    query, key = drawn()
    seen = visible(torch.tensor(first), T, T, query.device)
    found = sinks.importance(query, key, seen, D**-0.5)
    for b, start in enumerate(first):
        assert found[b, start] == torch.inf
        wanted = by_the_book(query[b], key[b], start)
        assert torch.allclose(found[b, start + 1 :].double(), wanted[start + 1 :], atol=1e-6)
        assert bool((found[b, :start] == 0).all())  # padding
    if not any(first):
        assert torch.equal(found, sinks.importance(query, key, visible(None, T, T, query.device), D**-0.5))


def test_one_token_with_a_cache_gets_what_it_got_in_the_whole() -> None:
    query, key = drawn()
    first = torch.tensor([0, 5, 13])
    whole = sinks.importance(query, key, visible(first, T, T, query.device), 1.0)
    for t in (14, T - 1):
        step = visible(first, 1, t + 1, query.device)
        assert torch.allclose(sinks.importance(query[:, :, t : t + 1], key[:, :, : t + 1], step, 1.0)[:, 0], whole[:, t])


def test_later_tokens_and_other_sequences_have_no_part_in_it() -> None:
    query, key = drawn()
    seen = visible(torch.zeros(B, dtype=torch.int64), T, T, query.device)
    before = sinks.importance(query, key, seen, 1.0)
    query[:, :, 12:], key[:, :, 12:] = 9.0, -7.0
    query[1:], key[1:] = query[1:] * 3, key[1:] * 2
    after = sinks.importance(query, key, seen, 1.0)
    assert torch.equal(after[0, :12], before[0, :12])
    assert not torch.allclose(after[0, 12:], before[0, 12:])


def test_a_static_cache_that_is_still_empty_counts_as_unseen() -> None:
    query, key = drawn()
    longer = torch.cat([key, torch.full((B, KV, 9, D), 50.0)], 2)
    found = sinks.importance(query, longer, visible(None, T, T + 9, query.device), 1.0)
    assert torch.equal(found, sinks.importance(query, key, visible(None, T, T, query.device), 1.0))


def test_a_threshold_is_reached_by_the_share_of_tokens() -> None:
    found = torch.rand(4, 25, generator=torch.Generator().manual_seed(2))
    found[:, 0] = torch.inf
    for share in (0.04, 0.3, 0.5, 0.97):
        assert int((found >= sinks.threshold(found, share)).sum()) == round(100 * share)
    assert int((found >= sinks.threshold(found, 0.0)).sum()) == 4  # sinks are kept
    assert bool((torch.zeros(3) >= sinks.threshold(found, 1.0)).all())
