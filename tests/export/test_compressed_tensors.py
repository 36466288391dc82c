"""`quantize export --to compressed-tensors`: the bytes of the library's own compressor, and what its readers make of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quant
from quant.cli import main
from quant.export.compressed_tensors import INT8_ROWS, int32_stream, select
from quant.export.packed import PackedFolder
from quant.kernels.activation import Activation
from quant.kernels.activations.fp8_token import Fp8Token
from quant.kernels.activations.int_token import Int4Token, Int8Token
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.none import Unquantized
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.format import Format
from quant.kernels.formats.fp4_block import BIAS, Fp4Block
from quant.kernels.formats.fp8 import Fp8
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup

ROOT = Path(quant.__file__).parents[1]
PLAIN, INT8 = Unquantized(), Int8Token()
SCHEMES: dict[str, tuple[Format, Activation]] = {
    "W4A16": (IntGroup(bits=4, group=32, symmetric=True), PLAIN),
    "W4A16-rows": (IntGroup(bits=4, group=-1, symmetric=True), PLAIN),
    "W4A16-asymmetric": (IntGroup(bits=4, group=16, symmetric=False), PLAIN),
    "W8A16": (IntGroup(bits=8, group=32, symmetric=True), PLAIN),
    "W8A16-asymmetric": (IntGroup(bits=8, group=-1, symmetric=False), PLAIN),
    "W8A8": (INT8_ROWS, INT8),
    "W4A8": (IntGroup(bits=4, group=32, symmetric=True), INT8),
    "FP8": (Fp8(), Fp8Token()),
    "FP8A16": (Fp8(), PLAIN),
    "NVFP4A16": (Fp4Block(kind="nvfp4"), PLAIN),
    "NVFP4": (Fp4Block(kind="nvfp4"), NvFp4()),
    "MXFP4A16": (Fp4Block(kind="mxfp4"), PLAIN),
    "MXFP4": (Fp4Block(kind="mxfp4"), MxFp4()),
    "dual": (Int4Dual(group=32), INT8),
}
COPIES = {"installed": None, "other": os.environ.get("LOWBIT_COMPRESSED_TENSORS")}
IDS = [[7, 3, 300, 12, 9, 55, 120, 8]]


def in_blocks(name: str) -> bool:
    """A linear of a block of the tiny Llama."""
    return ".layers." in name


def dtype_of(name: str) -> torch.dtype:
    """In which transformers can run a scheme: the library always unpacks 4-bit floats to bfloat16."""
    return torch.bfloat16 if isinstance(SCHEMES[name][0], Fp4Block) else torch.float32


def export(folder: Path, out: Path, *more: str) -> Path:
    """Run the command; it must succeed."""
    assert main(["export", str(folder), "--to", "compressed-tensors", "-o", str(out), *more]) == 0
    return out


@pytest.fixture(scope="module")
def exported(pack: Any, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """exported(scheme): the float folder, the packed one, the exported one. Untied, the head stays in float."""
    made: dict[str, tuple[Path, Path, Path]] = {}
    root = tmp_path_factory.mktemp("ct")
    source = tiny.llama_folder(root / "float", layers=2)

    def folders(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            packed = pack(source, root / name, lambda layer: SCHEMES[name] if in_blocks(layer) else None)
            more = ["--widen"] if name == "dual" else []
            made[name] = source, packed, export(packed, root / f"{name}-ct", *more)
        return made[name]

    return folders


def given_to_compressor(folder: PackedFolder, layer: Any, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear as the library's users have it before compression: float weight and quantization parameters."""
    if isinstance(layer.format, Int4Dual):
        codes = folder.codes(layer)
        return {"weight": folder.dense(layer, torch.float32), "weight_scale": codes.params["row_scale"][:, None]}
    fields = folder.fields(layer)
    if not isinstance(layer.format, Fp4Block):
        given = {"weight": folder.dense(layer, torch.float32), "weight_scale": fields["weight_scale"]}
        if "weight_zero" in fields:
            middle = 2 ** (layer.format.bits - 1)
            given["weight_zero_point"] = (fields["weight_zero"].to(torch.int16) - middle).to(torch.int8)
        return given
    given = {"weight": source[f"{layer.name}.weight"].float()}  # its negative zeros are codes of their own
    if layer.format.kind == "mxfp4":
        return given | {"weight_scale": 2.0 ** (fields["weight_scale"].float() - BIAS)}
    return given | {"weight_scale": fields["weight_scale"].float(), "weight_global_scale": fields["weight_global_scale"]}


@pytest.fixture(scope="module", params=COPIES)
def answers(request: Any, exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one copy of compressed-tensors answered about every scheme: a folder of files."""
    copy = COPIES[request.param]
    if request.param == "installed":
        pytest.importorskip("compressed_tensors")
    elif copy is None:
        pytest.skip("LOWBIT_COMPRESSED_TENSORS names no folder with another copy")
    root = tmp_path_factory.mktemp("answers")
    tasks: dict[str, list[Any]] = {"compress": [], "load": []}
    for name in SCHEMES:
        source, packed, out = exported(name)
        floats, folder = load_file(source / "model.safetensors"), PackedFolder(packed)
        (group,) = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
        del group["targets"]
        for layer in folder.layers[:7]:
            files = [str(root / f"{name}.{layer.name}.{end}") for end in ("given", "made")]
            save_file(given_to_compressor(folder, layer, floats), files[0])
            tasks["compress"].append({"group": group, "given": files[0], "out": files[1]})
        if request.param == "installed":
            how = {"dtype": str(dtype_of(name)).removeprefix("torch."), "dequantize": "asymmetric" in name}
            tasks["load"].append({"folder": str(out), "ids": IDS, "out": str(root / name), **how})
    (root / "request.json").write_text(json.dumps(tasks))
    path = os.pathsep.join([*([copy] if copy else []), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    worker = [sys.executable, str(Path(__file__).with_name("ct_worker.py")), str(root / "request.json")]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", SCHEMES)
def test_the_bytes_are_those_of_the_librarys_compressor(name, answers, exported):
    _, packed, out = exported(name)
    written = load_file(out / "model.safetensors")
    for layer in PackedFolder(packed).layers[:7]:
        wanted = load_file(answers / f"{name}.{layer.name}.made")
        given = {key.rpartition(".")[2]: v for key, v in written.items() if key.startswith(f"{layer.name}.")}
        inputs = given.pop("input_global_scale", None)
        assert (inputs is not None) == (name == "NVFP4")
        assert given.keys() == wanted.keys()
        for key, value in wanted.items():
            assert given[key].dtype == value.dtype, (layer.name, key)
            assert torch.equal(given[key].view(torch.uint8), value.view(torch.uint8)), (layer.name, key)


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_computes_with_the_weights_of_ours(name, answers, exported):
    """Weight by weight and logit by logit; the tokens in floats, because each engine rounds them in its way.

    Asymmetric weights have to be dequantized on loading, and transformers does that in the dtype of the scales.
    """
    if not (answers / name).exists():
        pytest.skip("only the installed copy is transformers' own")
    source, packed, _ = exported(name)
    found, folder = load_file(answers / name), PackedFolder(packed)
    dtype = dtype_of(name)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    for layer in folder.layers:
        inner = layer.format.scale_dtype if "asymmetric" in name else dtype
        weight = folder.dense(layer, inner).to(dtype)
        dense.get_submodule(layer.module).weight.data = weight
        assert found[f"{layer.module}.weight"].dtype == dtype
        assert torch.equal(found[f"{layer.module}.weight"], weight), layer.name
    with torch.no_grad():
        assert torch.equal(found["logits"], dense(torch.tensor(IDS)).logits)
    assert torch.equal(found["served"], found["logits"]) == (SCHEMES[name][1].name == "none")


def test_int4_dual_is_exactly_its_int8_weights(exported):
    _, packed, out = exported("dual")
    written, folder = load_file(out / "model.safetensors"), PackedFolder(packed)
    for layer in folder.layers:
        w8, scale = written[f"{layer.name}.weight"], written[f"{layer.name}.weight_scale"]
        assert w8.dtype == torch.int8
        assert torch.equal(w8.float() * scale, folder.dense(layer, torch.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stream_that_fills_no_word_ends_in_zeros(bits):
    codes = torch.randint(1, 2**bits, (3, 13), dtype=torch.uint8)
    words = int32_stream(codes, bits)
    assert words.shape == (3, -(-13 * bits // 32))
    for row, column in ((0, 0), (1, 7), (2, 12)):
        word, at = divmod(column * bits, 32)
        assert (int(words[row, word]) & 0xFFFFFFFF) >> at & (2**bits - 1) == int(codes[row, column])
    assert int(words[0, -1]) & 0xFFFFFFFF < 2 ** (13 * bits % 32)


def test_targets_match_what_is_meant_and_nothing_else():
    """By both names, and not the fused layers of vLLM whose names only end alike."""
    packed = [(f"a.layers.{i}.attn.{p}", f"model.a.layers.{i}.attn.{p}") for i in range(12) for p in ("v_proj", "o_proj")]
    wider = [(f"a.layers.{i}.mlp.o_proj", f"model.a.layers.{i}.mlp.o_proj") for i in range(12)]
    found = select(packed, wider)
    assert len(found) == 3  # v_proj by its leaf, o_proj by either whole name
    patterns = [target.removeprefix("re:") for target in found]

    def hit(name: str) -> bool:
        return any(re.match(pattern, name) for pattern in patterns)

    assert all(hit(name) for names in packed for name in names)
    assert not any(hit(name) for names in wider for name in names)
    assert not hit("a.layers.3.attn.qkv_proj")
    assert select([("a.layers.1.o", "a.layers.1.o")], [("a.layers.2.o", "a.layers.2.o")]) == ["a.layers.1.o"]


def section_of(out: Path) -> dict[str, Any]:
    """The quantization_config of an exported folder."""
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return found


def test_one_scheme_has_one_general_group_and_the_head_is_ignored(exported):
    section = section_of(exported("W4A16")[2])
    assert [group["targets"] for group in section["config_groups"].values()] == [["Linear"]]
    assert section["ignore"] == ["re:(.*[.])?lm_head$"]
    assert section["format"] == "pack-quantized"


def test_several_schemes_are_all_named(pack, llama, tmp_path):
    """vLLM asks for the class of a fused layer before its parts, so no group may be general."""

    def scheme(name: str) -> tuple[Format, Activation] | None:
        if not in_blocks(name) or ".layers.1." in name:
            return None
        return SCHEMES["W8A8" if ".mlp." in name else "W4A16"]

    section = section_of(export(pack(llama, tmp_path / "packed", scheme), tmp_path / "out"))
    assert section["format"] == "mixed-precision"
    targets = [t for group in section["config_groups"].values() for t in group["targets"]]
    assert "Linear" not in targets
    model = AutoModelForCausalLM.from_pretrained(llama)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        hits = [any(re.match(t.removeprefix("re:"), name) for t in g["targets"]) for g in section["config_groups"].values()]
        ignored = any(re.match(t.removeprefix("re:"), name) for t in section["ignore"])
        assert ignored == (scheme(name) is None), name
        if not ignored:
            kinds = [group["format"] for group, hit in zip(section["config_groups"].values(), hits, strict=True) if hit]
            assert kinds == ["int-quantized" if ".mlp." in name else "pack-quantized"], name


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_head_has_a_group_of_its_own_and_a_tied_one_is_dense(pack, tiny, tmp_path, tied, capsys):
    source = tiny.llama_folder(tmp_path / "float", tied=tied)
    head = IntGroup(bits=8, group=32, symmetric=True)
    table = "model.embed_tokens" if tied else "lm_head"

    def scheme(name: str) -> tuple[Format, Activation] | None:
        return (head, PLAIN) if name == table else SCHEMES["W4A16"] if in_blocks(name) else None

    packed = pack(source, tmp_path / "packed", scheme)
    out = export(packed, tmp_path / "out")
    written, section = load_file(out / "model.safetensors"), section_of(out)
    said = capsys.readouterr().out
    if tied:
        folder = PackedFolder(packed)
        layer = next(layer for layer in folder.layers if layer.table)
        assert torch.equal(written[f"{table}.weight"], folder.dense(layer, torch.bfloat16))
        assert section["ignore"] == ["re:(.*[.])?lm_head$"]
        assert "dense in bfloat16: model.embed_tokens (1 weight, 40,960 bytes)" in said
        assert "dense in bfloat16: model.embed_tokens (1 weight, 40,960 bytes)" in (out / "README.md").read_text()
    else:
        assert written["lm_head.weight_packed"].shape == (320, 16)
        targets = [group["targets"] for group in section["config_groups"].values()]
        assert sorted(targets) == [["Linear"], ["re:(.*[.])?lm_head$"]]
        assert section["ignore"] == []


@pytest.mark.parametrize(
    ("fmt", "rule", "why"),
    [
        (IntGroup(bits=4, group=32, symmetric=True), Unquantized(rotate=32), "inputs are rotated.*--set activation.rotate=0"),
        (IntGroup(bits=3, group=32, symmetric=True), PLAIN, "no kernel for 3 bits.*format.bits=4"),
        (IntGroup(bits=2, group=32, symmetric=True), PLAIN, "no kernel for 2 bits"),
        (IntGroup(bits=4, group=32, symmetric=False), INT8, "int8 activations need symmetric weights"),
        (IntGroup(bits=8, group=32, symmetric=True), INT8, "one scale per row.*format.group=-1"),
        (IntGroup(bits=4, group=32, symmetric=True), Int4Token(), "no scheme for int_group weights with int4_token"),
        (Int4Dual(group=32), INT8, "int4_dual has an integer step"),
        (Fp4Block(kind="nvfp4"), NvFp4(four_six=True), "activation.four_six=false"),
        (Fp4Block(kind="mxfp4"), INT8, "no scheme for fp4_block weights with int8_token"),
    ],
)
def test_what_no_scheme_holds_is_refused_in_one_line_or_written_dense(pack, llama, tmp_path, capsys, fmt, rule, why):
    """One layer of another scheme among good ones: named, and dense with --widen, its rotation undone."""
    odd = "model.layers.0.mlp.down_proj"

    def scheme(name: str) -> tuple[Format, Activation] | None:
        return (fmt, rule) if name == odd else SCHEMES["W4A16"] if in_blocks(name) else None

    packed = pack(llama, tmp_path / "packed", scheme)
    assert main(["export", str(packed), "--to", "compressed-tensors", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"{re.escape(odd)} cannot be written for compressed-tensors: .*{why}.*--widen", error)
    assert not list(tmp_path.glob("out*"))
    written = load_file(export(packed, tmp_path / "out", "--widen") / "model.safetensors")
    folder = PackedFolder(packed)
    layer = next(layer for layer in folder.layers if layer.name == odd)
    if isinstance(fmt, Int4Dual):
        assert written[f"{odd}.weight"].dtype == torch.int8
    else:
        assert torch.equal(written[f"{odd}.weight"], folder.dense(layer, torch.bfloat16))
        assert "re:model[.]layers[.]" not in str(section_of(tmp_path / "out")["config_groups"])
        assert odd in section_of(tmp_path / "out")["ignore"]
    other = next(layer for layer in folder.layers if layer.name != odd)
    assert f"{other.name}.weight_packed" in written


def test_a_folder_in_which_nothing_stays_packed_is_refused(pack, llama, tmp_path, capsys):
    turned = (IntGroup(bits=4, group=32, symmetric=True), Unquantized(rotate=32))
    packed = pack(llama, tmp_path / "packed", lambda name: turned if in_blocks(name) else None)
    assert main(["export", str(packed), "--to", "compressed-tensors", "-o", str(tmp_path / "out"), "--widen"]) == 2
    assert "can stay packed" in capsys.readouterr().err


def test_the_tower_of_a_speech_model_is_dense(pack, tmp_path, capsys):
    """Qwen2-Audio: vLLM has the audio tower and the projector from transformers, without quantization."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2AudioConfig(
        audio_config={"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 96},
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
        },
    )
    model = transformers.Qwen2AudioForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    packed = pack(tmp_path / "float", tmp_path / "packed", lambda name: SCHEMES["W4A16"] if in_blocks(name) else None)
    out = export(packed, tmp_path / "out")
    written = load_file(out / "model.safetensors")
    towers = [name for name in written if "audio_tower.layers" in name and name.endswith("proj.weight")]
    assert len(towers) == 8
    assert all(written[name].dtype == torch.bfloat16 for name in towers)
    assert sum(name.endswith(".weight_packed") for name in written) == 14
    said = capsys.readouterr().out
    assert "audio_tower.layers.*.self_attn.q_proj" in said
    assert "vLLM has this part of a Qwen2AudioForConditionalGeneration in float" in said
    section = section_of(out)
    folder = PackedFolder(packed)
    for layer in folder.layers:
        for name in (layer.name, layer.module):
            ignored = any(re.match(t.removeprefix("re:"), name) for t in section["ignore"])
            assert ignored == ("audio_tower" in name), name


def test_whisper_keeps_its_head_and_a_mixture_its_routers_in_float(pack, tiny, tmp_path, capsys):
    """proj_out is tied and on no disk; a router is no linear in memory, but one to vLLM."""
    speech = pack(
        tiny.whisper_folder(tmp_path / "whisper"), tmp_path / "w", lambda n: SCHEMES["W4A16"] if in_blocks(n) else None
    )
    section = section_of(export(speech, tmp_path / "w-ct"))
    assert section["ignore"] == ["re:(.*[.])?proj_out$"]
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"]

    def expert(name: str) -> tuple[Format, Activation] | None:
        return SCHEMES["W4A16"] if in_blocks(name) and not name.endswith("gate") else None

    mixture = pack(tiny.mixture_folder(tmp_path / "mixture"), tmp_path / "m", expert)
    out = export(mixture, tmp_path / "m-ct")
    routers = [name.removesuffix(".weight") for name in load_file(out / "model.safetensors") if name.endswith("gate.weight")]
    assert len(routers) == 2
    for name in routers:
        assert any(re.match(target.removeprefix("re:"), name) for target in section_of(out)["ignore"])
    for layer in PackedFolder(mixture).layers:
        assert not any(re.match(target.removeprefix("re:"), layer.name) for target in section_of(out)["ignore"])
    assert "no engine was tried" in capsys.readouterr().out


def test_readers_are_told_what_they_will_do(exported, pack, llama, tmp_path, capsys):
    for name, note in {
        "W4A16-asymmetric": "CompressedTensorsConfig(dequantize=True)",
        "W4A8": "keeps the activations in bfloat16",
        "W8A16": "none for CPUs",
        "W4A16": "float16 scales: a reader that computes in bfloat16 rounds them",
    }.items():
        assert note in (exported(name)[2] / "README.md").read_text(), name
    assert "reader that computes" not in (exported("W8A8")[2] / "README.md").read_text()


def test_outputs_are_not_overwritten_and_inputs_are_ours(exported, llama, tmp_path, capsys):
    _, packed, out = exported("W4A16")
    assert main(["export", str(packed), "--to", "compressed-tensors", "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export", str(llama), "--to", "compressed-tensors", "-o", str(tmp_path / "x")]) == 2
    assert "was not written by quantize" in capsys.readouterr().err
    assert main(["export", str(packed), "--to", "safetensors"]) == 2
