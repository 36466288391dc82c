"""The layout of compressed-tensors, which stock vLLM and transformers read: our integers and scales, in its bytes.

    scheme          layout                  tensors of a linear [N, K]
    W4A16, W8A16    pack-quantized          weight_packed int32: a little-endian bit stream along K; weight_scale [N, K/G];
    W4A8            pack-quantized          weight_shape; weight_zero_point int32, a bit stream along N, where asymmetric
    W8A8            int-quantized           weight int8, weight_scale [N, 1]
    FP8             float-quantized         weight float8 E4M3, weight_scale [N, 1]
    NVFP4, MXFP4    {nv,mx}fp4-pack-...     as `fp4_block` stores them

Every integer and scale is written as it is, so a reader that computes in float32 gets the weights of `quant.load`, bit for
bit. Checked against the compressors of compressed-tensors 0.17 (vLLM 0.32) and 0.20 (transformers 5.23); nothing of that
library is needed here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant import checkpoint
from quant.api import COPIED, NOT_COPIED
from quant.checkpoint import Piece
from quant.export.packed import Export, Layer, PackedFolder, sorted_out
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.format import Codes
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp8 import Fp8
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup, pack_bits

NAME = "compressed-tensors"
INT8_ROWS = IntGroup(bits=8, group=-1, symmetric=True)
BITS = (4, 8)  # for which vLLM has kernels
MARLIN_GROUPS = (32, 64, 128, -1)
FP4_SCALES = {"nvfp4": ("tensor_group", 16, "torch.float8_e4m3fn"), "mxfp4": ("group", 32, "torch.uint8")}
# architecture -> names on disk of linears that vLLM leaves dense: modules of transformers, or layers without a quant_config
DENSE_PARTS = {
    "Qwen2Audio*": ("*audio_tower.*", "*multi_modal_projector.*"),
    "Qwen2_5Omni*": ("*audio_tower.*", "*talker.*", "*token2wav.*"),
    "Qwen3Omni*": ("*audio_tower.*", "*talker.*", "*code2wav.*"),
    "Qwen3ASR*": ("*audio_tower.*",),
    "Ultravox*": ("*audio_tower.*",),
    "GraniteSpeech*": ("*encoder.*attn.to_*",),
    "Voxtral*": ("*audio_tower.*",),
}
TIED = "engines read an input embedding, and a head that is tied to it, in float"
HEAD = "vLLM reads a packed head only under the name lm_head"
PART = "vLLM has this part of a {} in float"
ASYMMETRIC = (
    "asymmetric weights: transformers only reads them dequantized, in the precision of the scales, with "
    "from_pretrained(..., quantization_config=CompressedTensorsConfig(dequantize=True))"
)
W4A8 = "W4A8: vLLM on a CPU without AMX keeps the activations in bfloat16"
NO_CPU = "{}: vLLM has GPU kernels for it, none for CPUs"
GROUPS = "groups of {}: vLLM's Marlin kernels take 32, 64, 128 or whole rows; another of its kernels must serve this"
EXPERTS = "experts are written under the names of the source; no engine was tried on them"
ROUNDED = "{} scales: a reader that computes in {} rounds them to it; in float32 the weights are those of quant.load"

Names = tuple[str, str]  # of a linear: on disk, in memory


def refusal(layer: Layer) -> str | None:
    """Why compressed-tensors, or every engine that reads it, has no scheme for a layer; None where it has one."""
    fmt, rule = layer.format, layer.activation
    if rule.rotate:
        return "its inputs are rotated, which no engine does; quantize with --set activation.rotate=0"
    if isinstance(fmt, IntGroup) and rule.name in ("none", "int8_token"):
        if fmt.bits not in BITS:
            return f"vLLM has no kernel for {fmt.bits} bits; quantize with --set format.bits=4"
        if rule.name == "int8_token" and not fmt.symmetric:
            return "int8 activations need symmetric weights; quantize with --set format.symmetric=true"
        if rule.name == "int8_token" and fmt.bits == 8 and fmt.group != -1:
            return "W8A8 has one scale per row; quantize with --set format.group=-1"
        return None
    if isinstance(fmt, Fp4Block) and rule.name in ("none", fmt.kind):
        if isinstance(rule, NvFp4) and rule.four_six:
            return "engines map a block of tokens to 6, not to 6 or 4; quantize with --set activation.four_six=false"
        return None
    if isinstance(fmt, Fp8) and rule.name in ("none", "fp8_token"):
        return None
    if isinstance(fmt, Int4Dual) and rule.name in ("none", "int8_token"):
        return (
            "int4_dual has an integer step and a zero point under each row scale, for which there is no scheme; "
            "quantize with --set format.name=int_group"
        )
    return f"there is no scheme for {fmt.name} weights with {rule.name} activations; gptq, w8a8, fp8 and nvfp4 have one"


def as_int8(layer: Layer) -> bool:
    """Whether a refused layer is, number for number, one with int8 weights and a scale per row."""
    return (
        isinstance(layer.format, Int4Dual) and layer.activation.name in ("none", "int8_token") and not layer.activation.rotate
    )


def int8_rows(fmt: Int4Dual, codes: Codes) -> Codes:
    """int4_dual codes -> those of INT8_ROWS for the same weights: w = s1 * w8 with w8 = int8(u * s2 + o)."""
    unsigned = (fmt.integers(codes).to(torch.int16) + 128).to(torch.uint8)
    return Codes(unsigned, {"weight_scale": codes.params["row_scale"].unsqueeze(-1)})


def scheme(layer: Layer) -> dict[str, Any]:
    """The config group of a layer that is not refused, without its targets."""
    fmt, rule = layer.format, layer.activation
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None
    if isinstance(fmt, Fp4Block):
        strategy, group, dtype = FP4_SCALES[fmt.kind]
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": group}
        weights |= {"scale_dtype": dtype}
        inputs = None if rule.name == "none" else {**weights, "dynamic": "local" if fmt.kind == "nvfp4" else True}
        layout = f"{fmt.kind}-pack-quantized"
    elif isinstance(fmt, Fp8):
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "group_size": None}
        if rule.name == "fp8_token":
            inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        layout = "float-quantized"
    else:
        assert isinstance(fmt, IntGroup)
        size = (
            {"strategy": "channel", "group_size": None} if fmt.group == -1 else {"strategy": "group", "group_size": fmt.group}
        )
        weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric, **size}
        if rule.name == "int8_token":
            inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        layout = "int-quantized" if inputs and fmt.bits == 8 else "pack-quantized"
    weights["dynamic"] = False
    return {"format": layout, "weights": weights, "input_activations": inputs, "output_activations": None}


def words(layer: Layer) -> str:
    """The scheme of a layer as people call it."""
    fmt, bare = layer.format, layer.activation.name == "none"
    if isinstance(fmt, Fp4Block):
        return f"{fmt.kind.upper()}{'A16' * bare}"
    if isinstance(fmt, Fp8):
        return f"FP8{'A16' * bare}"
    assert isinstance(fmt, IntGroup)
    size = "one scale per row" if fmt.group == -1 else f"groups of {fmt.group}"
    return f"W{fmt.bits}A{16 if bare else 8}, {size}, {'symmetric' if fmt.symmetric else 'asymmetric'}"


def int32_stream(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, C] -> their little-endian bit stream in whole int32, [R, ceil(C * bits / 32)]; zeros fill the last."""
    missing = -codes.shape[1] % (32 // bits)
    stream = pack_bits(nn.functional.pad(codes, (0, missing)), bits)
    return stream.flatten().view(torch.int32).view(len(codes), -1)


def pieces(folder: PackedFolder, layer: Layer, given: Layer) -> list[Piece]:
    """The tensors of a layer that is not refused. given: the layer as `folder` has it, where it is written wider."""
    fmt, n, k = layer.format, layer.n, layer.k

    def piece(key: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Piece:
        return Piece(f"{layer.name}.{key}", dtype, shape, make)

    if isinstance(fmt, Fp4Block):
        kept = {**fmt.fields(n, k), **layer.activation.fields(k)}
        return [piece(key, *field, partial(checked, folder, layer, key)) for key, field in kept.items()]
    if isinstance(fmt, Fp8):
        on_disk = {"weight": "weight_packed", "weight_scale": "weight_scale"}
        return [piece(key, *fmt.fields(n, k)[ours], partial(checked, folder, layer, ours)) for key, ours in on_disk.items()]
    assert isinstance(fmt, IntGroup)

    def codes() -> Codes:
        found = folder.codes(given)
        return found if given is layer else int8_rows(given.format, found)  # type: ignore[arg-type]

    groups = fmt.groups(k)
    out = [piece("weight_scale", (n, groups), fmt.scale_dtype, lambda: codes().params["weight_scale"])]
    if scheme(layer)["format"] == "int-quantized":
        return [*out, piece("weight", (n, k), torch.int8, lambda: (codes().codes ^ 128).view(torch.int8))]
    per_word = 32 // fmt.bits
    packed = (n, -(-k // per_word))
    out.append(piece("weight_packed", packed, torch.int32, lambda: int32_stream(codes().codes, fmt.bits)))
    out.append(piece("weight_shape", (2,), torch.int64, lambda: torch.tensor([n, k])))
    if not fmt.symmetric:
        shape = (-(-n // per_word), groups)
        out.append(
            piece("weight_zero_point", shape, torch.int32, lambda: int32_stream(codes().params["weight_zero"].T, fmt.bits).T)
        )
    return out


def checked(folder: PackedFolder, layer: Layer, key: str) -> Tensor:
    """One of a layer's tensors as it is, after its values were checked."""
    fields = folder.fields(layer)
    return fields[key] if key in fields else folder.read(f"{layer.name}.{key}")


def select(wanted: Iterable[Names], others: Iterable[Names]) -> list[str]:
    """Targets that match all the wanted linears, by either name, and none of the others.

    Regular expressions for the last component where that is enough, because readers see other names in front of it; else
    for the whole name with any block number; else the names themselves. A component is matched whole: `v_proj$` alone would
    also match the `qkv_proj` of vLLM.
    """
    taken = {name for names in others for name in names}
    by_leaf: dict[str, list[Names]] = {}
    for names in wanted:
        by_leaf.setdefault(names[0].rpartition(".")[2], []).append(names)
    found: list[str] = []
    for leaf, members in by_leaf.items():
        spelled = list(dict.fromkeys(name for names in members for name in names))
        for patterns in ([rf"(.*[.])?{re.escape(leaf)}$"], list(dict.fromkeys(map(any_number, spelled)))):
            if not any(re.match(pattern, name) for pattern in patterns for name in taken):
                found += [f"re:{pattern}" for pattern in patterns]
                break
        else:
            found += spelled
    return found


def any_number(name: str) -> str:
    """A regular expression for the same layer of every block."""
    return "[.]".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) + "$"


def floats(folder: PackedFolder, packed: Iterable[Layer]) -> list[Names]:
    """What readers might take for a linear to quantize and is none: linears in memory, matrices on disk."""
    on_disk = {layer.name for layer in packed}
    in_memory = {layer.module for layer in packed}
    disk = {layer.module: layer.name for layer in folder.layers}
    tables = {name for name, module in folder.model.named_modules() if isinstance(module, nn.Embedding)}
    linears = {name for name, module in folder.model.named_modules() if isinstance(module, nn.Linear)} - in_memory
    matrices = {n.removesuffix(".weight") for n, e in folder.rest.items() if n.endswith(".weight") and len(e.shape) == 2}
    matrices -= tables | on_disk
    return [(disk.get(name, name), name) for name in sorted(linears)] + [(n, n) for n in sorted(matrices - linears)]


def config_section(folder: PackedFolder, packed: list[Layer], head: str | None) -> dict[str, Any]:
    """The quantization_config. head: the packed head's name on disk; it is no "Linear" to vLLM and gets a target by name."""
    groups: dict[str, list[Layer]] = {}
    for layer in packed:
        key = json.dumps(scheme(layer), sort_keys=True) + ("head" if layer.name == head else "")
        groups.setdefault(key, []).append(layer)
    rest = floats(folder, packed)
    kinds = sum(head not in {layer.name for layer in members} for members in groups.values())
    config_groups = {}
    for i, (key, members) in enumerate(groups.items()):
        others = [(la.name, la.module) for other, las in groups.items() if other != key for la in las]
        # vLLM asks for the class of a fused layer before it asks for its parts: one scheme for all linears, or only names
        general = kinds == 1 and members[0].name != head
        targets = ["Linear"] if general else select([(la.name, la.module) for la in members], [*others, *rest])
        config_groups[f"group_{i}"] = {"targets": targets, **scheme(members[0])}
    layouts = {group["format"] for group in config_groups.values()}
    return {
        "quant_method": NAME,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": select(rest, [(layer.name, layer.module) for layer in packed]),
        "kv_cache_scheme": None,
        "lowbit": folder.provenance(),
    }


def dense_part(folder: PackedFolder, layer: Layer, head: str | None) -> str | None:
    """Why a layer is dense for every engine, whatever its scheme; None where it is not."""
    if layer.table:
        return TIED
    if layer.module == head and layer.name.rpartition(".")[2] != "lm_head":
        return HEAD
    for architecture, parts in DENSE_PARTS.items():
        if fnmatchcase(folder.cls.__name__, architecture) and any(fnmatchcase(layer.name, part) for part in parts):
            return PART.format(folder.cls.__name__)
    return None


def notes(folder: PackedFolder, packed: list[Layer]) -> list[str]:
    """What readers make of these schemes that their users should know."""
    found: dict[str, None] = {}
    if any(".experts." in layer.name for layer in packed):
        found[EXPERTS] = None
    for layer in packed:
        fmt, bare = layer.format, layer.activation.name == "none"
        if isinstance(fmt, Fp4Block):
            found[NO_CPU.format(words(layer))] = None
        if not isinstance(fmt, IntGroup):
            continue
        if not fmt.symmetric:
            found[ASYMMETRIC] = None
        if fmt.bits == 8 and bare:
            found[NO_CPU.format("W8A16")] = None
        if fmt.bits == 4 and not bare:
            found[W4A8] = None
        if fmt.group not in MARLIN_GROUPS:
            found[GROUPS.format(fmt.group)] = None
        narrow = torch.bfloat16 if fmt.scale_dtype == torch.float16 else folder.dtype
        if folder.dtype == narrow != fmt.scale_dtype and (bare or fmt.bits == 4):
            found[ROUNDED.format(*(str(d).removeprefix("torch.") for d in (fmt.scale_dtype, narrow)))] = None
    return list(found)


def head_of(model: Any) -> str | None:
    """Name in memory of the output head, where the model has one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def write(source: Path, out: Path, widen: bool) -> Export:
    """Write the folder `out` from a folder of ours. widen: see `command.py`.

    Raises ValueError, before any weight is read, for a layer that no scheme holds.
    """
    folder = PackedFolder(source)
    head = head_of(folder.model)
    export = Export(dtype=str(folder.dtype).removeprefix("torch."))
    parts = {layer.name: why for layer in folder.layers if (why := dense_part(folder, layer, head)) is not None}
    wide = sorted_out(folder, lambda layer: None if layer.name in parts else refusal(layer), NAME, widen)
    made: list[Piece] = [Piece(name, entry.dtype, entry.shape, entry) for name, entry in folder.rest.items()]
    packed: list[Layer] = []
    for layer in folder.layers:
        if layer.name in parts or (layer.name in wide and not as_int8(layer)):
            dense = partial(folder.dense, layer, folder.dtype)
            piece = Piece(f"{layer.name}.weight", folder.dtype, (layer.n, layer.k), dense)
            made.append(piece)
            export.add_dense(parts.get(layer.name) or wide[layer.name], layer.name, piece.nbytes)
            continue
        written = replace(layer, format=INT8_ROWS) if layer.name in wide else layer
        tensors = pieces(folder, written, layer)
        made += tensors
        packed.append(written)
        wider = ", the same weights as int4_dual" if layer.name in wide else ""
        export.add_packed(words(written) + wider, sum(piece.nbytes for piece in tensors))
    if not packed:
        raise ValueError(f"no layer of {source} can stay packed for {NAME}: {next(iter(export.dense))}")
    export.notes.extend(notes(folder, packed))
    config = dict(folder.config)
    config["quantization_config"] = config_section(folder, packed, next((la.name for la in packed if la.module == head), None))
    unfinished = out.with_name(f"{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    checkpoint.write(unfinished, made)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (unfinished / "README.md").write_text(card(folder, out, export), encoding="utf-8")
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in COPIED and path.name not in NOT_COPIED:
            shutil.copyfile(path, unfinished / path.name)
    if out.is_dir():
        out.rmdir()
    os.replace(unfinished, out)
    return export


CARD = """---
library_name: transformers
tags: [quantized, compressed-tensors]
{base}---

# {name}

{origin}, quantized by [lowbit](https://pypi.org/project/lowbit/){recipe} and written in the layout of compressed-tensors:

    vllm serve {name}

transformers reads it with compressed-tensors installed.

{lines}
"""


def card(folder: PackedFolder, out: Path, export: Export) -> str:
    """The README.md."""
    origin = folder.provenance()
    source = origin.get("source")
    return CARD.format(
        base=f"base_model: {source}\n" if source else "",
        name=out.name,
        origin=f"`{source}`" if source else f"A {folder.cls.__name__}",
        recipe=f" with recipe `{origin['recipe']}`" if "recipe" in origin else "",
        lines="\n".join(f"- {line}" for line in export.lines()),
    )
