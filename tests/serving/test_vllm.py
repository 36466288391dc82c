"""The plugin in vLLM: the numbers of `quant.load`, tensor parallelism, and one clear line for each wrong use.

They need an environment of their own (`make test-vllm`). Models are random, of several schemes at once, in float32, so that
what is compared is the plugin and not the rounding of two implementations of a norm.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import quant
from quant.kernels.activation import Activation
from quant.kernels.activation import from_config as rule_from
from quant.kernels.format import Format
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup

from .conftest import VLLM_PYTHON, Engines

pytestmark = pytest.mark.skipif(not VLLM_PYTHON, reason="make test-vllm sets LOWBIT_VLLM")

PLAIN = rule_from("none")
SCHEMES: list[tuple[Format, Activation]] = [
    (IntGroup(bits=4, group=32, symmetric=False), PLAIN),
    (IntGroup(bits=2, group=32, symmetric=True), PLAIN),
    (IntGroup(bits=3, group=64, symmetric=False), rule_from({"name": "none", "rotate": 32})),
    (IntGroup(bits=8, group=-1, symmetric=True), rule_from({"name": "int8_token", "rotate": 64})),
    (Int4Dual(group=32), rule_from("int8_token")),
    (Fp4Block(kind="nvfp4"), PLAIN),
    (Fp4Block(kind="mxfp4"), rule_from("mxfp4")),
    (FpChannel(bits=4), PLAIN),
    (FpChannel(bits=8), rule_from("fp_shift")),
    (IntGroup(bits=8, group=64, symmetric=False), rule_from({"name": "int_static", "zeros": "channel"})),
    (Fp4Block(kind="nvfp4"), rule_from({"name": "nvfp4", "four_six": True})),
    (IntGroup(bits=4, group=64, symmetric=True), rule_from({"name": "int4_group", "group": 64})),
]
FLOATS = [scheme for scheme in SCHEMES if scheme[1].name == "none"]
ROUNDED = [scheme for scheme in SCHEMES if scheme[1].name != "none"]
HEAD = IntGroup(bits=8, group=64, symmetric=True), PLAIN
PROMPTS = [[7, 3, 300, 12, 9, 55, 120, 8], [5, 100, 200, 300, 17]]
NEW = 8
TEXT = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def by_layer(name: str) -> tuple[Format, Activation] | None:
    """Another scheme for every block, whatever stack it is in; tokens stay in float."""
    found = re.search(r"layers\.(\d+)\.", name)
    return FLOATS[int(found[1]) % len(FLOATS)] if found else None


def rounding(name: str) -> tuple[Format, Activation] | None:
    """`by_layer` with schemes that round tokens."""
    found = re.search(r"layers\.(\d+)\.", name)
    return ROUNDED[int(found[1]) % len(ROUNDED)] if found else None


def with_table(name: str) -> tuple[Format, Activation] | None:
    """`by_layer`, and the table of a tied model."""
    return HEAD if name.endswith("embed_tokens") else by_layer(name)


def with_head(name: str) -> tuple[Format, Activation] | None:
    """`by_layer`, and the head of a model that is not tied."""
    return HEAD if name == "lm_head" else by_layer(name)


def in_language_model(name: str) -> tuple[Format, Activation] | None:
    """`with_head` in Qwen2-Audio's language model."""
    return with_head(name.removeprefix("language_model.")) if name.startswith("language_model.") else None


def llama(folder: Path, tiny: ModuleType, layers: int, **config: Any) -> Path:
    torch.manual_seed(0)
    made = transformers.LlamaConfig(**TEXT, num_hidden_layers=layers, **config)
    transformers.LlamaForCausalLM(made).eval().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def whisper(folder: Path, tiny: ModuleType) -> Path:
    """Two and two blocks of two heads, which vLLM's attention has a kernel for."""
    tiny.whisper_folder(folder)
    torch.manual_seed(0)
    config = transformers.WhisperConfig.from_pretrained(folder)
    config.update({"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256})
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def qwen2_audio(folder: Path, tiny: ModuleType) -> Path:
    """A language model of two blocks, with biases of q, k and v, behind an audio tower of one."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    text = {"model_type": "qwen2", "num_hidden_layers": 2, **TEXT, "vocab_size": 384}
    tower = {
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "max_source_positions": 100,
    }
    config = transformers.Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=320)
    model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    for name, value in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(value.data)
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=2, feature_size=128)
    transformers.Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def dense(packed: Path, folder: Path) -> Path:
    """The float checkpoint of a packed one's dequantized weights, as any engine reads it."""
    quant.load(packed, dtype=torch.float32).dequantize().save_pretrained(folder)
    for file in packed.glob("*.json"):
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def request(folder: Path, **engine: Any) -> dict[str, Any]:
    return {"engine": {"model": str(folder), "dtype": "float32", **engine}, "prompts": PROMPTS, "tokens": NEW}


@torch.no_grad()
def ours(model: Any, prompt: list[int], tokens: list[int], **inputs: Any) -> tuple[list[int], list[float]]:
    """Given a prompt and what followed it, what `quant.load` finds likeliest at each new place, and all log-probabilities."""
    ids = torch.tensor([prompt + tokens])
    key = "decoder_input_ids" if inputs and "input_features" in inputs else "input_ids"
    logits = model(**{key: ids}, **inputs).logits[0].float()
    likely = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logits.argmax(-1)[len(prompt) - 1 : -1].tolist(), likely.tolist()


def require_equal(model: Any, answers: Any, within: float, **inputs: Any) -> None:
    """The same greedy tokens, every log-probability as near as said."""
    assert isinstance(answers, list), answers
    for answer in answers:
        tokens, likely = ours(model, answer["ids"], answer["tokens"], **inputs)
        have = answer["prompt"] + answer["logprobs"]
        assert answer["tokens"] == tokens
        assert max(abs(a - b) for a, b in zip(have, likely[-len(have) :], strict=True)) < within


@pytest.fixture(scope="module")
def folders(pack: Any, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed folders by name, and spoiled copies of one."""
    root = tmp_path_factory.mktemp("served")
    found = {"tied": pack(llama(root / "tied-float", tiny, len(FLOATS), tie_word_embeddings=True), root / "tied", with_table)}
    found["rounded"] = pack(llama(root / "rounded-float", tiny, len(ROUNDED)), root / "rounded", rounding)
    small = pack(llama(root / "untied-float", tiny, 2, tie_word_embeddings=False), root / "small", with_head)
    found["untied"] = small

    def spoiled(name: str, config: Any = None, tensors: Any = None) -> None:
        found[name] = Path(shutil.copytree(small, root / name))
        if config is not None:
            tiny.edit_json(found[name] / "config.json", config)
        if tensors is not None:
            tiny.rewrite(found[name], tensors)

    def mixed(config: dict[str, Any]) -> None:
        rules = config["quantization_config"]["rules"]
        config["quantization_config"]["rules"] = [
            {**rules[0], "match": "*.1.self_attn.v_proj", "format": HEAD[0].config()},
            *rules,
        ]

    field = "model.layers.1.self_attn.v_proj.weight_scale"
    spoiled("version", lambda config: config["quantization_config"].update(version=99))
    spoiled("architecture", lambda config: config.update(architectures=["MistralForCausalLM"]))
    spoiled("mixed", mixed)
    spoiled("missing", tensors=lambda tensors: tensors.pop(field))
    spoiled("shape", tensors=lambda tensors: tensors.update({field: tensors[field][:, :2].contiguous()}))
    spoiled("norm", tensors=lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"))
    found["whisper"] = pack(whisper(root / "whisper-float", tiny), root / "whisper", with_table)
    found["audio"] = pack(qwen2_audio(root / "audio-float", tiny), root / "audio", in_language_model)
    for name in ("tied", "untied", "whisper", "audio"):
        found[f"{name}-dense"] = dense(found[name], root / f"{name}-dense")
    np.save(root / "wave.npy", (0.3 * np.sin(np.arange(24_000) / 9)).astype(np.float32))
    found["wave"] = root / "wave.npy"
    return found


@pytest.fixture(scope="module")
def served(engines: Engines, folders: dict[str, Path]) -> dict[str, Any]:
    """One process, engine after engine."""
    runs = {name: request(folder) for name, folder in folders.items() if name != "wave"}
    for kind in ("", "-dense"):
        runs[f"whisper{kind}"] |= {"prompts": [[1, 5, 9]], "audio": [str(folders["wave"])]}
        runs[f"whisper{kind}"]["engine"] |= {"max_model_len": 40, "max_num_batched_tokens": 1500}
        runs[f"audio{kind}"]["engine"]["limit_mm_per_prompt"] = {"audio": 0}
    runs["kernel"] = request(folders["untied"]) | {"environment": {"LOWBIT_KERNEL": "none"}}
    runs["norm"]["engine"]["model_loader_extra_config"] = {"enable_weights_track": True}
    return engines(runs)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_llama_is_what_quant_load_computes(served: dict[str, Any], folders: dict[str, Path], name: str) -> None:
    require_equal(quant.load(folders[name], dtype=torch.float32), served[name], within=1e-3)


@pytest.mark.parametrize("name", ["tied", "untied", "whisper", "audio"])
def test_packed_weights_answer_as_dense_ones(served: dict[str, Any], name: str) -> None:
    """vLLM on the float checkpoint of the dequantized weights: the same greedy tokens, log-probabilities within 0.005."""
    packed, plain = served[name], served[f"{name}-dense"]
    assert isinstance(packed, list), packed
    assert isinstance(plain, list), plain
    for mine, theirs in zip(packed, plain, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        pairs = zip(mine["prompt"] + mine["logprobs"], theirs["prompt"] + theirs["logprobs"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 0.005


def test_rounded_tokens_are_near(served: dict[str, Any], folders: dict[str, Path]) -> None:
    """Rounding tokens makes big differences of small ones: `quant.load` differs as much from itself under another attention."""
    model, answers = quant.load(folders["rounded"], dtype=torch.float32), served["rounded"]
    assert isinstance(answers, list), answers
    for answer in answers:
        have = torch.tensor(answer["prompt"] + answer["logprobs"])
        likely = torch.tensor(ours(model, answer["ids"], answer["tokens"])[1])
        assert float((have - likely).abs().mean()) < 0.1


def test_whisper_is_what_quant_load_computes(served: dict[str, Any], folders: dict[str, Path]) -> None:
    """Its table is packed; vLLM looks tokens up in float and multiplies by the packed head."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folders["whisper"])
    features = extractor(np.load(folders["wave"]), sampling_rate=16_000, return_tensors="pt").input_features
    model = quant.load(folders["whisper"], dtype=torch.float32)
    require_equal(model, served["whisper"], within=1e-3, input_features=features)


def test_qwen2_audio_is_what_quant_load_computes(served: dict[str, Any], folders: dict[str, Path]) -> None:
    require_equal(quant.load(folders["audio"], dtype=torch.float32), served["audio"], within=1e-3)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("version", r"checkpoint format version 99 is unknown; this lowbit reads version 1"),
        ("architecture", r"lowbit's vLLM plugin does not serve MistralForCausalLM; it serves LlamaForCausalLM, "),
        ("mixed", r"layers\.1\.self_attn\.q_proj is .* and .*v_proj is .*, but vLLM fuses them; quantize again"),
        ("missing", r"model\.layers\.1\.self_attn\.v_proj\.weight_scale is missing from the checkpoint"),
        ("shape", r"model\.layers\.1\.self_attn\.v_proj\.weight_scale is .*\[64, 2\] on disk; int_group needs .*\[64, 4\]"),
        ("kernel", r"model\.layers\.0\.self_attn\.q_proj: no kernel for .* on cpu: .*LOWBIT_KERNEL=none excludes it"),
        ("norm", r"not initialized from checkpoint: .*layers\.1\.input_layernorm\.weight"),
    ],
)
def test_a_wrong_use_is_one_clear_line(served: dict[str, Any], name: str, line: str) -> None:
    assert isinstance(served[name], str), "it was served"
    assert re.search(line, served[name]), served[name]


def test_without_the_plugin_vllm_refuses(engines: Engines, folders: dict[str, Path]) -> None:
    said = engines({"stock": request(folders["untied"])}, VLLM_PLUGINS="none")["stock"]
    assert "Unknown quantization method: lowbit" in said


def test_two_ranks(engines: Engines, folders: dict[str, Path]) -> None:
    run = request(folders["untied"], tensor_parallel_size=2)
    answers = engines({"two": run}, VLLM_ENABLE_V1_MULTIPROCESSING="1", ranks="2")["two"]
    require_equal(quant.load(folders["untied"], dtype=torch.float32), answers, within=1e-3)
