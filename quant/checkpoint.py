"""The artifact on disk: streamed safetensors shards, the rules in config.json, and the checks before anything is loaded.

Shards are joined from byte ranges of other files (the source's untouched tensors, the finished blocks), so writing a
checkpoint needs no memory and its size is known before the first weight is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from quant.embedding import packable, size_of
from quant.kernels import activation
from quant.kernels.activation import Activation, fields_of
from quant.kernels.format import Format, from_config
from quant.models import DTYPES, Entry, entry_bytes, read_json
from quant.naming import match
from quant.stacks import PACKED
from quant.targets import Target

METHOD = "lowbit"
VERSION = 1
SHARD_BYTES = 4 << 30
SENTINEL_SHAPE = (0,)  # no float linear has this shape, so a loader that does not know us stops at it
CODE_OF = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor to be written. source: where its bytes lie, or what makes it when its turn comes.

    None: its bytes are not there yet (planning), or it is empty.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Entry | Callable[[], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return entry_bytes(Entry(Path(), self.dtype, self.shape, 0, 0))


def shards(pieces: Sequence[Piece], limit: int = SHARD_BYTES) -> list[tuple[str, list[Piece]]]:
    """File name -> tensors. One file called model.safetensors if it fits in `limit` bytes, else numbered ones."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def header(pieces: Sequence[Piece]) -> tuple[bytes, list[Piece]]:
    """The header of a safetensors file and its tensors in file order: widest dtype first, then by name."""
    ordered = sorted(pieces, key=lambda p: (-p.dtype.itemsize, p.name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for piece in ordered:
        offsets = [at, at + piece.nbytes]
        table[piece.name] = {"dtype": CODE_OF[piece.dtype], "shape": list(piece.shape), "data_offsets": offsets}
        at += piece.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def index_text(files: Sequence[tuple[str, list[Piece]]]) -> str | None:
    """model.safetensors.index.json, or None for a single file."""
    if len(files) == 1:
        return None
    weight_map = {piece.name: file for file, pieces in files for piece in pieces}
    total = sum(piece.nbytes for _, pieces in files for piece in pieces)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def predicted_bytes(pieces: Sequence[Piece]) -> int:
    """Exact size of all weight files that `write` makes of these tensors."""
    return sum(len(header(group)[0]) + sum(p.nbytes for p in group) for _, group in shards(pieces))


def write(folder: Path, pieces: Sequence[Piece]) -> None:
    """Write the shards (and index) into `folder`, one tensor in memory at a time."""
    files = shards(pieces)
    for name, group in files:
        head, ordered = header(group)
        with (folder / name).open("wb") as out:
            out.write(head)
            for piece in ordered:
                if piece.nbytes:
                    assert piece.source is not None, f"{piece.name} was never written"
                    if isinstance(piece.source, Entry):
                        copy_range(piece.source, out)
                    else:
                        out.write(made_bytes(piece, piece.source()))
            out.flush()
            os.fsync(out.fileno())
    text = index_text(files)
    if text is not None:
        (folder / "model.safetensors.index.json").write_text(text)


def copy_range(source: Entry, out: BinaryIO, chunk: int = 1 << 22) -> None:
    """Append a tensor's bytes to an open file."""
    with source.file.open("rb") as stream:
        stream.seek(source.start)
        left = source.stop - source.start
        while left:
            data = stream.read(min(chunk, left))
            if not data:
                raise ValueError(f"{source.file} ended early; the file changed while it was read")
            out.write(data)
            left -= len(data)


def made_bytes(piece: Piece, value: Tensor) -> memoryview:
    """The bytes of a tensor that was made for a piece."""
    given, wanted = (value.dtype, tuple(value.shape)), (piece.dtype, piece.shape)
    assert given == wanted, f"{piece.name} was made as {given}, its header says {wanted}"
    return value.contiguous().flatten().view(torch.uint8).numpy().data


def sentinel(targets: Sequence[Target], disk: Mapping[str, str]) -> Piece:
    """An empty tensor under the float name of the first packed layer (`disk` maps memory to disk names)."""
    return Piece(disk[f"{targets[0].name}.weight"], torch.uint8, SENTINEL_SHAPE)


def rules_for(layers: Mapping[str, Target]) -> list[dict[str, Any]]:
    """Ordered rules, first match wins, that give back exactly the scheme of each layer (by its name on disk).

    Layers that differ only in the numbers of blocks and experts share one rule with `*` for the numbers, if all of them
    agree; else the experts of a block share one, if they agree.
    """
    rules: list[dict[str, Any]] = []
    rest = dict(layers)
    for pattern_of in (every_number, last_number):
        by_pattern: dict[str, dict[str, Target]] = {}
        for name, target in rest.items():
            by_pattern.setdefault(pattern_of(name), {})[name] = target
        general = {p: members for p, members in by_pattern.items() if one_scheme(list(members.values()))}
        rules = [{"match": pattern, **scheme(next(iter(m.values())))} for pattern, m in general.items()] + rules
        rest = {name: target for name, target in rest.items() if pattern_of(name) not in general}
    rules = [{"match": name, **scheme(target)} for name, target in rest.items()] + rules
    # a `*` also spans dots, so a pattern may reach into a neighbour; then that neighbour is named first
    config = {"rules": rules}
    wrong = [name for name, t in layers.items() if scheme_of(config, name) != (t.format, t.activation)]
    return [{"match": name, **scheme(layers[name])} for name in wrong] + rules


def every_number(name: str) -> str:
    """A pattern for the same layer of every block, and of every expert."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def last_number(name: str) -> str:
    """A pattern for the same layer of every expert of one block."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join("*" if i == numbers[-1] and len(numbers) > 1 else part for i, part in enumerate(parts))


def scheme(target: Target) -> dict[str, Any]:
    """What a rule says of a layer."""
    return {"format": target.format.config(), "activation": target.activation.config()}


def one_scheme(targets: Sequence[Target]) -> bool:
    """Whether one rule can serve all of them."""
    return all((t.format, t.activation) == (targets[0].format, targets[0].activation) for t in targets)


def quantization_config(layers: Mapping[str, Target], kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` section. `kept`: linears left in float, by disk name; they win over the rules.

    Three more keys where they apply: `bias` lists layers that have a bias although the model's class makes them without one,
    `softmax` gives the bits of attention probabilities, `token_thresholds` a number for each block, see serve/token_bits.py.
    """
    return {"quant_method": METHOD, "version": VERSION, "float": list(kept), "rules": rules_for(layers)}


def scheme_of(config: Mapping[str, Any], name: str) -> tuple[Format, Activation] | None:
    """Format and activation of the layer with that name on disk; None: it is a float layer."""
    if name in config.get("float", ()):
        return None
    for rule in config["rules"]:
        if fnmatchcase(name, rule["match"]):
            return from_config(rule["format"]), activation.from_config(rule["activation"])
    return None


def has_bias(config: Mapping[str, Any], name: str, module: nn.Module) -> bool:
    """Whether the packed layer with that name on disk has a bias: its float `module` has one, or it was given one."""
    return getattr(module, "bias", None) is not None or name in config.get("bias", ())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with a checked quantization_config. Raises ValueError for what this version cannot read."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a folder written by quantize")
    config = read_json(path)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        raise ValueError(f"{folder} was not written by quantize (quant_method is not {METHOD!r}); load it with transformers")
    require_version(section)
    return config


def require_version(section: Mapping[str, Any]) -> None:
    """Refuse a quantization_config of another format version or without rules."""
    version = section.get("version")
    if version != VERSION:
        raise ValueError(f"checkpoint format version {version!r} is unknown; this lowbit reads version {VERSION}; upgrade it")
    if not isinstance(section.get("rules"), list) or not section["rules"]:
        raise ValueError("quantization_config holds no rules; config.json is damaged, quantize again")
    if softmax_bits(section) not in (None, *range(2, 9)):
        raise ValueError(f"quantization_config has softmax {section['softmax']}; its bits must be 2 to 8: quantize again")
    token_thresholds(section)


def softmax_bits(section: Mapping[str, Any]) -> Any:
    """Bits of the codes of attention probabilities; None: they stay in float."""
    return (section.get("softmax") or {}).get("bits")


def token_thresholds(section: Mapping[str, Any]) -> list[float] | None:
    """Of each block, the least importance of a token that adaptive layers read with 8 bits; None: there are no such layers.

    Raises ValueError for what is no list of numbers.
    """
    found: Any = section.get("token_thresholds")
    if found is not None and not (isinstance(found, list) and all(type(v) is float and 0 <= v <= 2 for v in found)):
        raise ValueError("quantization_config has token_thresholds that are not numbers of 0 to 2; quantize again")
    return found


def layers_on_disk(tensors: Mapping[str, Entry]) -> list[str]:
    """Names of the packed layers of a checkpoint."""
    return [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]


def check_layers(section: Mapping[str, Any], tensors: Mapping[str, Entry], model: nn.Module) -> set[str]:
    """Check every packed tensor's presence, dtype and shape from file headers alone; returns the packed layers (in memory).

    model: with its linears still float, of which the shapes count. Raises ValueError naming the first that does not fit.
    """
    layers = packable(model)
    # any field of a layer tells its name, so one that lost its codes is still found
    on_disk = match(model, layers, {name.rpartition(".")[0] for name in tensors}, least=1, suffix=".weight")
    shapes = {on_disk.get(name, name): size_of(module) for name, module in layers.items()}
    for name in section.get("bias", ()):
        entry = tensors.get(f"{name}.bias")
        if name not in shapes or entry is None or entry.shape != shapes[name][:1] or not entry.dtype.is_floating_point:
            raise ValueError(f"{name}.bias is not the bias that config.json says this layer has; quantize again")
    for name, (n, k) in shapes.items():
        scheme = scheme_of(section, name)
        if scheme is None:
            continue
        fmt, rule = scheme
        for field, (shape, dtype) in fields_of(fmt, rule, n, k).items():
            entry = tensors.get(f"{name}.{field}")
            if entry is None:
                raise ValueError(f"{name}.{field} is missing from the checkpoint; copy it again or quantize again")
            if entry.shape != shape or entry.dtype != dtype:
                raise ValueError(
                    f"{name}.{field} is {entry.dtype} {list(entry.shape)} on disk; {fmt.name} needs {dtype} {list(shape)}"
                )
    strangers = set(layers_on_disk(tensors)) - {name for name in shapes if scheme_of(section, name)}
    if strangers:
        raise ValueError(f"{min(strangers)} is packed on disk, but config.json has no rule for it or the model no such layer")
    return {name for name in layers if scheme_of(section, on_disk.get(name, name))}


def safe_name(text: str) -> str:
    """A file name made of a model name."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")
