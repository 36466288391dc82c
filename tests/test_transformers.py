"""What transformers and accelerate promise of any model: put on disk, dequantized, compiled, exported, read by model code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import quant
from quant.linear import PackedLinear

Packed = Callable[..., Path]
IDS = torch.arange(1, 9).unsqueeze(0)
EIGHT_BIT_HEAD = ["head={name: int_group, bits: 8, group: 64, symmetric: true}"]


@pytest.fixture(scope="module")
def with_head(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama whose only table is packed; weight-only."""
    root = tmp_path_factory.mktemp("head")
    source = tiny.llama_folder(root / "float", tied=True)
    quant.quantize(source, "rtn", root / "packed", overrides=[*tiny.SMALL, *EIGHT_BIT_HEAD])
    return root / "packed"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.norm())


PARTS = [
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.layers.2",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
]


@pytest.mark.parametrize("on_disk", [{"model.layers.1", "model.layers.2"}, set(PARTS)])
def test_a_model_on_disk_computes_the_same(packed: Packed, tmp_path: Path, on_disk: set[str]) -> None:
    """Bit for bit, twice, and saved from there."""
    want = logits(quant.load(packed("dgq")))
    places = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    with pytest.warns(UserWarning, match="packed layers stay in memory"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            packed("dgq"), device_map=places, offload_folder=tmp_path / "away"
        )
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), want)
    with pytest.raises(ValueError, match="without disk in device_map"):
        model.dequantize()
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(quant.load(tmp_path / "again")), want)


def test_accelerate_takes_the_float_tensors_away_and_back(packed: Packed) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = quant.load(packed("dgq"))
    want = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert torch.equal(logits(model), want)


def test_auto_device_map(with_head: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(with_head, device_map="auto")
    assert torch.equal(logits(model), logits(quant.load(with_head, device=model.device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_it_is_an_ordinary_checkpoint(with_head: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = quant.load(with_head, dtype=torch.float32)
    packed = logits(model)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    dense = model.dequantize(dtype)
    assert dense is model
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) in (nn.Linear, nn.Embedding)
        assert torch.equal(model.get_submodule(name).weight, weight.to(dtype)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(logits(model).float(), packed) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]
    model.save_pretrained(tmp_path / "dense")
    text = (tmp_path / "dense" / "config.json").read_text()
    assert "quant" not in text
    assert "lowbit" not in text
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, PackedLinear) for module in again.modules())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert distance(logits(again).float(), logits(model).float()) < (
        1e-6 if dtype == torch.float32 else 2e-2
    )  # torch's kernels
    stored = again.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_speech_is_dequantized_too(packed_speech: Path) -> None:
    model = quant.load(packed_speech, dtype=torch.float32)
    layer = model.model.decoder.layers[1].encoder_attn.v_proj
    weight, bias = layer.weight, layer.bias
    model.dequantize()
    dense = model.model.decoder.layers[1].encoder_attn.v_proj
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, weight)
    assert torch.equal(dense.bias, bias)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_a_bias_that_the_class_lacks_keeps_it_packed(packed: Packed) -> None:
    """The bias would be dropped in silence by whoever loads the float checkpoint."""
    model = quant.load(packed("rtn"))
    model.hf_quantizer.quantization_config.section["bias"] = ["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"mlp.up_proj was given a bias, which a float LlamaForCausalLM has no place for"):
        model.dequantize()
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_compiled_and_exported_graphs_compute_the_same(with_head: Path) -> None:
    """One graph; the packed products in it stay operators of ours, not decoded weights."""
    model = quant.load(with_head, dtype=torch.float32)
    want = logits(model)
    assert torch.equal(logits(torch.compile(model, fullgraph=True, backend="aot_eager")), want)
    with torch.no_grad():
        exported = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
        assert distance(exported.module()(IDS, use_cache=False).logits, want) < 1e-5
    kernel = model.model.layers[0].mlp.up_proj.bound()[0]
    if kernel.name != "reference":
        products = [node for node in exported.graph.nodes if str(node.target).startswith("lowbit.cpu_weight_only")]
        assert len(products) >= 3 * 4 + 1, {str(node.target) for node in exported.graph.nodes}


def test_model_code_may_ask_what_it_asks_of_linears(packed: Packed, with_head: Path) -> None:
    for folder in (packed("dgq"), with_head):
        model = quant.load(folder)
        for layer in (model.lm_head, model.model.layers[0].self_attn.k_proj):
            assert layer.weight.dtype == torch.bfloat16
            assert layer.weight.device == model.device
            assert layer.weight.shape == (layer.out_features, layer.in_features)
            assert layer.bias is None
        assert model.get_output_embeddings().weight.shape == model.get_input_embeddings().weight.shape
        nn.Module.half(model)  # transformers' own `half` refuses every quantized model and names `.to`
        assert model.lm_head.weight.dtype == model.dtype == logits(model).dtype == torch.float16
        with pytest.raises(ValueError, match="half"):
            model.half()
        assert logits(model.to(torch.bfloat16)).dtype == torch.bfloat16
