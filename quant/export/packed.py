"""A folder that `quantize` wrote, as an exporter reads it: what is packed and how, one layer's tensors in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.checkpoint import SENTINEL_SHAPE, check_layers, every_number, read_config, scheme_of
from quant.embedding import CHUNK_ROWS, size_of
from quant.kernels.activation import Activation
from quant.kernels.format import Codes, Fields, Format
from quant.kernels.rotation import by_matrix
from quant.models import Entry, Weights, index, model_class, read_json
from quant.naming import match
from quant.stacks import skeleton


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A packed weight [n, k]: a linear, or the table of an input embedding (and of the head that is tied to it).

    name: on disk. module: in memory.
    """

    name: str
    module: str
    n: int
    k: int
    format: Format
    activation: Activation
    table: bool


class PackedFolder:
    """auto, cls: the transformers config and class. model: its skeleton on meta. rest: the tensors that are not packed."""

    def __init__(self, folder: Path) -> None:
        """Reads headers only. Raises ValueError for a folder that `quantize` did not write or that is damaged."""
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the folder that quantize wrote")
        self.folder = folder
        self.config = read_config(folder)
        section, tensors = self.config["quantization_config"], index(folder)
        self.auto, self.cls = model_class(folder)
        self.dtype: torch.dtype = self.auto.dtype or torch.float32
        self.model: Any = skeleton(self.auto, self.cls, self.dtype)
        packed = check_layers(section, tensors, self.model)
        on_disk = match(self.model, packed, {name.rpartition(".")[0] for name in tensors}, least=1, suffix=".weight")
        self.layers: list[Layer] = []
        for name, module in self.model.named_modules():
            if name not in packed:
                continue
            scheme = scheme_of(section, on_disk[name])
            assert scheme is not None, name
            n, k = size_of(module)
            table = isinstance(module, nn.Embedding)
            layer = Layer(name=on_disk[name], module=name, n=n, k=k, format=scheme[0], activation=scheme[1], table=table)
            self.layers.append(layer)
        ours = {f"{layer.name}.{key}" for layer in self.layers for key in stored(layer)}
        empty = {f"{layer.name}.weight" for layer in self.layers}
        self.rest: dict[str, Entry] = {
            name: entry
            for name, entry in tensors.items()
            if name not in ours and not (name in empty and entry.shape == SENTINEL_SHAPE)
        }
        self.tensors = tensors
        self._weights = Weights(folder, tensors)

    @property
    def bytes(self) -> int:
        """Of all tensors of the folder."""
        return sum(entry.stop - entry.start for entry in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self._weights.read(name)

    def entry(self, layer: Layer, key: str) -> Entry:
        """Where one of a layer's tensors lies."""
        return self.tensors[f"{layer.name}.{key}"]

    def fields(self, layer: Layer) -> Fields:
        """The tensors of a layer's format; raises ValueError where a value lies outside what the format allows."""
        found = {key: self.read(f"{layer.name}.{key}") for key in layer.format.fields(layer.n, layer.k)}
        try:
            layer.format.check(found, layer.n, layer.k)
        except ValueError as error:
            raise ValueError(f"{layer.name}.{error}") from None
        return found

    def codes(self, layer: Layer) -> Codes:
        """A layer's codes and parameters."""
        return layer.format.unpack(self.fields(layer), layer.n, layer.k)

    def dense(self, layer: Layer, dtype: torch.dtype) -> Tensor:
        """The weight [n, k] that a layer's tensors stand for, its rotation undone: computed in float32, rounded to `dtype`."""
        fields = self.fields(layer)
        out = torch.empty(layer.n, layer.k, dtype=dtype)
        for at in range(0, layer.n, CHUNK_ROWS):
            rows = layer.format.rows(fields, slice(at, at + CHUNK_ROWS))
            codes = layer.format.unpack(rows, min(CHUNK_ROWS, layer.n - at), layer.k)
            out[at : at + CHUNK_ROWS] = by_matrix(layer.format.dequantize(codes), layer.activation.rotate).to(dtype)
        return out

    def provenance(self) -> dict[str, Any]:
        """Of which model and by which recipe, as far as the folder tells."""
        path = self.folder / "report.json"
        report = read_json(path) if path.is_file() else {}
        return {key: report[key] for key in ("source", "recipe", "calibration") if key in report}


def stored(layer: Layer) -> list[str]:
    """Names of the tensors of a layer that its format and its activation rule keep on disk."""
    return [*layer.format.fields(layer.n, layer.k), *layer.activation.fields(layer.k)]


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an exporter wrote, for the user to read.

    packed: scheme in words -> layers and bytes. dense: why -> names and bytes of layers that are no longer packed.
    dtype: of the dense ones. notes: what readers make of it.
    """

    dtype: str
    packed: dict[str, tuple[int, int]] = field(default_factory=dict)
    dense: dict[str, tuple[list[str], int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add_packed(self, scheme: str, size: int) -> None:
        """Count one layer of `size` bytes."""
        layers, total = self.packed.get(scheme, (0, 0))
        self.packed[scheme] = (layers + 1, total + size)

    def add_dense(self, reason: str, name: str, size: int) -> None:
        """Count one layer of `size` bytes."""
        names, total = self.dense.get(reason, ([], 0))
        self.dense[reason] = ([*names, name], total + size)

    def lines(self) -> list[str]:
        """One line per scheme, per reason for dense weights, and per note."""
        out = [f"{scheme}: {many(layers)}, {size:,} bytes" for scheme, (layers, size) in self.packed.items()]
        for reason, (names, size) in self.dense.items():
            shown = ", ".join(dict.fromkeys(map(every_number, names)))
            out.append(f"dense in {self.dtype}: {shown} ({many(len(names))}, {size:,} bytes): {reason}")
        return out + self.notes


def many(layers: int) -> str:
    """ "1 weight", "2 weights"."""
    return f"{layers} weight" + "s" * (layers != 1)


Refusal = Callable[[Layer], str | None]


def sorted_out(folder: PackedFolder, refusal: Refusal, engine: str, widen: bool) -> dict[str, str]:
    """Layers that `engine` cannot hold as they are -> why; raises ValueError for the first unless they may be written wider."""
    found = {layer.name: why for layer in folder.layers if (why := refusal(layer)) is not None}
    if found and not widen:
        name, why = next(iter(found.items()))
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(f"{name}{others} cannot be written for {engine}: {why}; or add --widen, which writes it wider")
    return found
