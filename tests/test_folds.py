"""Folds: outputs stay, statistics follow, and a fold that would move the output leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Sample, capture, catch
from quant.folds import BlockView, share_over_heads
from quant.stacks import find_stacks

Open = Callable[..., BlockView]


def view_of(name: str, block: nn.Module, chain: Chain, dtype: torch.dtype = torch.float32) -> BlockView:
    """A view of a float32 block with the statistics of its own inputs."""
    targets = [f"{name}.{leaf}" for leaf, m in block.named_modules() if isinstance(m, nn.Linear)]
    samples = [Sample({}) for _ in chain.hidden]
    groups = capture(name, block, targets, Chain(list(chain.hidden), chain.calls), chain, samples)
    return BlockView(name, block, groups, lambda: chain.run(block, 0), lambda param: dtype, {})


@pytest.fixture
def llama_block(tiny: ModuleType) -> Open:
    """(dtype of the checkpoint) -> a view of a Llama block with 4 query heads on 2 key-value heads."""

    def make(dtype: torch.dtype = torch.float32) -> BlockView:
        model: Any = tiny.llama(layers=1).float().requires_grad_(False)
        for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
            norm.weight.data = (torch.rand(64) + 0.5).to(dtype).float()
        stacks = find_stacks(model)
        chain = catch(model, stacks, 0, [Sample({"input_ids": torch.randint(0, 320, (2, 20))})], [])
        return view_of("model.layers.0", model.model.layers[0], chain, dtype)

    return make


def parameters(view: BlockView) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in view.block.named_parameters()}


def moved(view: BlockView, before: Tensor) -> float:
    return float((view.run() - before).norm() / before.norm())


def test_a_fold_into_a_norm_keeps_the_output_and_moves_the_channels(llama_block: Open) -> None:
    view = llama_block()
    before, old, r = view.run(), parameters(view), torch.rand(64) * 3 + 0.2
    group = view.groups[0]
    gram, drift, absmax = group.stats.gram.clone(), group.stats.drift.clone(), group.stats.absmax
    assert view.fold(group, r) is None
    assert moved(view, before) < 1e-5
    new = parameters(view)
    assert torch.allclose(new["input_layernorm.weight"], old["input_layernorm.weight"] / r)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        assert torch.allclose(new[f"self_attn.{leaf}.weight"], old[f"self_attn.{leaf}.weight"] * r)
    changed = {f"model.layers.0.{name}" for name in old if not torch.equal(old[name], new[name])}
    assert view.changed == changed
    assert len(changed) == 4
    assert torch.allclose(group.stats.absmax, absmax / r)
    assert torch.allclose(group.stats.gram, gram / r.outer(r))
    assert torch.allclose(group.stats.drift, drift / r.outer(r))


def test_statistics_after_a_fold_are_those_of_the_folded_block(llama_block: Open) -> None:
    view = llama_block()
    for group in view.groups:
        assert view.fold(group, torch.rand(group.stats.gram.shape[0]) + 0.5) is None
    again = {}
    hooks = [
        view.linear(g.names[0]).register_forward_pre_hook(lambda m, args, key=g.names[0]: again.setdefault(key, args[0]))
        for g in view.groups
    ]
    view.run()
    for hook in hooks:
        hook.remove()
    for group in view.groups:
        x = again[group.names[0]].reshape(-1, group.stats.gram.shape[0])
        assert torch.allclose(group.stats.gram, x.T @ x, rtol=1e-3, atol=1e-4 * float(group.stats.gram.diagonal().max()))


def test_a_norm_takes_the_rounding_of_its_checkpoint_and_the_readers_undo_it(llama_block: Open) -> None:
    view = llama_block(torch.bfloat16)
    before, r = view.run(), torch.rand(64) * 3 + 0.2
    for group in (view.groups[0], view.groups[2]):
        assert view.fold(group, r) is None
    for name in ("input_layernorm", "post_attention_layernorm"):
        weight = view.module(f"model.layers.0.{name}").weight
        assert torch.equal(weight, weight.to(torch.bfloat16).float())
    assert moved(view, before) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_shift_goes_into_the_norm_and_out_of_the_readers(dtype: torch.dtype) -> None:
    """Whatever dtype the norm is stored in: its rounding is what the readers undo."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 24)).requires_grad_(False)
    block[0].bias.data = torch.randn(32).to(dtype).float()
    chain = Chain([torch.randn(1, 40, 32)], [((), {})])
    view = view_of("block", block, chain, dtype)
    before, r, shift = view.run(), torch.rand(32) + 0.5, 3 * torch.randn(32)
    old = parameters(view)
    assert view.fold(view.groups[0], r, shift) is None
    assert moved(view, before) < 1e-5
    new = parameters(view)
    assert torch.allclose(new["0.bias"], old["0.bias"] / r - shift, rtol=1e-2, atol=2e-2)
    assert torch.equal(new["0.bias"], new["0.bias"].to(dtype).float())
    assert view.changed == {"block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"}
    stats, again = view.groups[0].stats, view_of("block", block, chain, dtype).groups[0].stats
    assert float((stats.gram - again.gram).norm() / again.gram.norm()) < 1e-5
    assert torch.allclose(stats.total, again.total, rtol=1e-3, atol=1e-2)
    assert torch.allclose(torch.cat(stats.rows), torch.cat(again.rows), atol=1e-4)


def test_a_shift_without_a_bias_to_take_it_is_refused(llama_block: Open) -> None:
    view = llama_block()
    before = parameters(view)
    assert "input_layernorm has no bias" in str(view.fold(view.groups[0], torch.ones(64), torch.ones(64)))
    assert all(torch.equal(value, before[name]) for name, value in parameters(view).items())
    assert view.changed == set()


def test_query_heads_that_share_a_value_head_share_a_factor(llama_block: Open) -> None:
    view = llama_block()
    before, old, r = view.run(), parameters(view), torch.rand(64) * 3 + 0.2
    group = view.groups[1]
    assert group.names == ["model.layers.0.self_attn.o_proj"]
    assert view.maker_of(group) == "model.layers.0.self_attn.v_proj"
    assert view.fold(group, r) is None
    assert moved(view, before) < 1e-5
    new = parameters(view)
    columns = (new["self_attn.o_proj.weight"] / old["self_attn.o_proj.weight"]).median(0).values.view(2, 2, 16)
    assert torch.allclose(columns, r.view(2, 2, 16).amax(1, keepdim=True).expand(2, 2, 16))
    rows = (old["self_attn.v_proj.weight"] / new["self_attn.v_proj.weight"]).median(1).values
    assert torch.allclose(rows.view(2, 16), columns[:, 0])


def test_share_over_heads() -> None:
    r = torch.arange(12.0)
    at_maker, at_reader = share_over_heads(r, 4, SimpleNamespace(head_dim=2))  # 6 query heads of 2 channels on 2 value heads
    assert at_maker.tolist() == [4, 5, 10, 11]
    assert at_reader.tolist() == [4, 5, 4, 5, 4, 5, 10, 11, 10, 11, 10, 11]
    same, also = share_over_heads(r, 12, SimpleNamespace())
    assert torch.equal(same, r)
    assert torch.equal(also, r)
    assert share_over_heads(r, 4, SimpleNamespace()) is None
    assert share_over_heads(r, 5, SimpleNamespace(head_dim=1)) is None
    assert share_over_heads(r, 4, SimpleNamespace(head_dim=3)) is None


class Leaky(nn.Module):
    """A block whose norm is read by a linear and by the residual, and whose up_proj is clipped before down_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q_proj = nn.LayerNorm(8), nn.Linear(8, 8)
        self.up_proj, self.down_proj, self.lonely = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        y = seen + self.q_proj(seen)
        y = y + self.down_proj(self.up_proj(y).clamp(-0.2, 0.2))
        return y + self.lonely(y.tanh())


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        ("q_proj", "it changes the block's output by"),
        ("down_proj", "it changes the block's output by"),
        ("lonely", "no norm or linear"),
    ],
)
def test_a_fold_that_is_not_legal_is_undone(leaf: str, reason: str) -> None:
    torch.manual_seed(0)
    block = Leaky().requires_grad_(False)
    view = view_of("b.0", block, Chain([torch.randn(1, 9, 8)], [((), {})]))
    (group,) = (g for g in view.groups if g.names == [f"b.0.{leaf}"])
    old, gram = parameters(view), group.stats.gram.clone()
    assert reason in str(view.fold(group, torch.rand(8) * 3 + 0.5))
    new = parameters(view)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not view.changed
    assert torch.equal(group.stats.gram, gram)


def test_factors_that_are_not_numbers_are_undone(llama_block: Open) -> None:
    view = llama_block()
    old, r = parameters(view), torch.ones(64)
    r[3] = float("nan")
    for group in (view.groups[0], view.groups[1]):
        assert "nan" in str(view.fold(group, r))
    assert all(torch.equal(old[name], value) for name, value in parameters(view).items())


def test_widths_that_do_not_fit_are_refused(llama_block: Open) -> None:
    view = llama_block()
    del view.module("model.layers.0.self_attn").head_dim
    assert view.fold(view.groups[1], torch.ones(64)) == "model.layers.0.self_attn.v_proj makes 32 channels, 64 are read"


def test_biases_of_the_maker_are_divided_too() -> None:
    torch.manual_seed(0)

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q_proj = nn.LayerNorm(8), nn.Linear(8, 8)
            self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.norm(x)
            return x + self.q_proj(seen) + self.out_proj(self.v_proj(seen))

    block = Biased().requires_grad_(False)
    block.norm.bias.data = torch.randn(8)
    view = view_of("b.0", block, Chain([torch.randn(1, 9, 8)], [((), {})]))
    before, old = view.run(), parameters(view)
    r = torch.rand(8) + 0.5
    assert [g.names for g in view.groups] == [["b.0.q_proj", "b.0.v_proj"], ["b.0.out_proj"]]
    for group in view.groups:
        assert view.fold(group, r) is None
    new = parameters(view)
    assert moved(view, before) < 1e-5
    assert torch.allclose(new["norm.bias"], old["norm.bias"] / r)
    assert torch.allclose(new["v_proj.bias"], old["v_proj.bias"] / r)
    assert torch.equal(new["out_proj.bias"], old["out_proj.bias"])
    assert torch.equal(new["q_proj.bias"], old["q_proj.bias"])
