"""A GGUF file for llama.cpp, where ggml has a type that holds our integers and scales exactly.

    ggml type   a block of 32 along K                          ours
    Q4_0        float16 d, codes u      w = d * (u - 8)        int_group 4 bit symmetric
    Q4_1        float16 d and m         w = d * u + m          int_group 4 bit asymmetric, where m = -zero * d is a float16
    Q8_0        float16 d, int8 q       w = d * q              int_group 8 bit symmetric

Groups of 64, 96 and so on are blocks with equal d. llama.cpp rounds the activations of all of them to 8 bits in blocks of 32
as it multiplies, whatever the recipe says of activations. (ggml-common.h of llama.cpp for the layouts.)
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quant import gguf_writer
from quant.export import gguf_tokenizer
from quant.export.packed import Export, Layer, PackedFolder, sorted_out
from quant.gguf_writer import Stored
from quant.kernels.formats.int_group import IntGroup

BLOCK = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
QUANTIZATION_VERSION = 2  # of ggml's block layouts
ROUNDS = "llama.cpp rounds activations to 8 bits in blocks of 32 when it multiplies, whatever the recipe said"


def kind_of(fmt: IntGroup) -> str:
    """The ggml type with the codes of a format."""
    if fmt.bits == 8:
        return "Q8_0"
    return "Q4_0" if fmt.symmetric else "Q4_1"


def refusal(folder: PackedFolder, layer: Layer) -> str | None:
    """Why ggml has no type that holds a layer exactly; None where it has one. Reads scales and zero points."""
    fmt, rule = layer.format, layer.activation
    if rule.rotate:
        return "its inputs are rotated, which llama.cpp does not do; quantize with --set activation.rotate=0"
    if rule.name not in ("none", "int8_token"):
        return f"llama.cpp has 8-bit activations, not {rule.name}; quantize with --set activation=none"
    if not isinstance(fmt, IntGroup) or fmt.bits not in (4, 8):
        what = f"{fmt.bits}-bit int_group" if isinstance(fmt, IntGroup) else fmt.name
        return f"ggml has no type of {what}; quantize with --recipe gptq --set format.symmetric=true"
    if reason := unscaled(folder, layer):
        return reason
    if fmt.symmetric:
        return None
    if fmt.bits == 8:
        return "Q8_0 has no zero points; quantize with --set format.symmetric=true"
    scale, zero = (folder.read(f"{layer.name}.{key}") for key in ("weight_scale", "weight_zero"))
    offset = scale.float() * zero.float()
    inexact = int((offset.half().float() != offset).sum())
    if not inexact:
        return None
    return (
        f"Q4_1 has zero * scale as a float16, which is inexact for {inexact:,} of {offset.numel():,} groups; "
        "quantize with --set format.symmetric=true"
    )


def unscaled(folder: PackedFolder, layer: Layer) -> str | None:
    """Why the groups of an int_group layer are no blocks of ggml; None where they are."""
    fmt = layer.format
    assert isinstance(fmt, IntGroup)
    group = layer.k if fmt.group == -1 else fmt.group
    if group % BLOCK:
        return f"ggml has blocks of {BLOCK}, which do not divide groups of {group}; quantize with --set format.group=32"
    scale = folder.read(f"{layer.name}.weight_scale")
    if not torch.equal(scale.half().to(scale.dtype), scale):
        return "ggml has float16 scales, its row scales are float32; quantize with --set format.group=32"
    return None


def fits_int8(folder: PackedFolder, layer: Layer) -> bool:
    """Whether a refused layer is exactly one of Q8_0: codes less their zero points as int8."""
    fmt = layer.format
    plain = isinstance(fmt, IntGroup) and fmt.bits < 8 and not layer.activation.rotate
    return plain and layer.activation.name in ("none", "int8_token") and unscaled(folder, layer) is None


def blocks(folder: PackedFolder, layer: Layer, kind: str) -> Tensor:
    """The rows of a layer as blocks of a ggml type that holds them, uint8 [N, K / 32 * bytes of a block]."""
    fmt = layer.format
    assert isinstance(fmt, IntGroup)
    codes = folder.codes(layer)
    n, count = layer.n, layer.k // BLOCK
    u = codes.codes.view(n, count, BLOCK)
    scale = codes.params["weight_scale"].half()
    repeat = count // scale.shape[1]
    head = [scale]
    zero = codes.params.get("weight_zero", torch.full_like(scale, 2 ** (fmt.bits - 1), dtype=torch.uint8))
    if kind == "Q8_0":
        shift = zero.repeat_interleave(repeat, 1).unsqueeze(-1).to(torch.int16)
        body = (u.to(torch.int16) - shift).to(torch.int8).view(torch.uint8)
    else:
        body = u[..., : BLOCK // 2] | u[..., BLOCK // 2 :] << 4
        if kind == "Q4_1":
            head.append(-(scale.float() * zero.float()).half())
    numbers = [part.repeat_interleave(repeat, 1).unsqueeze(-1).view(torch.uint8) for part in head]
    return torch.cat([*numbers, body], -1).view(n, -1)


def write(source: Path, out: Path, widen: bool) -> Export:
    """Write the file `out` from a folder of ours. widen: see `command.py`.

    Raises ValueError, before any code is read, for another architecture, a tokenizer that is not known, and a layer that no
    ggml type holds.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file, such as {out / 'model.gguf'}")
    folder = PackedFolder(source)
    gguf_writer.require_llama(source, folder.auto, folder.cls)
    tokenizer = gguf_tokenizer.read(source)
    dense = torch.float16 if folder.dtype == torch.float16 else torch.float32
    export = Export(dtype=str(dense).removeprefix("torch."), notes=[ROUNDS])
    wide = sorted_out(folder, lambda layer: refusal(folder, layer), "gguf", widen)
    tensors = [
        gguf_writer.lossless(name, entry.shape, entry.dtype, partial(folder.read, name)) for name, entry in folder.rest.items()
    ]
    for layer in folder.layers:
        name = f"{layer.name}.weight"
        if layer.name in wide and not fits_int8(folder, layer):
            tensor = gguf_writer.lossless(name, (layer.n, layer.k), dense, partial(folder.dense, layer, dense))
            export.add_dense(wide[layer.name], layer.name, tensor.nbytes)
        else:
            assert isinstance(layer.format, IntGroup)
            kind = "Q8_0" if layer.name in wide else kind_of(layer.format)
            shape = (layer.n, layer.k // BLOCK * BLOCK_BYTES[kind])
            tensor = Stored(name=name, shape=shape, dtype=torch.uint8, kind=kind, make=partial(blocks, folder, layer, kind))
            why = f" ({wide[layer.name].partition(';')[0]})" if layer.name in wide else ""
            export.add_packed(kind + why, tensor.nbytes)
        tensors.append(tensor)

    def describe(writer: object) -> None:
        gguf_tokenizer.add(writer, tokenizer, folder.auto.vocab_size)
        writer.add_quantization_version(QUANTIZATION_VERSION)  # type: ignore[attr-defined]
        writer.add_name(out.stem)  # type: ignore[attr-defined]

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.partial")
    gguf_writer.write(folder.auto, tensors, unfinished, describe)
    os.replace(unfinished, out)
    return export
