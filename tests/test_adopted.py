"""LLaDA and Dream open without remote code, as the Llama and the Qwen2 that they are, packed as well."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import quant
from quant.adopted import KEYS, TENSORS, as_llama
from quant.eval.loading import kind, load
from quant.eval.masked import evaluate
from quant.masked import Masking, masking
from quant.models import model_class, read_json
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.samples import make_samples

LLADA = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False}
NAMES = {  # a Llama's tensor -> LLaDA's
    r"model.layers.(\d+).input_layernorm": r"model.transformer.blocks.\1.attn_norm",
    r"model.layers.(\d+).self_attn.([qkv]_proj)": r"model.transformer.blocks.\1.\2",
    r"model.layers.(\d+).self_attn.o_proj": r"model.transformer.blocks.\1.attn_out",
    r"model.layers.(\d+).post_attention_layernorm": r"model.transformer.blocks.\1.ff_norm",
    r"model.layers.(\d+).mlp.gate_proj": r"model.transformer.blocks.\1.ff_proj",
    r"model.layers.(\d+).mlp.up_proj": r"model.transformer.blocks.\1.up_proj",
    r"model.layers.(\d+).mlp.down_proj": r"model.transformer.blocks.\1.ff_out",
    r"model.embed_tokens": "model.transformer.wte",
    r"model.norm": "model.transformer.ln_f",
    r"lm_head": "model.transformer.ff_out",
}


def spelled(name: str) -> str:
    """A Llama's tensor name as LLaDA spells it."""
    for old, new in NAMES.items():
        if re.match(old, name):
            return re.sub(old, new, name)
    raise AssertionError(name)


@pytest.fixture(scope="module")
def llada(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny masked-diffusion Llama as a LLaDA folder; not to be changed."""
    folder: Path = tiny.diffusion_folder(tmp_path_factory.mktemp("llada") / "float")

    def respell(tensors: dict[str, Any]) -> None:
        found = {spelled(name): value for name, value in tensors.items()}
        tensors.clear()
        tensors.update(found)

    def reword(values: dict[str, Any]) -> None:
        back = {new: old for old, new in KEYS.items()}
        kept = {back.get(key, key): value for key, value in values.items() if key not in ("is_causal", "head_dim")}
        values.clear()
        values.update(kept | LLADA | {"model_type": "llada", "architectures": ["LLaDAModelLM"], "embedding_size": tiny.WORDS})
        values["auto_map"] = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.X"}
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]

    tiny.rewrite(folder, respell)
    tiny.edit_json(folder / "config.json", reword)
    return folder


def test_a_llada_folder_is_the_llama_it_was_made_from(llada: Path, tiny: ModuleType, tmp_path: Path) -> None:
    ids = torch.randint(1, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    wanted = load(tiny.diffusion_folder(tmp_path / "llama"), torch.float32, "cpu")
    found = load(llada, torch.float32, "cpu")
    assert found.config.hidden_size == 64
    assert found.config.head_dim == 16
    with torch.inference_mode():
        assert torch.equal(found(input_ids=ids).logits, wanted(input_ids=ids).logits)
    assert kind(llada) == "masked"
    assert masking(read_json(llada / "config.json")) == Masking(tiny.MASK)


def test_a_packed_llada_keeps_its_names_and_equals_the_packed_llama(llada: Path, tiny: ModuleType, tmp_path: Path) -> None:
    quant.quantize(tiny.diffusion_folder(tmp_path / "llama"), "gptq", tmp_path / "a", overrides=tiny.SMALL)
    quant.quantize(llada, "gptq", tmp_path / "b", overrides=tiny.SMALL)
    ids = torch.randint(1, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    a, b = (quant.load(tmp_path / name, dtype=torch.float32, compile=False) for name in "ab")
    with torch.inference_mode():
        assert torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)
    names = load_file(tmp_path / "b" / "model.safetensors")
    assert "model.transformer.blocks.0.ff_out.weight_packed" in names
    assert "model.transformer.ff_out.weight" in names
    config = read_json(tmp_path / "b" / "config.json")
    assert config["d_model"] == 64
    assert config["model_type"] == "llada"


def test_every_tensor_name_of_llada_is_known() -> None:
    for llama in NAMES.values():
        name = llama.replace(r"\1", "3").replace(r"\2", "q_proj") + ".weight"
        assert sum(bool(re.match(pattern, name)) for pattern in TENSORS) == 1, name


@pytest.mark.parametrize(("key", "value"), [("block_type", "sequential"), ("alibi", True), ("scale_logits", True)])
def test_a_llada_that_is_no_llama_is_refused(llada: Path, tiny: ModuleType, tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "config.json").write_text((llada / "config.json").read_text())
    tiny.edit_json(tmp_path / "config.json", lambda values: values.update({key: value}))
    with pytest.raises(ValueError, match=f"a LLaDA model with {key} {value!r} is not known"):
        model_class(tmp_path)


def test_the_width_of_the_mlp_may_be_a_ratio() -> None:
    assert as_llama({"d_model": 64, "mlp_ratio": 4, "mlp_hidden_size": None})["intermediate_size"] == 256


@pytest.fixture(scope="module")
def dream(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 as a Dream folder; not to be changed."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tiny.WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    folder: Path = tmp_path_factory.mktemp("dream") / "float"
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    named = {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": tiny.MASK}
    tiny.edit_json(folder / "config.json", lambda values: values.update(named))
    return folder


def test_dream_attends_to_both_sides(dream: Path) -> None:
    model = load(dream, torch.float32, "cpu")
    assert type(model) is not Qwen2ForCausalLM
    assert AutoModelForCausalLM.from_pretrained(dream).config.is_causal is False
    ids = torch.randint(1, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = 5
    with torch.inference_mode():
        assert not torch.equal(model(input_ids=ids).logits[0, 0], model(input_ids=changed).logits[0, 0])


def test_dream_predicts_a_position_from_the_one_before(dream: Path, tiny: ModuleType, tmp_path: Path) -> None:
    how = masking(read_json(dream / "config.json"))
    assert how == Masking(tiny.MASK, shift=1)
    assert how.read_at(torch.tensor([True, False, True, True])).tolist() == [0, 1, 2]
    plan = make_plan(str(dream), load_recipe("rtn", tiny.SMALL))
    samples, _ = make_samples(plan, torch.device("cpu"))
    for sample in samples:
        masked = sample.inputs["input_ids"][0] == tiny.MASK
        wanted = masked.roll(-1)
        wanted[-1] = False
        wanted[0] |= masked[0]
        assert sample.predicted is not None
        assert torch.equal(sample.predicted, wanted)
    quant.quantize(dream, "gptq", tmp_path / "out", overrides=tiny.SMALL)
    model, reference = quant.load(tmp_path / "out", dtype=torch.float32, compile=False), load(dream, torch.float32, "cpu")
    ids = torch.randint(1, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    result = evaluate(model, ids, how, reference)
    assert all(0 < one.kl_mean < 1 for one in result.fidelity.values())
