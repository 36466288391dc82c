"""Bits by token in a served model: plain rules at both ends, causal, a sequence's own, the same with a cache and padding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import quant
from quant.checkpoint import token_thresholds
from quant.kernels.activations.adaptive_token import TAGS
from quant.linear import PackedLinear
from quant.passes.token_bits import calibrate
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.runtime import refuses
from quant.serve.token_bits import Sink, Tags, attentions
from quant.serve.vllm.names import architecture_of

FIRST = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
UNTRAINED = ["edgeqat.steps=0", "edgeqat.held=1", "token_bits.length=null"]
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(llama: Path, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """edgeqat-w4a4 before training, half of the tokens of its windows with 8 bits; not to be changed."""
    out = tmp_path_factory.mktemp("bits") / "packed"
    quant.quantize(llama, "edgeqat-w4a4", out, overrides=[*tiny.SMALL, *UNTRAINED])
    return out


@pytest.fixture
def edited(folder: Path, tiny: ModuleType, tmp_path: Path) -> Callable[[Edit], Any]:
    """edited(change): the model after a change of its quantization_config, in float32."""

    def load(change: Edit) -> Any:
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        tiny.edit_json(copy / "config.json", lambda config: change(config["quantization_config"]))
        return quant.load(copy, dtype=torch.float32)

    return load


def plain(activation: str) -> Edit:
    """Make every adaptive layer one of a plain rule, but q, k, v of the first block, which read all tokens with 8 bits."""

    def change(section: dict[str, Any]) -> None:
        del section["token_thresholds"]
        for rule in section["rules"]:
            rule["activation"]["name"] = activation
            if activation == "int8_token":
                del rule["activation"]["clip"]
        kinds = {name: next(rule for rule in section["rules"] if rule["match"].endswith(name[-6:])) for name in FIRST}
        early = {"name": "int8_token", "rotate": 64}
        section["rules"] = [{**rule, "match": name, "activation": early} for name, rule in kinds.items()] + section["rules"]

    return change


def same(threshold: float) -> Edit:
    return lambda section: section.update(token_thresholds=[threshold] * 3)


def ids_of(rows: int = 2, length: int = 48, seed: int = 3) -> Tensor:
    return torch.randint(1, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


def marks(model: Any) -> list[Tensor]:
    """A list that gets the tags of each block of every forward pass from now on."""
    seen: list[Tensor] = []

    class Seen(Sink):
        def mark(self, importance: Tensor) -> None:
            super().mark(importance)
            assert self.tags.value is not None
            seen.append(self.tags.value)

    for module in attentions(model):
        module.token_bits = Seen(module.token_bits.tags, module.token_bits.threshold)
    return seen


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def near(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding: a code on a boundary may flip."""
    return float((one - other).norm()) < 1e-2 * float(other.norm())


def test_the_pass_chooses_the_share_of_tokens(folder: Path, llama: Path) -> None:
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    thresholds = token_thresholds(section)
    assert thresholds is not None
    assert len(set(thresholds)) == 3
    model, ids = quant.load(folder, dtype=torch.float32), ids_of(4, 50)
    chosen = calibrate(model, ids, 0.3)
    assert chosen == [module.token_bits.threshold for module in attentions(model)]
    seen = marks(model)
    logits(model, ids)
    assert [int(tags.sum()) for tags in seen] == [60, 60, 60]
    report = json.loads((folder / "report.json").read_text())["tuned"]
    assert [(step["pass"], step.get("share")) for step in report] == [("token_bits", 0.5), ("edgeqat", None)]


def test_with_all_tokens_important_it_is_int8_token_bit_for_bit(edited: Callable[[Edit], Any]) -> None:
    assert torch.equal(logits(edited(same(0.0)), ids_of()), logits(edited(plain("int8_token")), ids_of()))


def test_with_none_important_it_is_int4_token_bit_for_bit(edited: Callable[[Edit], Any]) -> None:
    model = edited(same(2.0))
    seen = marks(model)
    kept = logits(model, ids_of())
    assert all(torch.equal(tags, torch.arange(48).expand(2, 48) == 0) for tags in seen)  # only the sink
    for module in attentions(model):
        module.token_bits = Sink(module.token_bits.tags, float("nan"))  # which no importance reaches
    wanted = logits(edited(plain("int4_token")), ids_of())
    assert torch.equal(logits(model, ids_of()), wanted)
    assert not torch.allclose(kept, wanted)


def test_it_is_causal_and_batch_independent(folder: Path) -> None:
    model = quant.load(folder, dtype=torch.float32)
    seen = marks(model)
    ids = ids_of()
    before = logits(model, ids)
    changed = ids.clone()
    changed[0, 40:], changed[1] = 7, 9
    after = logits(model, changed)
    alone = logits(model, ids[:1])
    for first, second, third in zip(seen[:3], seen[3:6], seen[6:], strict=True):
        assert 0 < int(first[0, 1:40].sum()) < 39
        assert torch.equal(first[0, :40], second[0, :40])
        assert torch.equal(first[0], third[0])
    assert near(after[0, :40], before[0, :40])
    assert near(alone[0], before[0])
    assert not near(after[0, 40:], before[0, 40:])


def test_a_cache_and_padding_on_the_left_change_nothing(folder: Path) -> None:
    model, ids = quant.load(folder, dtype=torch.float32), ids_of(1, 40)
    seen = marks(model)
    whole = logits(model, ids)
    tags = [t[0] for t in seen]
    seen.clear()
    cache, parts = None, []
    with torch.no_grad():
        for start, stop in ((0, 20), *((t, t + 1) for t in range(20, 40))):
            out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert near(torch.cat(parts, 1), whole)
    for block in range(3):
        assert torch.equal(torch.cat([t[0] for t in seen[block::3]]), tags[block])
    seen.clear()
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), ids], 1)
    mask = (torch.arange(47) >= 7).long().view(1, -1)
    pair = logits(model, torch.cat([padded, ids_of(1, 47, seed=5)]), attention_mask=torch.cat([mask, torch.ones_like(mask)]))
    assert near(pair[0, 7:], whole[0])
    for block in range(3):
        assert torch.equal(seen[block][0, 7:], tags[block])
    both = {"input_ids": torch.cat([padded, ids_of(1, 47, seed=5)]), "attention_mask": torch.cat([mask, torch.ones_like(mask)])}
    text = model.generate(**both, max_new_tokens=6, do_sample=False)[0, 47:]
    assert torch.equal(
        text, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, 40:]
    )


def test_integer_layers_compute_what_rounded_tokens_give(folder: Path) -> None:
    model, errors, kernels = quant.load(folder, dtype=torch.float32), [], set()

    def compare(module: PackedLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, tags = module.activation.rotated(args[0]), {} if module.tags is None else {TAGS: module.tags.of(args[0])}
        weight = module.format.dequantize(module.format.unpack(module.fields(), module.out_features, module.in_features))
        wanted = module.activation.quantize(x, tags).double() @ weight.double().T
        errors.append(float((output - wanted).norm() / wanted.norm()))
        kernels.add(module.kernel.name)

    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    for layer in layers.values():
        layer.register_forward_hook(compare)
    assert [name for name, layer in layers.items() if layer.tags is None] == FIRST
    logits(model, ids_of())
    assert len(errors) == 21
    assert max(errors) < 2e-6
    assert len(kernels) == 1


def test_a_saved_model_keeps_its_thresholds_and_a_float_one_none(folder: Path, tmp_path: Path) -> None:
    model = quant.load(folder, dtype=torch.float32)
    before = logits(model, ids_of())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(quant.load(tmp_path / "again", dtype=torch.float32), ids_of()), before)
    assert "decides the bits" in str(refuses(model))
    model = quant.load(folder, dtype=torch.float32)
    model.dequantize()
    assert model.config._attn_implementation == "sdpa"
    assert float((logits(model, ids_of()) - before).norm() / before.norm()) < 0.7


def test_a_layer_without_fresh_tags_is_an_error() -> None:
    tags, x = Tags(), torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="reads \\[2, 5\\] tokens, the attention before it tagged 0"):
        tags.of(x)
    tags.value = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="tagged 8"):
        tags.of(x)


@pytest.mark.parametrize("thresholds", ["0.5", [0.5, 0.5, "a"], [0.5, 0.5, 3.0], [0.5]])
def test_damaged_thresholds_are_refused(edited: Callable[[Edit], Any], thresholds: Any) -> None:
    with pytest.raises(ValueError, match="quantize again"):
        edited(lambda section: section.update(token_thresholds=thresholds))


def test_what_has_no_sink_is_refused_in_the_plan(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    text = f"activation={json.dumps({'name': 'adaptive_token'})}"
    passes = "passes=[{rtn: {}}, {token_bits: {}}]"
    alone = "passes=[{rtn: {}}]"
    for source, sets, told in (
        (tiny.whisper_folder(tmp_path / "whisper"), [text, passes], "no attention sink"),
        (tiny.diffusion_folder(tmp_path / "diffusion"), [text, passes], "not causal"),
        (tiny.mixture_folder(tmp_path / "mixture"), [text, passes], "experts"),
        (llama, [text, alone], "needs the pass token_bits"),
        (llama, [passes], "finds no layer"),
        (llama, [text, passes, "softmax={bits: 4}"], "both replace the attention"),
    ):
        with pytest.raises(ValueError, match=told):
            make_plan(str(source), load_recipe("rtn", [*sets, "head=null"]))


def test_vllm_is_told_why(folder: Path) -> None:
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="not served by vLLM"):
        architecture_of(section, ["LlamaForCausalLM"])
