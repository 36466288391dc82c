"""repquant: layer-wise codes are the channel-wise ones, the float output stays, clipping never loses, norms without bias."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from quant.calibrate import Chain, Sample, capture, catch
from quant.folds import BlockView
from quant.kernels.activation import Activation
from quant.kernels.activations.int_static import IntStatic, on_grid
from quant.kernels.activations.int_token import Int4Token
from quant.kernels.formats.int_group import IntGroup
from quant.passes.repquant import LARGEST_R, RATIOS, Pass, channel_grid, dual_clip, percentile_ends, to_layer
from quant.stacks import find_stacks

View = Callable[..., BlockView]


def view_of(name: str, block: nn.Module, chain: Chain, rule: Activation) -> BlockView:
    targets = [f"{name}.{leaf}" for leaf, m in block.named_modules() if isinstance(m, nn.Linear)]
    groups = capture(name, block, targets, None, chain, [Sample({}) for _ in chain.hidden], kept=Pass.rows)
    schemes = dict.fromkeys(targets, (IntGroup(group=32), rule))
    return BlockView(name, block, groups, lambda: chain.run(block, 0), lambda param: torch.float32, schemes)


@pytest.fixture
def speech() -> View:
    """(rule) -> a Whisper encoder block whose norms have channels of very different size and place; k_proj got a bias."""

    def make(rule: Activation, bias: bool = True, samples: int = 4) -> BlockView:
        torch.manual_seed(0)
        config = WhisperConfig(d_model=64, encoder_attention_heads=2, encoder_ffn_dim=96)
        block: Any = WhisperEncoderLayer(config).eval().requires_grad_(False)
        for norm in (block.self_attn_layer_norm, block.final_layer_norm):
            norm.weight.data = torch.exp(0.8 * torch.randn(64))
            norm.bias.data = 2 * torch.randn(64)
        if bias:
            block.self_attn.k_proj.bias = nn.Parameter(torch.zeros(64), requires_grad=False)
        chain = Chain([torch.randn(1, 80, 64) for _ in range(samples)], [((None,), {})] * samples)
        return view_of("layers.0", block, chain, rule)

    return make


@pytest.fixture
def text(tiny: ModuleType) -> View:
    """(rule) -> a Llama block."""

    def make(rule: Activation) -> BlockView:
        model: Any = tiny.llama(layers=1).float().requires_grad_(False)
        model.model.layers[0].input_layernorm.weight.data = torch.exp(0.8 * torch.randn(64))
        samples = [Sample({"input_ids": torch.randint(0, 320, (1, 60))}) for _ in range(4)]
        chain = catch(model, find_stacks(model), 0, samples, [])
        return view_of("model.layers.0", model.model.layers[0], chain, rule)

    return make


def channels(seed: int = 0, tokens: int = 500, k: int = 48) -> Tensor:
    """Float64 norm outputs: sizes and places differ by channel, some channels never move."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    x = x * torch.exp(0.8 * torch.randn(k, generator=generator)) + torch.randn(k, generator=generator)
    x[:, 5], x[:, 6] = 0, 0.7
    return x


def layer_of(x: Tensor, levels: int) -> tuple[Tensor, ...]:
    """scale, zero, st, zt, r, z of x by percentiles."""
    low, high = percentile_ends(x, torch.ones(len(x), dtype=x.dtype), levels, False)
    scale, zero = channel_grid(low, high, levels, False)
    return scale, zero, *to_layer(scale, zero, (low + high) / 2, levels)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_layer_wise_codes_are_the_channel_wise_ones(bits: int) -> None:
    """clamp(round(X'/st) + zt) == clamp(round(X/s) + z), and what they stand for agrees after undoing the fold."""
    x, levels = channels(), 2**bits
    scale, _, st, zt, r, z = layer_of(x, levels)
    shift = (zt - z) * st
    assert zt == zt.round()
    moved = x / r - shift
    codes = (torch.round(moved / st) + zt).clamp(0, levels - 1)
    wanted = (torch.round(x / (r * st)) + z).clamp(0, levels - 1)
    assert float((codes != wanted).double().mean()) < 1e-4  # ties
    same = codes == wanted
    assert torch.allclose((((codes - zt) * st + shift) * r)[same], ((wanted - z) * r * st)[same], rtol=0, atol=1e-9)
    live = x.std(0) > 0
    assert torch.allclose((r * st)[live], scale[live])
    assert float(r[live].mean()) == pytest.approx(1, abs=1e-9)
    assert (r > 0).all()
    assert (codes[:, ~live] == zt).all()


def test_the_fold_is_exact_in_float64() -> None:
    x, w, bias = channels(), torch.randn(7, 48, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    _, _, st, zt, r, z = layer_of(x, 16)
    shift = (zt - z) * st
    got = (x / r - shift) @ (w * r).T + bias + (w * r) @ shift
    assert float((got - x @ w.T - bias).norm() / (x @ w.T).norm()) < 1e-12


def test_extreme_scales_are_held_and_their_range_stays_in_the_middle() -> None:
    scale = torch.tensor([1e-9, 1e-4, 1.0, 1.0, 1.0])
    zero = torch.tensor([0.0, 3e4, 7.0, 8.0, 9.0])
    _, _, r, z = to_layer(scale, zero, torch.tensor([0.0, -2.999, 0.5, 0.0, -0.5]), 16)
    assert r[0] == 1  # dead
    assert r[1] == 1 / LARGEST_R
    assert r.max() <= LARGEST_R
    st = scale[1:].mean()
    assert 0 <= float(torch.round(-2.999 / (r[1] * st)) + z[1]) <= 15
    everything_dead = to_layer(torch.full((3,), 1e-8), torch.zeros(3), torch.zeros(3), 16)
    assert all(part.isfinite().all() for part in everything_dead)


@pytest.mark.parametrize("symmetric", [False, True])
def test_dual_clipping_never_loses_and_keeps_the_ends_around_zero(symmetric: bool) -> None:
    x = channels().float()
    x[7, 3] = 40
    counts = torch.rand(500) + 0.5
    mixing = torch.randn(48, 20)
    weight = mixing @ mixing.T
    low, high = x.amin(0), x.amax(0)

    def loss(low: Tensor, high: Tensor) -> float:
        error = on_grid(x, *channel_grid(low, high, 16, symmetric), 16) - x
        return float(counts @ ((error @ weight) * error).sum(1))

    clipped = dual_clip(x, counts, weight, low, high, 16, symmetric)
    assert loss(*clipped) < 0.9 * loss(low, high)
    assert (clipped[0] >= low).all()
    assert (clipped[1] <= high).all()
    around = (low <= 0) & (high >= 0)
    assert (clipped[0][around] <= 0).all()
    assert (clipped[1][around] >= 0).all()
    assert RATIOS[0] == 1
    again = dual_clip(x, counts, torch.zeros_like(weight), low, high, 16, symmetric)  # nothing to gain
    assert torch.equal(again[0], low)
    assert torch.equal(again[1], high)


def read(view: BlockView, at: int) -> Tensor:
    """The input of a group on the first sample."""
    seen: list[Tensor] = []
    hook = view.linear(view.groups[at].names[0]).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    view.run()
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("clip", ["percentile", "dual"])
def test_a_layer_norm_takes_scale_and_shift_and_the_block_computes_what_it_did(clip: str, speech: View) -> None:
    rule = IntStatic(bits=4)
    view = speech(rule)
    before, raw = view.run(), [read(view, at) for at in range(4)]
    assert Pass(clip=clip).apply(view) == {}
    assert float((view.run() - before).norm() / before.norm()) < 1e-5
    errors = {}
    for at, x in enumerate(raw):
        stats, weight = view.groups[at].stats, torch.cat([view.linear(n).weight for n in view.groups[at].names])
        new = read(view, at)
        assert stats.inputs is not None
        assert stats.inputs["input_zero"].shape == (1,)
        errors[at] = float(((rule.quantize(new, stats.inputs) - new) @ weight.T).norm() / (x @ weight.T).norm())
    one = rule.fit(raw[0], raw[0])
    naive_weight = torch.cat([speech(rule).linear(n).weight for n in view.groups[0].names])
    naive = float(((rule.quantize(raw[0], one) - raw[0]) @ naive_weight.T).norm() / (raw[0] @ naive_weight.T).norm())
    assert errors[0] < 0.6 * naive
    assert {"layers.0.self_attn_layer_norm.bias", "layers.0.self_attn.k_proj.bias", "layers.0.fc1.bias"} <= view.changed
    assert "layers.0.fc2.weight" not in view.changed


def test_statistics_follow_the_fold(speech: View) -> None:
    view = speech(IntStatic(bits=4), samples=1)
    assert Pass().apply(view) == {}
    for at, group in enumerate(view.groups):
        x = read(view, at)
        assert float((group.stats.gram - x.T @ x).norm() / group.stats.gram.norm()) < 1e-4
        assert torch.allclose(torch.cat(group.stats.rows), x[:: -(-80 // Pass.rows)], rtol=1e-3, atol=1e-3)


def test_a_reader_without_bias_keeps_the_block_as_it_was_and_gets_one_grid(speech: View) -> None:
    view = speech(IntStatic(bits=4), bias=False)
    before = view.run()
    refused = Pass().apply(view)
    assert "k_proj has no bias" in refused["layers.0.self_attn.q_proj"]
    assert torch.equal(view.run(), before) or float((view.run() - before).norm() / before.norm()) < 1e-5
    assert "layers.0.self_attn_layer_norm.weight" not in view.changed
    assert view.groups[0].stats.inputs is not None


@pytest.mark.parametrize("zeros", ["layer", "channel"])
def test_a_norm_without_bias_takes_the_scale_alone(zeros: str, text: View) -> None:
    rule = IntStatic(bits=4, zeros=zeros)
    view = text(rule)
    before = view.run()
    assert Pass().apply(view) == {}
    assert float((view.run() - before).norm() / before.norm()) < 1e-5
    assert not any(name.endswith("bias") for name in view.changed)
    zero = view.groups[0].stats.inputs["input_zero"]
    if zeros == "layer":
        assert zero.tolist() == [8]  # symmetric
    else:
        assert zero.shape == (64,)
        assert zero.unique().numel() > 1


def test_rotated_and_mixed_inputs_are_reported_and_other_rules_let_alone(speech: View) -> None:
    refused = Pass().apply(speech(IntStatic(bits=4, rotate=32)))
    assert set(refused) == {"layers.0.self_attn.q_proj", "layers.0.fc1"}
    assert all("rotated" in reason for reason in refused.values())
    view = speech(Int4Token())
    assert Pass().apply(view) == {}
    assert all(group.stats.inputs is None for group in view.groups)
    assert not view.changed
    view = speech(IntStatic(bits=4))
    mixed = view.groups[0].names[-1]
    view.schemes[mixed] = (view.schemes[mixed][0], Int4Token())
    refused = Pass().apply(view)
    assert list(refused) == [view.groups[0].names[0]]
    assert "not by one int_static" in refused[view.groups[0].names[0]]
