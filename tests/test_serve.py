"""In transformers: registered whichever is imported first, refused without us, unchanged by casts and copies."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import load_file

import quant
from quant.linear import PackedLinear
from quant.serve.transformers import LowbitConfig

ROOT = Path(quant.__file__).parents[1]
Packed = Callable[..., Path]


def python(code: str, *args: object) -> str:
    """What a fresh interpreter prints; its working directory is the checkout, where folders called kernels and eval lie."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap() -> None:
    code = """
import sys, quant
heavy = [name for name in ("torch", "transformers", "numpy", "safetensors", "pydantic", "yaml", "click") if name in sys.modules]
import quant.cli
late = [name for name in ("torch", "transformers", "numpy", "rich", "yaml") if name in sys.modules]
print(heavy, late, sorted({"quantize", "load", "PackedLinear"} & set(dir(quant))))
"""
    assert python(code) == "[] [] ['PackedLinear', 'load', 'quantize']"


LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, sys.meta_path[0].__class__.__name__ == "Finder")
"""


@pytest.mark.parametrize(
    "imports", ["import sys, quant, transformers", "import sys, transformers.quantizers.auto, transformers, quant"]
)
def test_either_may_be_imported_first(packed: Packed, imports: str) -> None:
    assert python(f"{imports}\nimport quant\n{LOAD}", packed("dgq")) == "PackedLinear False"


def test_without_us_transformers_refuses(packed: Packed, packed_speech: Path) -> None:
    """Also from the checkout, where a folder called kernels could be taken for Hugging Face's package of that name."""
    code = """
import json, sys, transformers
import transformers.models.llama, transformers.models.whisper
transformers.utils.logging.set_verbosity_error()
refused = []
for folder in sys.argv[1:]:
    cls = getattr(transformers, json.load(open(folder + "/config.json"))["architectures"][0])
    try:
        cls.from_pretrained(folder)
    except (RuntimeError, ValueError):
        refused.append(cls.__name__[:5])
assert "quant" not in sys.modules
print(*refused)
"""
    folders = [packed("rtn"), packed("dgq"), packed("dgq", tied=True), packed_speech]
    assert python(code, *folders) == "Llama Llama Llama Whisp"


@pytest.mark.parametrize("recipe", ["dgq", "w8a8", "rtn"])
@pytest.mark.parametrize("bound", [True, False])
def test_casts_leave_the_packed_bytes(packed: Packed, recipe: str, bound: bool) -> None:
    stored = load_file(packed(recipe) / "model.safetensors")
    ids = torch.arange(1, 9).unsqueeze(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = quant.load(packed(recipe), dtype=torch.float32)
        if bound:
            model(ids)
        model.to(dtype)
        assert model.model.norm.weight.dtype == dtype
        state = model.state_dict()
        packed_names = [name for name in stored if name.rpartition(".")[0].endswith("_proj") and stored[name].numel()]
        assert len(packed_names) >= 2 * 21
        for name in packed_names:
            assert state[name].dtype == stored[name].dtype, name
            assert torch.equal(state[name], stored[name]), name
        assert model(ids).logits.dtype == dtype


def test_load_with_a_dtype(packed: Packed) -> None:
    assert quant.load(packed("dgq")).dtype == torch.bfloat16
    for dtype in (torch.float32, torch.float16):
        model = quant.load(packed("dgq"), dtype=dtype, device="cpu")
        layer = model.model.layers[0].mlp.up_proj
        assert model.dtype == layer.weight.dtype == dtype
        assert layer.fields()["row_scale"].dtype == torch.float32
    rtn = quant.load(packed("rtn"), dtype=torch.float32).model.layers[0].mlp.up_proj
    assert rtn.fields()["weight_scale"].dtype == torch.float16


def test_a_model_is_never_in_float16_on_a_cpu_unasked(tiny: ModuleType, packed: Packed, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed("rtn"), tmp_path / "half"))
    tiny.edit_json(folder / "config.json", lambda config: config.update(dtype="float16"))
    assert quant.load(folder).dtype == torch.bfloat16
    assert quant.load(folder, dtype=torch.float16).dtype == torch.float16


def test_deepcopy_of_a_model(packed: Packed) -> None:
    ids = torch.arange(1, 9).unsqueeze(0)
    model = quant.load(packed("dgq"))
    before = model(ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, before)
    first = [m for m in model.modules() if isinstance(m, PackedLinear)]
    second = [m for m in other.modules() if isinstance(m, PackedLinear)]
    assert len(first) == 21
    for left, right in zip(first, second, strict=True):
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(left._prepared, right._prepared, strict=True) if a.numel())


def test_weight_is_there_for_model_code_but_not_stored(packed: Packed) -> None:
    model = quant.load(packed("rtn"))
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.shape == (64, 64)
    assert layer.weight.dtype == torch.bfloat16
    assert "model.layers.0.self_attn.q_proj.weight" not in model.state_dict()
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, PackedLinear) for p in m.parameters())


def test_shards_of_save_pretrained_load_back(packed: Packed, tmp_path: Path) -> None:
    model = quant.load(packed("dgq"))
    model.save_pretrained(tmp_path / "again", max_shard_size="50kB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = quant.load(tmp_path / "again")
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


def test_models_of_two_folders_do_not_disturb_each_other(packed: Packed) -> None:
    """The class remembers nothing of the folder that was loaded before."""
    for recipe in ("dgq", "rtn", "dgq"):
        model = transformers.AutoModelForCausalLM.from_pretrained(packed(recipe))
        assert str(model.model.layers[2].mlp.down_proj.format).startswith("Int4Dual" if recipe == "dgq" else "IntGroup")
    assert "_keys_to_ignore_on_load_unexpected" not in vars(transformers.LlamaForCausalLM) or not (
        transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected
    )


def test_device_map(packed: Packed) -> None:
    ids = torch.arange(1, 9).unsqueeze(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(packed("dgq"), device_map="cpu")
    assert torch.equal(model(ids).logits, quant.load(packed("dgq"))(ids).logits)


def test_a_float_checkpoint_is_not_quantized_by_loading(llama: Path, packed: Packed) -> None:
    section = json.loads((packed("rtn") / "config.json").read_text())["quantization_config"]
    section.pop("quant_method")
    with pytest.raises(ValueError, match="quantize --recipe"):
        transformers.AutoModelForCausalLM.from_pretrained(llama, quantization_config=LowbitConfig(**section))
    with pytest.raises(ValueError, match="was not written by quantize"):
        quant.load(llama)
    with pytest.raises(ValueError, match="version 9"):
        LowbitConfig(version=9, rules=[])
