"""Compiled generation: the eager text token for token, any prompt and batch, one compilation per kind of model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import quant
from quant.eval.same_text import SameText, count
from quant.kernels.cpu import library
from quant.runtime import artifact, compiled, refuses
from quant.runtime.decoder import TYPES, Decoder
from quant.runtime.session import memory

try:
    library.load()
except library.Unavailable as error:
    pytest.skip(f"nothing is compiled without the C++ kernels: {error}", allow_module_level=True)
if shutil.which("c++") is None and shutil.which("g++") is None:
    pytest.skip("compiling graphs needs a C++ compiler", allow_module_level=True)

GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of compiled graphs, this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("graphs")
        patch.setenv("LOWBIT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def both(packed: Callable[..., Path]) -> tuple[Any, Any]:
    """A bfloat16 model eager, and compiled."""
    folder = packed("dgq")
    return quant.load(folder, compile=False), quant.load(folder, compile=True)


@pytest.fixture(scope="module")
def both_wide(packed: Callable[..., Path]) -> tuple[Any, Any]:
    """The same in float32, where every other order of a sum shows."""
    eager, fast = (quant.load(packed("dgq"), dtype=torch.float32, compile=how) for how in (False, True))
    return eager, fast


def prompt(tokens: int, rows: int = 1) -> Tensor:
    return torch.randint(1, 320, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_the_text_is_the_eager_one(both: tuple[Any, Any], tokens: int) -> None:
    eager, fast = both
    ids = prompt(tokens)
    with torch.no_grad():
        assert torch.equal(fast.runtime.prefill(ids), eager(ids).logits[:, -1])
    assert torch.equal(eager.generate(ids, **GREEDY), fast.generate(ids, **GREEDY))


def test_every_logit_is_the_eager_one_in_float32(both_wide: tuple[Any, Any]) -> None:
    how = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    for tokens in (1, 9, 40):
        eager, fast = (model.generate(prompt(tokens), **how) for model in both_wide)
        assert torch.equal(eager.sequences, fast.sequences)
        assert torch.equal(torch.stack(eager.logits), torch.stack(fast.logits))


def test_texts_are_counted(both: tuple[Any, Any], both_wide: tuple[Any, Any]) -> None:
    def write(model: Any) -> tuple[Tensor, Tensor]:
        out = model.generate(prompt(7), **GREEDY, return_dict_in_generate=True, output_logits=True)
        return out.sequences[0, 7:], torch.cat(out.logits)

    assert count(*both, iter([write, write])) == SameText(texts=2, equal=2, first_differences=(), equal_logits=2)
    found = count(both[0], both_wide[0], iter([write]))
    assert (found.texts, found.equal_logits) == (1, 0)
    assert found.equal + len(found.first_differences) == 1


def test_fp4_weights_and_tokens(packed: Callable[..., Path]) -> None:
    """Rounding of the tokens is traced, the product is one direct call."""
    ids = prompt(7)
    eager, fast = (quant.load(packed("nvfp4-w4a4"), compile=how) for how in (False, True))
    with torch.no_grad():
        given, wanted = fast.runtime.prefill(ids).float(), eager(ids).logits[:, -1].float()
    assert (given - wanted).norm() < 0.05 * wanted.norm()  # a token's value between two codes may go either way
    assert fast.generate(ids, **GREEDY).shape == eager.generate(ids, **GREEDY).shape


def test_sampling_draws_what_eager_draws(both: tuple[Any, Any]) -> None:
    texts = []
    for model in both:
        torch.manual_seed(0)
        how = {"do_sample": True, "top_k": 9, "temperature": 0.7, "repetition_penalty": 1.1, "max_new_tokens": 24}
        texts.append(model.generate(prompt(5), **how))
    assert torch.equal(*texts)


def test_a_batch_padded_on_the_left(both: tuple[Any, Any]) -> None:
    ids, mask = prompt(9, rows=2), torch.ones(2, 9, dtype=torch.int64)
    ids[0, :4] = mask[0, :4] = 0
    eager, fast = (model.generate(ids, attention_mask=mask, **GREEDY) for model in both)
    assert torch.equal(eager, fast)
    alone = both[1].generate(ids[:1, 4:], **GREEDY)[0, 5:]
    assert torch.equal(fast[0, 9 : 9 + len(alone)], alone)


def test_what_is_returned_besides_ids(both: tuple[Any, Any]) -> None:
    how = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    eager, fast = (model.generate(prompt(7), **how) for model in both)
    for name in ("scores", "logits"):
        assert torch.equal(torch.stack(eager[name]), torch.stack(fast[name]))


def test_what_is_not_compiled_runs_eagerly_and_says_so(both: tuple[Any, Any]) -> None:
    eager, fast = both
    with pytest.warns(UserWarning, match="runs eagerly, not compiled: its mode is beam_search"):
        beams = fast.generate(prompt(7), num_beams=2, max_new_tokens=6)
    assert torch.equal(beams, eager.generate(prompt(7), num_beams=2, max_new_tokens=6))
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 1]])
    with pytest.warns(UserWarning, match="more than padding on the left"):
        fast.generate(prompt(7), attention_mask=mask, max_new_tokens=2)


def test_the_cache_grows_and_ends_with_the_models_positions(both: tuple[Any, Any]) -> None:
    runtime = both[1].runtime
    runtime.caches = []
    runtime.decoder.longest, whole = 1000, runtime.decoder.longest
    try:
        runtime.prefill(prompt(250))
        before = [part[:, :, :250].clone() for part in runtime.caches[0]]
        for token in range(10):
            runtime.step(torch.tensor([token]))
        assert runtime.caches[0][0].shape[2] == 512
        assert all(torch.equal(part[:, :, :250], old) for part, old in zip(runtime.caches[0], before, strict=True))
    finally:
        runtime.decoder.longest, runtime.caches = whole, []
    runtime.prefill(prompt(whole))
    with pytest.raises(ValueError, match=f"reaches {whole + 1} tokens; the model has {whole} positions"):
        runtime.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="1 x 0 tokens; give at least one"):
        runtime.prefill(prompt(7)[:, :0])


def test_nothing_is_compiled_twice(both: tuple[Any, Any], packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before, opened, graph = artifact.compilations, [], artifact.Graph
    monkeypatch.setattr(artifact, "Graph", lambda path, module: opened.append(path) or graph(path, module))
    again = quant.load(packed("dgq"))  # takes what is on disk
    assert artifact.compilations == before
    assert torch.equal(again.generate(prompt(7), **GREEDY), both[0].generate(prompt(7), **GREEDY))

    made: list[Path] = []
    monkeypatch.setattr(artifact, "compile_to", lambda path, *_: made.append(shutil.copy(opened[0], path)))
    monkeypatch.setattr(artifact, "environment", lambda: {"sources": "other"})  # as after an update
    assert not hasattr(quant.load(packed("dgq")), "runtime")
    assert compiled(quant.load(packed("dgq"), compile=False), say=lambda line: None)
    assert len(made) == 1


def test_float32_with_an_int8_cache_is_close(packed: Callable[..., Path]) -> None:
    folder = packed("w8a8")
    eager = quant.load(folder, dtype=torch.float32, compile=False)
    fast = quant.load(folder, dtype=torch.float32, compile=True, cache="int8")
    ids = prompt(33)
    with torch.no_grad():
        whole = eager(ids).logits[0]
    fast.runtime.prefill(ids[:, :20])
    got = torch.cat([fast.runtime.step(token[None]) for token in ids[0, 20:]])
    error = float((got - whole[20:]).norm() / whole[20:].norm())
    assert 0 < error < 0.03
    assert {part.dtype for part in fast.runtime.caches[0][:2]} == {torch.int8}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_what_a_graph_is_made_from_computes_what_transformers_does(kind: str, cache: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=128,
        initializer_range=0.2,
        sliding_window=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, value in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(value, 0.2, 2.0)
    assert refuses(model) is None
    decoder = Decoder(model).eval()
    caches = memory(decoder, cache, 2, 64, torch.float32)
    ids, first = prompt(12, rows=2), torch.tensor([0, 5])
    mask = (torch.arange(12) >= first[:, None]).long()
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=places).logits
        tables = decoder.rotations(64, torch.float32)
        got = [decoder(ids[:, :10], torch.tensor(0), first, caches, tables)]
        got += [decoder(ids[:, t : t + 1], torch.tensor(t), first, caches, tables) for t in (10, 11)]
    error = (torch.stack(got, 1) - expected[:, 9:]).norm() / expected[:, 9:].norm()
    assert error < (1e-5 if cache == "float" else 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whisper(packed_speech: Path, dtype: torch.dtype) -> None:
    eager, fast = (quant.load(packed_speech, dtype=dtype, compile=how) for how in (False, True))
    bins, frames = eager.config.num_mel_bins, 2 * eager.config.max_source_positions
    noise = np.random.default_rng(0).normal(size=(3, bins, frames))
    features = torch.tensor(noise, dtype=dtype)
    how = GREEDY | {"num_beams": 1, "max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}
    for batch in (features[:1], features[1:]):
        a, b = (model.generate(batch, **how) for model in (eager, fast))
        assert torch.equal(a.sequences, b.sequences)
        assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))
        assert a.sequences.shape[1] >= 10


def test_models_that_are_not_compiled_say_why(tiny: ModuleType) -> None:
    model = tiny.llama()
    for change, reason in (
        ({"model_type": "gpt_neox"}, "it is a gpt_neox model; compiled are llama, mistral, qwen2, qwen3 and whisper"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rotary embedding is of type dynamic"),
        ({"sliding_window": 16}, "sliding window of 16 tokens"),
    ):
        before = {name: getattr(model.config, name, None) for name in change}
        for name, value in change.items():
            setattr(model.config, name, value)
        assert reason in str(refuses(model))
        for name, value in before.items():
            setattr(model.config, name, value)
    assert refuses(model) is None
    with pytest.raises(ValueError, match="cache 'int4' is unknown; allowed: float, int8"):
        compiled(model, "int4")
