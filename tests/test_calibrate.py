"""Calibration: chains are the model itself run block by block, statistics are sums over real tokens only."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Recorder, Sample, advance, capture, catch, recapture
from quant.folds import InputGroup
from quant.kernels.activations.int_static import IntStatic
from quant.stacks import Stack, find_stacks
from quant.stats import GRAM_BLOCK, InputStats


def copied(chain: Chain) -> Chain:
    return Chain(list(chain.hidden), chain.calls)


def gram(x: Tensor) -> Tensor:
    rows = x.double().reshape(-1, x.shape[-1])
    return rows.T @ rows


def close(given: Tensor, wanted: Tensor) -> bool:
    return float((given.double() - wanted.double()).norm()) <= 1e-5 * float(wanted.double().norm())


class Small(nn.Module):
    """norm -> (a, b), a copy of it -> c; `never` is not called. Hidden states may be longer than the data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.a, self.b, self.c, self.never = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        seen = self.norm(x)
        return x + self.a(seen) * self.b(seen) + self.c(seen.clone()), None


def small_capture(targets: str, hidden: list[Tensor], shifted: list[Tensor], samples: list[Sample]) -> list[InputGroup]:
    calls: list[Any] = [((), {})] * len(hidden)
    torch.manual_seed(0)
    return capture(
        "blocks.0",
        Small(),
        [f"blocks.0.{t}" for t in targets.split()],
        Chain(list(hidden), calls),
        Chain(list(shifted), calls),
        samples,
    )


@pytest.fixture(scope="module")
def model(tiny: ModuleType) -> Any:
    return tiny.llama(layers=2).float().requires_grad_(False)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    torch.manual_seed(1)
    return [Sample({"input_ids": torch.randint(0, 320, (batch, 24))}) for batch in (1, 2, 1)]


def test_the_float_chain_is_the_model(model: Any, samples: list[Sample]) -> None:
    (stack,) = find_stacks(model)
    chain = catch(model, [stack], 0, samples, [])
    wanted = [model(**s.inputs, output_hidden_states=True) for s in samples]
    for at, name in enumerate(stack.blocks):
        for hidden, out in zip(chain.hidden, wanted, strict=True):
            assert close(hidden, out.hidden_states[at])
        block = model.get_submodule(name)
        targets = [f"{name}.{n}" for n, m in block.named_modules() if isinstance(m, nn.Linear)]
        before = copied(chain)
        capture(name, block, targets, chain, before, samples)
        advance(block, before)
        assert all(torch.equal(a, b) for a, b in zip(chain.hidden, before.hidden, strict=True))
    for hidden, out in zip(chain.hidden, wanted, strict=True):
        assert close(model.lm_head(model.model.norm(hidden)), out.logits)


def test_catching_leaves_the_model_as_it_was(model: Any, samples: list[Sample]) -> None:
    before = model(**samples[0].inputs).logits
    (stack,) = find_stacks(model)
    catch(model, [stack], 0, samples, [])
    assert torch.equal(model(**samples[0].inputs).logits, before)
    assert all("forward" not in vars(module) for module in model.modules())
    with pytest.raises(IndexError):
        catch(model, [stack], 0, [Sample({"input_ids": torch.tensor([[10**6]])})], [])
    assert all("forward" not in vars(module) for module in model.modules())


def test_groups_and_statistics_of_a_llama_block(model: Any, samples: list[Sample]) -> None:
    (stack,) = find_stacks(model)
    float_chain = catch(model, [stack], 0, samples, [])
    quant_chain = copied(float_chain)
    torch.manual_seed(2)
    quant_chain.hidden = [h + 0.1 * torch.randn_like(h) for h in quant_chain.hidden]
    name, block = stack.blocks[0], model.get_submodule(stack.blocks[0])
    wanted: dict[str, list[Tensor]] = {}
    targets = [f"{name}.{n}" for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    inside = [t.removeprefix(f"{name}.") for t in targets]
    hooks = [
        block.get_submodule(leaf).register_forward_pre_hook(
            lambda m, args, leaf=leaf: wanted.setdefault(leaf, []).append(args[0])
        )
        for leaf in inside
    ]
    with torch.no_grad():
        for chain in (quant_chain, float_chain):
            for i in range(3):
                chain.run(block, i)
    for hook in hooks:
        hook.remove()
    groups = capture(name, block, targets, float_chain, quant_chain, samples)
    leaves = [[n.removeprefix(f"{name}.") for n in group.names] for group in groups]
    assert leaves == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert [g.maker for g in groups] == [f"{name}.input_layernorm", None, f"{name}.post_attention_layernorm", None]
    for group, (leaf, *_) in zip(groups, leaves, strict=True):
        rows = [x.reshape(-1, x.shape[-1]) for x in wanted[leaf]]
        x, x_float = torch.cat(rows[:3]), torch.cat(rows[3:])
        assert close(group.stats.gram, gram(x)), leaf
        assert close(group.stats.drift, (x_float - x).double().T @ x.double()), leaf
        assert torch.equal(group.stats.absmax, x.abs().amax(0)), leaf
        assert group.stats.tokens == 4 * 24
        assert len(group.stats.sample_absmax) == 4


def test_a_copy_of_a_tensor_is_another_input() -> None:
    hidden = [torch.randn(2, 5, 6)]
    groups = small_capture("a b c", hidden, hidden, [Sample({})])
    assert [(g.names, g.maker) for g in groups] == [
        (["blocks.0.a", "blocks.0.b"], "blocks.0.norm"),
        (["blocks.0.c"], None),
    ]


def test_hooks_are_gone_when_recording_ends_also_after_an_error() -> None:
    block = Small()
    recorder = Recorder("blocks.0", block, ["blocks.0.a"])
    assert any(m._forward_pre_hooks for m in block.modules())
    recorder.close()
    calls: list[Any] = [((), {})]
    wrong = Chain([torch.randn(1, 5, 7)], calls)
    with pytest.raises(RuntimeError):
        capture("blocks.0", block, ["blocks.0.a"], wrong, wrong, [Sample({})])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


@pytest.mark.parametrize("k", [5, GRAM_BLOCK, GRAM_BLOCK + 17, 2 * GRAM_BLOCK + 1])
def test_sums_are_those_of_real_tokens_in_float64(k: int) -> None:
    """Padding holds huge values and must not leave a trace."""
    torch.manual_seed(k)
    stats, kept, kept_float = InputStats.empty(k, torch.device("cpu"), drift=True), [], []
    for lengths in ([7, 3], [9, 0], [10, 10]):
        x, x_float = torch.randn(2, 10, k), torch.randn(2, 10, k)
        mask = torch.arange(10) < torch.tensor(lengths).unsqueeze(1)
        x[~mask], x_float[~mask] = 1e9, -1e9
        stats.add(x, x_float, mask)
        kept.append(x[mask])
        kept_float.append(x_float[mask])
    stats.finish()
    x, x_float = torch.cat(kept), torch.cat(kept_float)
    assert stats.tokens == len(x) == 39
    assert close(stats.gram, gram(x))
    assert torch.equal(stats.gram, stats.gram.T)
    assert close(stats.drift, (x_float - x).double().T @ x.double())
    assert torch.equal(stats.absmax, x.abs().amax(0))
    assert len(stats.sample_absmax) == 5  # a sequence without tokens is none
    assert torch.equal(stats.channel_quantile(0.0), torch.stack(stats.sample_absmax).amin(0))
    assert stats.token_quantile(1.0) == float(x.abs().max())
    stats.require_finite(["a"])
    kept_rows = torch.cat(stats.rows)
    assert len(kept_rows) == 7 + 3 + 5 + 5 + 5  # at most eight of a sequence, evenly spread
    assert all((x == row).all(1).any() for row in kept_rows)
    assert all(rows.untyped_storage().nbytes() == rows.nbytes for rows in stats.rows)  # and nothing but those tokens


def test_masks_are_found_by_length() -> None:
    """A mask is for sequences of its length (encoder frames) and leaves others (decoder tokens) alone."""
    torch.manual_seed(3)
    x = torch.randn(2, 5, 6)
    loud = x.clone()
    loud[1, 3:] = 1e6
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    (masked,) = small_capture("a", [loud], [loud], [Sample({}, {5: mask})])
    (other,) = small_capture("a", [loud], [loud], [Sample({}, {7: torch.zeros(2, 7, dtype=torch.bool)})])
    assert masked.stats.tokens == 8
    assert other.stats.tokens == 10
    normed = nn.functional.layer_norm(x, (6,))
    assert close(masked.stats.gram, gram(normed[mask]))


@pytest.mark.parametrize("shifted", [False, True])
def test_following_a_fold_divides_and_shifts_channels(shifted: bool) -> None:
    x, x_float, r = torch.randn(1, 8, 8), torch.randn(1, 8, 8), torch.rand(8) + 0.5
    shift = torch.randn(8) if shifted else None
    stats, wanted = InputStats.empty(8, torch.device("cpu"), drift=True), InputStats.empty(8, torch.device("cpu"), drift=True)
    stats.add(x, x_float, None)
    stats.finish()
    stats.follow(r, shift)
    moved = torch.zeros(8) if shift is None else shift
    wanted.add(x / r - moved, x_float / r - moved, None)
    wanted.finish()
    assert close(stats.gram, wanted.gram)
    assert close(stats.drift, wanted.drift)
    assert close(stats.total, wanted.total)
    assert torch.allclose(stats.drift_total, wanted.drift_total, atol=1e-5)
    assert torch.allclose(stats.absmax, wanted.absmax)
    assert torch.allclose(torch.cat(stats.rows), torch.cat(wanted.rows), atol=1e-6)
    assert torch.allclose(torch.cat(stats.rows) * stats.divided + stats.offset, x[0], atol=1e-5)


def test_rounded_inputs_are_what_is_summed_in_a_second_capture() -> None:
    """Of a linear that reads the block's input: the Gram matrix of its codes, and the drift from them."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    x, rule = torch.randn(2, 5, 8), IntStatic(bits=4, rotate=4)
    turned = rule.rotated(x)
    fields = rule.fit(turned, turned)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    stats = recapture("b", block, {"b.0": (rule, fields)}, Chain([x], [((), {})]), [Sample({}, {5: mask})])["b.0"]
    seen = rule.quantize(turned, fields)[mask]
    assert close(stats.gram, gram(seen))
    assert close(stats.drift, (turned[mask] - seen).T @ seen)
    assert stats.inputs is fields
    assert stats.tokens == 8


def test_a_linear_that_is_never_reached_is_named() -> None:
    hidden = [torch.randn(1, 5, 6)]
    with pytest.raises(ValueError, match=r"^blocks.0.never received no calibration data; leave it in float.*skip: true"):
        small_capture("a never", hidden, hidden, [Sample({})])
    with pytest.raises(ValueError, match=r"^blocks.0.a received no calibration data"):
        small_capture("a", hidden, hidden, [Sample({}, {5: torch.zeros(1, 5, dtype=torch.bool)})])


@pytest.mark.parametrize("chain", [0, 1])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_the_layer(poison: float, chain: int) -> None:
    good, bad = torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    bad[0, 2, 3] = poison
    hidden = [good, bad] if chain else [bad, good]
    with pytest.raises(ValueError, match=r"calibration inputs of blocks.0.a hold a NaN or an infinity"):
        small_capture("a b", [hidden[0]], [hidden[1]], [Sample({})])


def test_a_stack_that_never_runs_is_named(model: Any, samples: list[Sample]) -> None:
    model.spare = nn.ModuleList([nn.Linear(4, 4)])
    try:
        with pytest.raises(ValueError, match=r"never ran spare.0 on the calibration data"):
            catch(model, [Stack("spare", ("spare.0",))], 0, samples, [])
    finally:
        del model.spare


def test_the_decoder_hears_the_encoder_of_its_own_chain(tiny: ModuleType, tmp_path: Path) -> None:
    """Whisper: the float decoder chain is the model; the quantized one reads the quantized encoder's last block."""
    from transformers import WhisperForConditionalGeneration

    model: Any = WhisperForConditionalGeneration.from_pretrained(tiny.whisper_folder(tmp_path)).eval().requires_grad_(False)
    torch.manual_seed(0)
    samples = [
        Sample(
            {"input_features": torch.randn(1, 80, 200), "decoder_input_ids": torch.randint(3, 320, (1, n))},
            {100: torch.arange(100).unsqueeze(0) < 60},
        )
        for n in (5, 9)
    ]
    stacks = find_stacks(model)
    encoder = catch(model, stacks, 0, samples, [])
    for name in stacks[0].blocks:
        advance(model.get_submodule(name), encoder)
    noisy = [h + torch.randn_like(h) for h in encoder.hidden]
    float_chain = catch(model, stacks, 1, samples, [encoder.hidden])
    quant_chain = catch(model, stacks, 1, samples, [noisy])

    name = stacks[1].blocks[0]
    block = model.get_submodule(name)
    cross = [f"{name}.encoder_attn.{leaf}_proj" for leaf in ("k", "v")]
    (group,) = capture(name, block, cross, float_chain, quant_chain, samples)
    norm = model.model.encoder.layer_norm
    heard = torch.cat([norm(h)[0, :60] for h in noisy])
    heard_float = torch.cat([norm(h)[0, :60] for h in encoder.hidden])
    assert group.names == cross
    assert group.maker is None  # the norm is outside the block
    assert group.stats.tokens == 120
    assert close(group.stats.gram, gram(heard))
    assert close(group.stats.drift, (heard_float - heard).double().T @ heard.double())

    for name in stacks[1].blocks[1:]:
        advance(model.get_submodule(name), float_chain)
    for hidden, sample in zip(float_chain.hidden, samples, strict=True):
        assert close(model.proj_out(model.model.decoder.layer_norm(hidden)), model(**sample.inputs).logits)
