"""EdgeQAT's losses: nothing for equal maps, the corrected sign pulls maps together, the published one apart."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quant.train.attention_losses import Form, distribution_loss, entropy_loss, mean_cosine

B, H, KV, T, D = 2, 4, 2, 12, 8


def logits(seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(B, H, T, T, generator=draw) for _ in range(3)]


def maps(given: list[Tensor]) -> list[Tensor]:
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    return [torch.softmax(x.masked_fill(~seen, -torch.inf), -1) for x in given]


def queries_and_keys() -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return (
        [torch.randn(B, H, T, D, generator=draw) * (i + 1) for i in range(3)],
        [torch.randn(B, KV, T, D, generator=draw) + i for i in range(3)],
    )


@pytest.mark.parametrize("form", ["cosine", "log"])
def test_equal_maps_cost_nothing_and_others_something(form: Form) -> None:
    one, other = maps(logits(0)), maps(logits(1))
    assert float(distribution_loss(one, one, form)) == pytest.approx(0, abs=1e-6)
    assert float(distribution_loss(one, other, form)) > 0.1


@pytest.mark.parametrize(("form", "nearer"), [("cosine", True), ("log", True), ("published", False)])
def test_one_step_moves_maps_together_but_apart_in_the_published_form(form: Form, nearer: bool) -> None:
    wanted = maps(logits(1))
    student = [x.requires_grad_() for x in logits(0)]
    loss = distribution_loss(maps(student), wanted, form)
    before = float(mean_cosine(maps(student), wanted).detach())
    grads = torch.autograd.grad(loss, student)
    after = float(mean_cosine(maps([x - 1e-2 / g.norm() * g for x, g in zip(student, grads, strict=True)]), wanted).detach())
    assert (after > before + 1e-5) is nearer
    assert (after < before - 1e-5) is not nearer


def test_entropy_is_that_of_the_formula_with_a_key_head_for_each_of_its_query_heads() -> None:
    queries, keys = queries_and_keys()
    terms = []
    for q, k in zip(queries, keys, strict=True):
        for b in range(B):
            for h in range(H):
                spread = q[b, h].double().var(correction=0) * k[b, h // (H // KV)].double().var(correction=0)
                terms.append(math.log(1 + float(spread)))
    assert float(entropy_loss(queries, keys)) == pytest.approx(-math.log(sum(terms) / len(terms)), rel=1e-5)


def test_entropy_falls_as_queries_grow() -> None:
    queries, keys = queries_and_keys()
    found = [float(entropy_loss([c * q for q in queries], keys)) for c in (0.5, 1.0, 1.1, 2.0, 10.0)]
    assert all(later < earlier - 1e-3 for earlier, later in pairwise(found))


def test_constant_queries_are_borne_only_where_others_vary() -> None:
    queries, keys = queries_and_keys()
    constant = torch.ones(B, H, T, D)
    assert math.isfinite(float(entropy_loss([constant, *queries[1:]], keys)))
    assert float(entropy_loss([constant] * 3, keys)) == math.inf
