"""`quantize export --to gguf`: ggml dequantizes to our weights, bit for bit, and llama.cpp tokenizes as we do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant.cli import main
from quant.export import gguf_tokenizer
from quant.export.packed import PackedFolder
from quant.gguf_llama import convert, hf_name, unpermute
from quant.kernels.activation import Activation
from quant.kernels.activations.int_token import Int4Token, Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Codes, Format
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup

PLAIN = Unquantized()
TEXTS = ["The quick brown fox, 1984 times 20!", "  don't\n\nstop\t", "é ñ 漢字 🙂", "</s>the dog"]


class PowerSteps(IntGroup):
    """int_group with steps that are powers of two: zero * step is a float16 whatever the zero point."""

    def storable(self, step: torch.Tensor) -> torch.Tensor:
        return 2.0 ** torch.ceil(torch.log2(super().storable(step)))


Q4_0 = IntGroup(bits=4, group=32, symmetric=True)
EXACT: dict[str, tuple[Format, str, float]] = {  # format, ggml type, bits per weight
    "4-bit": (Q4_0, "Q4_0", 4.5),
    "4-bit, longer groups": (IntGroup(bits=4, group=64, symmetric=True), "Q4_0", 4.5),
    "4-bit, zero points": (PowerSteps(bits=4, group=32, symmetric=False), "Q4_1", 5.0),
    "8-bit": (IntGroup(bits=8, group=32, symmetric=True), "Q8_0", 8.5),
}


def export(folder: Path, out: Path, *more: str) -> Path:
    """Run the command; it must succeed."""
    assert main(["export", str(folder), "--to", "gguf", "-o", str(out), *more]) == 0
    return out


def weights(file: Path, config: object) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in transformers -> ggml type and float32 values, as the gguf package dequantizes them."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for tensor in GGUFReader(str(file)).tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        stem = tensor.name.split(".")[-2]
        weight = unpermute(weight, heads[stem]) if stem in heads else weight
        found[hf_name(tensor.name)] = (tensor.tensor_type.name, weight)
    return found


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("tied", [False, True])
def test_ggml_dequantizes_to_our_weights(name, tied, pack, tiny, tmp_path):
    """Every tensor: the packed blocks, the 8-bit head or table, and what stays in float."""
    fmt, kind, bits = EXACT[name]
    source = tiny.llama_folder(tmp_path / "float", tied=tied)
    table = "model.embed_tokens" if tied else "lm_head"

    def scheme(layer: str) -> tuple[Format, Activation] | None:
        if layer == table:
            return IntGroup(bits=8, group=64, symmetric=True), PLAIN
        fits = not fmt.refuses(1, 96 if "down_proj" in layer else 64)
        return (fmt if fits else Q4_0, PLAIN) if ".layers." in layer else None

    packed = pack(source, tmp_path / "packed", scheme)
    folder = PackedFolder(packed)
    found = weights(export(packed, tmp_path / "model.gguf"), folder.auto)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    if tied:
        del dense["lm_head.weight"]
    assert found.keys() == dense.keys()
    layers = {f"{layer.module}.weight": layer for layer in folder.layers}
    for key, (given, weight) in found.items():
        layer = layers.get(key)
        wanted = dense[key] if layer is None else folder.dense(layer, torch.float32)
        assert torch.equal(weight, wanted), key
        if layer is not None:
            assert given == ("Q8_0" if layer.name == table else kind if layer.format.config() == fmt.config() else "Q4_0")
    size = next(t for t in GGUFReader(str(tmp_path / "model.gguf")).tensors if t.name == "blk.0.attn_q.weight")
    assert 8 * size.n_bytes / size.n_elements == bits


@pytest.mark.parametrize(
    ("fmt", "rule", "why"),
    [
        (Q4_0, Unquantized(rotate=32), "inputs are rotated.*--set activation.rotate=0"),
        (Q4_0, Int4Token(), "8-bit activations, not int4_token"),
        (IntGroup(bits=3, group=32, symmetric=True), PLAIN, "no type of 3-bit int_group"),
        (IntGroup(bits=4, group=48, symmetric=True), PLAIN, "do not divide groups of 48.*format.group=32"),
        (IntGroup(bits=4, group=-1, symmetric=True), PLAIN, "row scales are float32.*format.group=32"),
        (IntGroup(bits=4, group=32, symmetric=False), PLAIN, r"inexact for [\d,]+ of 192 groups.*format.symmetric=true"),
        (IntGroup(bits=8, group=32, symmetric=False), PLAIN, "Q8_0 has no zero points"),
        (Int4Dual(group=32), Int8Token(), "no type of int4_dual"),
        (Fp4Block(kind="mxfp4"), PLAIN, "no type of fp4_block"),
    ],
)
def test_what_ggml_cannot_hold_is_refused_in_one_line_or_written_wider(pack, llama, tmp_path, capsys, fmt, rule, why):
    """With --widen: as int8 where codes less zero points are exactly that, else in float32, its rotation undone."""
    odd = "model.layers.0.mlp.down_proj"

    def scheme(name: str) -> tuple[Format, Activation] | None:
        return (fmt, rule) if name == odd else (Q4_0, PLAIN) if ".layers." in name else None

    packed = pack(llama, tmp_path / "packed", scheme)
    assert main(["export", str(packed), "--to", "gguf", "-o", str(tmp_path / "x.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"{re.escape(odd)} cannot be written for gguf: .*{why}.*--widen", error)
    assert not list(tmp_path.glob("x.gguf*"))
    folder = PackedFolder(packed)
    found = weights(export(packed, tmp_path / "x.gguf", "--widen"), folder.auto)
    layer = next(layer for layer in folder.layers if layer.name == odd)
    kind, weight = found[f"{odd}.weight"]
    assert torch.equal(weight, folder.dense(layer, torch.float32))
    low = isinstance(fmt, IntGroup) and fmt.bits < 8 and fmt.group == 32
    assert kind == ("Q8_0" if low and rule is PLAIN else "F32")


def test_negative_scales_keep_their_sign(pack, llama, tmp_path, monkeypatch):
    """Refitted symmetric grids have them."""

    def nearest(self: IntGroup, weight: torch.Tensor) -> Codes:
        codes = IntGroup(**{k: v for k, v in self.config().items() if k != "name"}).nearest_positive(weight)
        return Codes(
            (16 - codes.codes.to(torch.int16)).clamp(0, 15).to(torch.uint8), {"weight_scale": -codes.params["weight_scale"]}
        )

    monkeypatch.setattr(IntGroup, "nearest_positive", IntGroup.nearest, raising=False)
    monkeypatch.setattr(IntGroup, "nearest", nearest)
    packed = pack(llama, tmp_path / "packed", lambda name: (Q4_0, PLAIN) if ".layers." in name else None)
    folder = PackedFolder(packed)
    assert float(folder.fields(folder.layers[0])["weight_scale"].max()) < 0
    found = weights(export(packed, tmp_path / "x.gguf"), folder.auto)
    for layer in folder.layers:
        assert torch.equal(found[f"{layer.name}.weight"][1], folder.dense(layer, torch.float32))


@pytest.fixture
def file(pack, llama, tmp_path) -> Path:
    """A tiny exported Llama."""
    packed = pack(llama, tmp_path / "packed", lambda name: (Q4_0, PLAIN) if ".layers." in name else None)
    return export(packed, tmp_path / "model.gguf")


def test_our_reader_gets_configuration_and_tokenizer_back(file, llama, tmp_path):
    (tmp_path / "back").mkdir()
    convert(file, tmp_path / "back")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (llama, tmp_path / "back"))
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids
    assert after.eos_token_id == before.eos_token_id
    wanted, config = (json.loads((folder / "config.json").read_text()) for folder in (llama, tmp_path / "back"))
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert config[key] == wanted[key], key


def test_llama_cpp_tokenizes_and_predicts_as_we_do(file, llama, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for text in TEXTS:
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text
    ids = tokenizer(TEXTS[0]).input_ids
    engine.eval(ids)
    got = torch.tensor(engine.scores[: len(ids)])
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    folder = PackedFolder(tmp_path / "packed")
    for layer in folder.layers:
        model.get_submodule(layer.module).weight.data = folder.dense(layer, torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0]
    assert float((got - wanted).norm() / wanted.norm()) < 0.05  # its activations have 8 bits


def test_a_tokenizer_that_gguf_cannot_hold_is_refused(llama, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(llama, folder)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    for change, why in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by a rule that is not known"),
        ({"normalizer": {"type": "NFC"}}, "a normalizer"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "tokenizer is WordLevel"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=why):
            gguf_tokenizer.read(folder)


def test_another_architecture_is_refused(pack, tiny, tmp_path, capsys):
    source = tiny.whisper_folder(tmp_path / "float")
    packed = pack(source, tmp_path / "packed", lambda name: (Q4_0, PLAIN) if ".layers." in name else None)
    assert main(["export", str(packed), "--to", "gguf", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "WhisperForConditionalGeneration; GGUF files are written for LlamaForCausalLM only" in capsys.readouterr().err
