"""smooth: both formulas to the letter, the identity, and on a real block an unmoved output with every refusal reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.folds import BlockView
from quant.kernels.activations.int4_group import Int4Group
from quant.kernels.formats.int_group import IntGroup
from quant.passes.smooth import (
    Pass,
    balance_factors,
    learned_factors,
    migration_factors,
    percentile_factors,
    served_error,
    served_output,
)
from quant.stats import InputStats


@pytest.mark.parametrize(("channels", "rank"), [(4096, 21), (11008, 56), (64, 1), (100, 2)])
def test_percentile_level_is_the_kth_largest(channels: int, rank: int) -> None:
    """k = floor(0.005 C + 1.5); outliers come down to the level exactly, nothing else is touched."""
    absmax = torch.rand(channels, generator=torch.Generator().manual_seed(0)) ** 4 * 30
    level = absmax.sort(descending=True).values[rank - 1]
    r = percentile_factors(absmax)
    assert (r >= 1).all()
    assert int((r > 1).sum()) == rank - 1
    assert (absmax / r).max() == pytest.approx(float(level), rel=1e-6)
    assert torch.equal(r[absmax <= level], torch.ones(channels - rank + 1))


def test_quiet_layers_are_left_alone() -> None:
    absmax = torch.full((400,), 5e-5)
    absmax[0] = 100
    assert torch.equal(percentile_factors(absmax), torch.ones(400))
    assert percentile_factors(absmax * 3)[0] > 1
    assert torch.equal(percentile_factors(torch.zeros(400)), torch.ones(400))


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_migration_is_equation_4(strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    absmax, columns = torch.rand(50, generator=generator) * 20, torch.rand(50, generator=generator) * 0.2
    absmax[4] = columns[9] = 0
    r = migration_factors(absmax, columns, strength)
    for j in range(50):
        wanted = 1.0 if j in (4, 9) else float(absmax[j]) ** strength / float(columns[j]) ** (1 - strength)
        assert float(r[j]) == pytest.approx(wanted, rel=1e-5), j
    live = (absmax > 0) & (columns > 0)
    if strength == 0.5:  # half way: inputs and columns end up equally large
        assert torch.allclose((absmax / r)[live], (columns * r)[live])


def test_smoothing_is_the_identity_on_the_product() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(30, 400, dtype=torch.float64), torch.randn(9, 400, dtype=torch.float64)
    x[:, 5] *= 80
    for r in (percentile_factors(x.abs().amax(0)), migration_factors(x.abs().amax(0), w.abs().amax(0), 0.5)):
        assert r.max() > 1
        assert torch.allclose((x / r) @ (w * r).T, x @ w.T)


def uneven() -> tuple[InputStats, Tensor, Tensor]:
    """Statistics, tokens [T, 256] and a weight [N, 256] whose channels differ by factors of e, and not alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 256, generator=generator) * torch.randn(256, generator=generator).exp()
    w = torch.randn(60, 256, generator=generator) * torch.randn(256, generator=generator).exp()
    return InputStats(x.T @ x, tokens=len(x)), x, w


@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_balance_is_least_for_blocks_of_any_size(size: int) -> None:
    """A block loses (sum x_j^2 / r_j^2) (sum w_j^2 r_j^2), at its bound (sum |x_j| |w_j|)^2 here: no other r is below."""
    stats, x, w = uneven()
    power, columns = x.double().square().sum(0), w.double().square().sum(0)

    def loss(r: Tensor) -> Tensor:
        return ((power / r**2).view(-1, size).sum(1) * (columns * r**2).view(-1, size).sum(1)).sum()

    r = balance_factors(stats, [w]).double()
    bound = (power * columns).sqrt().view(-1, size).sum(1).square().sum()
    assert float(loss(r) / bound) == pytest.approx(1, rel=1e-5)
    if size > 1:
        assert float(loss(torch.ones_like(r)) / bound) > 2
    assert float(r.log().mean()) == pytest.approx(0, abs=1e-5)
    weights = [torch.cat([w, torch.zeros(3, 256)]), 100 * w]  # a reader's size does not matter, nor what is zero
    assert torch.allclose(balance_factors(stats, weights).double(), r, rtol=1e-4)


def test_balance_serves_rotated_4_bit_inputs_better_and_leaves_silent_channels_alone() -> None:
    stats, x, w = uneven()
    rule, fmt = Int4Group(rotate=64), IntGroup(bits=4, group=64)
    r = balance_factors(stats, [w])
    lost = [float((served_output(x / s, w * s, fmt, rule) - x @ w.T).norm()) for s in (torch.ones_like(r), r)]
    assert lost[1] < 0.8 * lost[0]
    x[:, 4] = w[:, 9] = 0
    r = balance_factors(InputStats(x.T @ x, tokens=len(x)), [w])
    assert r.isfinite().all()
    assert r[4] == r[9] == 1
    assert torch.equal(balance_factors(InputStats(torch.zeros(256, 256)), [w]), torch.ones(256))


@pytest.mark.parametrize(
    "options",
    [{"top": 0.03}, {"method": "migrate"}, {"method": "migrate", "strength": 0.8}, {"method": "balance"}, {"method": "search"}],
)
def test_a_llama_block_computes_what_it_did(options: dict[str, Any], view: Callable[[], BlockView]) -> None:
    block = view()
    before = block.run()
    loudest = [float(group.stats.absmax.max()) for group in block.groups]
    assert Pass(**options).apply(block) == {}
    assert float((block.run() - before).norm() / before.norm()) < 1e-5
    changed = {name.removeprefix("model.layers.0.") for name in block.changed}
    assert {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    } <= changed
    assert {"self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.gate_proj.weight"} <= changed
    for at in (0, 2):  # the outlier channels of both norms
        assert float(block.groups[at].stats.absmax.max()) < 0.5 * loudest[at]


def test_migration_looks_at_the_largest_reader(view: Callable[[], BlockView]) -> None:
    block = view()
    group = block.groups[0]
    block.linear(group.names[2]).weight[:, 5] *= 100
    loud = block.linear(group.names[2]).weight[:, 5].abs().max()
    assert float(Pass(method="migrate").factors(block, group)[5]) == pytest.approx(float(group.stats.absmax[5] / loud) ** 0.5)


def test_only_and_skip_choose_the_readers(view: Callable[[], BlockView]) -> None:
    for options, touched in (
        ({"only": ["down_proj"]}, {"mlp.up_proj.weight", "mlp.down_proj.weight"}),
        ({"skip": ["q_proj", "gate_proj", "o_proj"]}, {"mlp.up_proj.weight", "mlp.down_proj.weight"}),
        ({"only": ["q_proj", "down_proj"], "skip": ["q_proj"]}, {"mlp.up_proj.weight", "mlp.down_proj.weight"}),
        ({"only": ["nothing"]}, set()),
    ):
        block = view()
        assert Pass(**options).apply(block) == {}
        assert {name.removeprefix("model.layers.0.") for name in block.changed} == touched, options


def test_a_fold_that_would_move_the_output_is_reported_and_the_rest_done(view: Callable[[], BlockView]) -> None:
    """Here the norm's output also goes where no target reads it."""
    block = view()
    inner = block.module("model.layers.0.mlp")
    plain = type(inner).forward
    inner.forward = lambda x: plain(inner, x) + x
    block.__dict__.pop("reference", None)
    before = block.run()
    refused = Pass(top=0.03).apply(block)
    assert list(refused) == ["model.layers.0.mlp.gate_proj"]
    assert "changes the block's output" in refused["model.layers.0.mlp.gate_proj"]
    assert float((block.run() - before).norm() / before.norm()) < 1e-5
    assert "model.layers.0.post_attention_layernorm.weight" not in block.changed
    assert "model.layers.0.input_layernorm.weight" in block.changed


def test_the_search_serves_best_and_its_error_is_that_of_the_served_layers(view: Callable[[], BlockView]) -> None:
    block = view()
    for group in block.groups[:1]:
        x, ones = torch.cat(group.stats.rows), torch.ones_like(group.stats.absmax)
        chosen = served_error(block, group)(Pass(method="search").factors(block, group))
        for other in (ones, *(Pass(method="migrate", strength=s).factors(block, group) for s in (0.2, 0.5, 0.8))):
            assert chosen <= served_error(block, group)(other)
        assert chosen < 0.5 * served_error(block, group)(ones)  # the norm has an outlier channel
        total = 0.0
        for name in group.names:
            w = block.linear(name).weight
            ws, xs = w.abs().amax(1, keepdim=True) / 127, x.abs().amax(1, keepdim=True) / 127
            y = (torch.round(x / xs) * xs) @ (torch.round(w / ws) * ws).T
            total += float((y - x @ w.T).norm() ** 2 / (x @ w.T).norm() ** 2)
        assert served_error(block, group)(ones) == pytest.approx(total, rel=0.02)


def test_learning_serves_better_than_the_search_it_starts_from(view: Callable[[], BlockView]) -> None:
    block = view()
    for group in block.groups:
        searched, learned = (
            served_error(block, group)(Pass(method=method).factors(block, group)) for method in ("search", "learn")
        )
        assert learned <= searched
    group = block.groups[0]
    ones = torch.ones_like(group.stats.absmax)
    assert served_error(block, group)(learned_factors(block, group, ones)) < 0.5 * served_error(block, group)(ones)
