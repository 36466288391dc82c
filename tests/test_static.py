"""Folders with static inputs, biases that the float model lacks, and a quantized softmax: written, checked, loaded, saved."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import quant
from quant.kernels.softmax import attend
from quant.linear import PackedLinear
from quant.recipe import load_recipe
from quant.runtime import refuses
from quant.serve.softmax import PREFIX

SMALL = ["gptq.sweeps=0"]


@pytest.fixture(scope="module")
def speech(tiny: ModuleType, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper with uneven norms packed by repquant-w4a4 with a quantized softmax; not to be changed."""
    root = tmp_path_factory.mktemp("static")

    def uneven(tensors: dict[str, Tensor]) -> None:
        torch.manual_seed(0)
        for name, value in tensors.items():
            if "layer_norm" in name and ".layers." in name:
                tensors[name] = torch.randn_like(value).exp() if name.endswith("weight") else 2 * torch.randn_like(value)

    tiny.rewrite(tiny.whisper_folder(root / "float"), uneven)
    quant.quantize(root / "float", "repquant-w4a4", root / "packed", calib=str(clips), overrides=[*SMALL, "softmax={bits: 4}"])
    return root / "packed"


def outputs(model: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        out: Tensor = model(input_features=torch.randn(1, 80, 200), decoder_input_ids=torch.tensor([[1, 2, 50, 60]])).logits
    return out


def packed_layers(model: torch.nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def test_every_reader_of_a_shifted_norm_has_a_bias_and_the_config_says_so(speech: Path) -> None:
    section = json.loads((speech / "config.json").read_text())["quantization_config"]
    assert len(section["bias"]) == 2 + 2 * 2
    assert all(name.endswith("k_proj") for name in section["bias"])
    stored = load_file(speech / "model.safetensors")
    assert float(stored["model.encoder.layers.0.self_attn.k_proj.bias"].abs().max()) > 0
    assert not stored["model.decoder.layers.0.encoder_attn.k_proj.bias"].any()  # no norm of the block makes what it reads
    report = json.loads((speech / "report.json").read_text())
    assert all(block["refused_folds"] == {} for block in report["blocks"])


def test_loaders_agree_and_a_saved_model_has_the_same_bytes(speech: Path, tmp_path: Path) -> None:
    model = quant.load(speech, dtype=torch.float32)
    other = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(speech, dtype=torch.float32)
    assert torch.equal(outputs(model), outputs(other))
    assert all(layer.bias is not None for layer in packed_layers(model).values())
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(speech / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)
    assert torch.equal(outputs(quant.load(tmp_path / "again", dtype=torch.float32)), outputs(model))


def test_the_packed_model_is_near_the_float_model(speech: Path) -> None:
    model = quant.load(speech, dtype=torch.float32)
    source = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(speech.parent / "float", dtype=torch.float32).eval()
    want, got = outputs(source), outputs(model)
    assert float((got - want).norm() / want.norm()) < 0.5


def test_the_softmax_is_quantized_wherever_the_model_runs(speech: Path) -> None:
    model = quant.load(speech, dtype=torch.float32)
    assert model.config._attn_implementation == f"{PREFIX}4"
    assert "probabilities are quantized" in str(refuses(model))
    coded = outputs(model)
    model.set_attn_implementation("eager")
    plain = outputs(model)
    assert not torch.allclose(coded, plain, rtol=1e-3)
    assert float((coded - plain).norm() / plain.norm()) < 0.3
    layer = model.model.encoder.layers[0].self_attn
    x = torch.randn(1, 100, 64)
    model.set_attn_implementation(f"{PREFIX}4")
    with torch.inference_mode():
        q, k, v = (p(x).view(1, 100, 2, 32).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        wanted = layer.out_proj(attend(q * layer.scaling, k, v, None, 1.0, 4).flatten(2))
        assert torch.allclose(layer(x)[0], wanted, atol=1e-5)
    prompt = torch.tensor([[1, 2]])
    assert model.generate(torch.randn(1, 80, 200), decoder_input_ids=prompt, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda section: section["bias"].append("model.encoder.layers.0.fc9"), "fc9.bias"),
        (lambda section: section.update(softmax={"bits": 40}), "2 to 8"),
    ],
)
def test_a_damaged_config_is_refused(change: Any, told: str, speech: Path, tiny: ModuleType, tmp_path: Path) -> None:
    for file in speech.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny.edit_json(tmp_path / "config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=told):
        quant.load(tmp_path)


def test_a_lost_bias_is_noticed(speech: Path, tiny: ModuleType, tmp_path: Path) -> None:
    for file in speech.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny.rewrite(tmp_path, lambda tensors: tensors.pop("model.encoder.layers.0.self_attn.k_proj.bias"))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj.bias"):
        quant.load(tmp_path)


def test_text_models_get_no_bias_and_attend_with_codes(tiny: ModuleType, llama: Path, tmp_path: Path) -> None:
    overrides = [*tiny.SMALL, *SMALL, "softmax={bits: 4}", "activation.zeros=channel"]
    model = quant.quantize(llama, "repquant-w6a6", tmp_path / "out", overrides=overrides)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "bias" not in section
    assert all(layer.bias is None for layer in packed_layers(model).values())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    model = quant.load(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        whole = model(ids).logits
        longer = torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids], 1)
        padded = model(longer, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]]))
        source = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(ids).logits
    assert float((padded.logits[:, 2:] - whole).norm() / whole.norm()) < 0.05  # a code may flip
    assert float((whole - source).norm() / source.norm()) < 0.3
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_recipes_refuse_what_makes_no_sense() -> None:
    for override, told in (("softmax.bits=1", "bits"), ("softmax.bit=4", "bits"), ("activation.zeros=row", "layer, channel")):
        with pytest.raises(ValueError, match=told):
            load_recipe("repquant-w4a4", [override])
    with pytest.raises(ValueError, match="2 passes that move the target"):
        load_recipe("repquant-w4a4", ["passes=[{reconstruct: {}}, {qep: {}}, {gptq: {}}]"])
