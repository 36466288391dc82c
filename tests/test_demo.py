"""Demo models: converted exactly, pinned by hash, and never used once altered. Wheels are made here; pip finds them offline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from quant import ctranslate2, demo
from quant.demo import DEMOS, MANIFEST, Demo, fetch
from quant.models import Weights, resolve
from quant.wheels import Wheel, verified

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """`model` as GGUF: float32 norms, float16 matrices, query and key rows in the interleaved order of llama.cpp."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*controls, *LETTERS, "ab", "12"])
    writer.add_token_types([3] * 3 + [1] * (len(LETTERS) + 2))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    here = {value: key for key, value in {"token_embd": "embed_tokens", "output_norm": "norm"}.items()}
    blocks = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate"}
    blocks |= {"up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm"}
    blocks |= {"post_attention_layernorm": "ffn_norm"}
    for name, weight in model.state_dict().items():
        parts, array = name.split("."), weight.numpy()
        if name == "lm_head.weight":
            continue
        if parts[1] == "layers":
            target = f"blk.{parts[2]}.{blocks[parts[-2]]}.weight"
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parts[-2])
            if heads:
                # head by head: rows 0, half, 1, half + 1, ...
                order = np.arange(array.shape[0]).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)
                array = array[order]
        else:
            target = f"{here[parts[-2]]}.weight"
        if array.ndim == 2:
            writer.add_tensor(target, array.astype(np.float16))
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ct2(model: WhisperForConditionalGeneration) -> bytes:
    """`model` as a CTranslate2 container, float16, with the decoder's output layer as an alias."""
    state = {name.removeprefix("model."): tensor.half().numpy() for name, tensor in model.state_dict().items()}
    made: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def norm(target: str, source: str) -> None:
        made[f"{target}/gamma"], made[f"{target}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def stack(target: str, sources: list[str]) -> None:
        weights = [state[f"{source}.weight"] for source in sources]
        biases = [state.get(f"{source}.bias", np.zeros(len(weights[0]), np.float16)) for source in sources]
        made[f"{target}/weight"], made[f"{target}/bias"] = np.concatenate(weights), np.concatenate(biases)

    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        made[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        for i in range(model.config.encoder_layers):
            to, source = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norm(f"{to}/self_attention/layer_norm", f"{source}.self_attn_layer_norm")
            stack(f"{to}/self_attention/linear_0", [f"{source}.self_attn.{x}_proj" for x in "qkv"])
            stack(f"{to}/self_attention/linear_1", [f"{source}.self_attn.out_proj"])
            norm(f"{to}/ffn/layer_norm", f"{source}.final_layer_norm")
            stack(f"{to}/ffn/linear_0", [f"{source}.fc1"])
            stack(f"{to}/ffn/linear_1", [f"{source}.fc2"])
            if side == "decoder":
                norm(f"{to}/attention/layer_norm", f"{source}.encoder_attn_layer_norm")
                stack(f"{to}/attention/linear_0", [f"{source}.encoder_attn.q_proj"])
                stack(f"{to}/attention/linear_1", [f"{source}.encoder_attn.{x}_proj" for x in "kv"])
                stack(f"{to}/attention/linear_2", [f"{source}.encoder_attn.out_proj"])
    for conv in ("conv1", "conv2"):
        stack(f"encoder/{conv}", [f"encoder.{conv}"])

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    blob = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(made))
    for name, array in made.items():
        blob += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        blob += struct.pack("<BI", 4, array.nbytes) + array.tobytes()
    return blob + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def whisper_files(model: WhisperForConditionalGeneration) -> dict[str, bytes]:
    """Everything a Whisper wheel holds; its tokenizer has the bytes and the special tokens."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startofprev|>", "<|notimestamps|>"]
    added = [
        {"id": len(LETTERS) + i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(special)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "vocab": {letter: i for i, letter in enumerate(LETTERS)}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "decoder": byte_level, "model": bpe}
    config = {"suppress_ids": [1], "suppress_ids_begin": [2], "alignment_heads": [[0, 0]], "lang_ids": [len(LETTERS) + 2]}
    return {
        "model.bin": write_ct2(model),
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "config.json": json.dumps(config).encode(),
    }


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """A wheel with `files` in its package, and an __init__.py that must never run."""
    package = name.replace("-", "_")
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('the wheel was imported')")
        for file, content in files.items():
            wheel.writestr(f"{package}/{file}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return Wheel(name=name, version="1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), member=package)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A random Llama whose query and key heads differ in number, so that a wrong row order changes the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS) + 5,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.half().float()  # not model.half(), which would round the rotary frequencies too
    return model


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip, and only there, looks for wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny(wheels: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Demo model `tiny`, a Llama; returns its wheel."""
    write_gguf(wheels / "tiny.gguf", llama)
    wheel = write_wheel(wheels, "tiny-llama", {"tiny.gguf": (wheels / "tiny.gguf").read_bytes()})
    monkeypatch.setitem(DEMOS, "tiny", Demo(description="t", licence="MIT", container="gguf", wheels=(wheel,)))
    return wheels / "tiny_llama-1.0-py3-none-any.whl"


def refusal(name: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        fetch(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_gguf_llama_gives_the_logits_it_was_written_from(tiny: Path, llama: LlamaForCausalLM) -> None:
    folder = resolve("demo:tiny")
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert made.config.rms_norm_eps == 1e-5
    assert made.config.tie_word_embeddings
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        expected, got = llama(ids).logits, made(ids).logits
    assert torch.equal(expected, got)
    weights = Weights(folder)
    assert {weights.dtype(name) for name in weights.names()} == {torch.float16}


def test_gguf_tokenizer_splits_digits_and_keeps_special_tokens_and_chat(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:tiny"))
    assert tokenizer("ab12<|im_end|>").tokens() == ["ab", "1", "2", "<|im_end|>"]
    text = "x  1\n\ty = 'é' 漢"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 128)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


def test_whisper_in_two_parts_gives_the_logits_it_was_written_from(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=len(LETTERS) + 7,
        d_model=128,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        init_std=0.2,
        pad_token_id=0,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config).eval()
    files = whisper_files(model)
    half = len(files["model.bin"]) // 2
    first = {**files, "model.bin.part1": files["model.bin"][:half]}
    del first["model.bin"]
    parts = (write_wheel(wheels, "w-1", first), write_wheel(wheels, "w-2", {"model.bin.part2": files["model.bin"][half:]}))
    monkeypatch.setitem(DEMOS, "speech", Demo(description="s", licence="MIT", container="ctranslate2", wheels=parts))
    folder = resolve("demo:speech")
    made = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    sound, ids = torch.randn(1, 80, 3000), torch.arange(10)[None]
    with torch.no_grad():
        expected, got = (m.half().float()(sound, decoder_input_ids=ids).logits for m in (model, made))
    assert torch.equal(expected, got)
    assert made.generation_config.suppress_tokens == [1]
    assert not made.generation_config.is_multilingual
    processor = WhisperProcessor.from_pretrained(folder)
    assert (folder / "preprocessor_config.json").is_file()
    assert processor.tokenizer.decode(processor.tokenizer(" hi").input_ids, skip_special_tokens=True) == " hi"


def test_a_container_cut_short_is_refused() -> None:
    blob = struct.pack("<I", 6) + b"\x02\x00S\0" + struct.pack("<II", 3, 1)
    tensor = b"\x02\x00w\0" + struct.pack("<BIBI", 1, 4, 4, 8) + b"\0" * 8
    assert ctranslate2.read_tensors(blob + tensor + struct.pack("<I", 0))["w"].shape == (4,)
    for cut in (2, len(blob) - 1, len(blob) + 6, len(blob + tensor) - 1):
        with pytest.raises(ValueError, match="ends at byte"):
            ctranslate2.read_tensors((blob + tensor)[:cut])


def test_a_model_already_there_is_reused(tiny: Path) -> None:
    said: list[str] = []
    folder = fetch("tiny", say=said.append)
    assert said
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    tiny.unlink()
    said.clear()
    assert fetch("tiny", say=said.append) == folder
    assert not said
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_an_altered_wheel_is_refused_and_leaves_nothing(tiny: Path, damage: str, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    content[len(content) // 2] ^= 1
    tiny.write_bytes(content if damage == "flip" else tiny.read_bytes()[:-100])
    refusal("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_our_own_hash_check_removes_the_file(tiny: Path) -> None:
    wheel = DEMOS["tiny"].wheels[0]
    assert verified(tiny, wheel) == tiny
    tiny.write_bytes(tiny.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="truncated or altered"):
        verified(tiny, wheel)
    assert not tiny.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_altered_model_is_removed_and_made_anew(tiny: Path, file: str) -> None:
    folder = fetch("tiny")
    good = (folder / file).read_bytes()
    (folder / file).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert file in refusal("tiny")
    assert not folder.exists()
    assert (fetch("tiny") / file).read_bytes() == good


def test_other_pins_mean_another_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch("tiny")
    monkeypatch.setattr(demo, "REVISION", demo.REVISION + 1)
    said: list[str] = []
    assert fetch("tiny", say=said.append) == folder
    assert "anew" in said[0]
    assert json.loads((folder / MANIFEST).read_text())["revision"] == demo.REVISION


def test_a_folder_of_the_user_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "cache" / "tiny" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    assert "move it away" in refusal("tiny")
    assert mine.read_text() == "keep"


def test_no_wheel_to_be_had(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = dataclasses.replace(DEMOS["smollm2-135m"].wheels[0], name="lowbit-absent")
    monkeypatch.setitem(DEMOS, "absent", dataclasses.replace(DEMOS["smollm2-135m"], wheels=(wheel,)))
    assert "PIP_FIND_LINKS" in refusal("absent")


def test_every_demo_is_pinned_and_described() -> None:
    for made in DEMOS.values():
        assert made.description
        assert made.licence in ("MIT", "Apache-2.0")
        assert all(len(wheel.sha256) == 64 and wheel.version for wheel in made.wheels)


def test_the_real_smollm2_knows_the_capital_of_france() -> None:
    try:
        folder = resolve("demo:smollm2-135m")
    except ValueError as error:
        if "could not download" in str(error):
            pytest.skip(f"needs a package index: {error}")
        raise
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
