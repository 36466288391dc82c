"""The table of tokens: an output head that is packed, and the input embedding that shares its table in tied models.

A tied model keeps one table. On disk it lies under the embedding's name; in memory a PackedEmbedding holds it in the
layout of a matmul kernel, looks rows up in it, and lends it to the TiedHead, which has no tensors of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels.format import Fields, Format
from quant.linear import PackedLinear

CHUNK_ROWS = 4096  # rows of a table that are in floats at once


class PackedEmbedding(PackedLinear):
    """ids [...] int64 -> rows of the dequantized table, [..., K] in the compute dtype; `multiply` is the linear y = x W^T."""

    padding_idx: int | None = None

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Channels of a row."""
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.compute_dtype, device=ids.device)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"token ids reach from {low} to {high}; this model has ids 0 to {self.num_embeddings - 1}")
        kernel, prepared, spec = self.bound()
        found = self.format.dequantize(kernel.rows(prepared, ids.flatten(), spec))
        return found.to(self.compute_dtype).view(*ids.shape, self.embedding_dim)

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return super().forward(x)


class TiedHead(nn.Module):
    """The output head of a tied model: multiplies by the embedding's table."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.embedding: PackedEmbedding
        self.__dict__["embedding"] = embedding  # held, but not a submodule: its tensors are counted and stored once
        self.in_features, self.out_features, self.bias = embedding.in_features, embedding.out_features, None

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding.multiply(x)

    @property
    def weight(self) -> Tensor:
        """As PackedLinear.weight."""
        return self.embedding.weight

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tied"


class UnpackableHead(ValueError):
    """The output head of this model cannot be packed; the text says why, and that `head: null` leaves it in float."""


@dataclass(frozen=True)
class Head:
    """linear: the output head's module. table: the module whose weight it multiplies by, the embedding where tied."""

    linear: str
    table: str

    @property
    def tied(self) -> bool:
        """The input embedding has the same table."""
        return self.linear != self.table


def find_head(model: Any) -> Head:
    """Where the model's output head is. Raises UnpackableHead."""
    kind, advice = type(model).__name__, "leave it in float with head: null"
    names = {module: name for name, module in model.named_modules()}
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or linear not in names:
        raise UnpackableHead(f"{kind} has no linear output head to pack; {advice}")
    head = names[linear]
    ties = model.all_tied_weights_keys
    source = ties.get(f"{head}.weight")
    if source is None:
        return Head(head, head)
    others = [target for target, shared in ties.items() if shared == source and target != f"{head}.weight"]
    if others:
        raise UnpackableHead(f"{kind} ties {head} and {others[0].removesuffix('.weight')} to one table; {advice}")
    table = input_table(model)
    if source != f"{table}.weight" or linear.bias is not None:
        raise UnpackableHead(f"{head} of {kind} shares {source}, which is not a plain embedding with a plain head; {advice}")
    return Head(head, source.removesuffix(".weight"))


def input_table(model: Any) -> str | None:
    """Name of the input embedding, if the model has one that is a table and nothing more."""
    try:
        found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # models that read no tokens
        return None
    if type(found) is not nn.Embedding or found.max_norm is not None:
        return None
    return next((name for name, module in model.named_modules() if module is found), None)


def packable(model: nn.Module) -> dict[str, nn.Module]:
    """Every module whose weight can be packed: all plain linears in module order, then the input embedding."""
    found: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    table = input_table(model)
    return found if table is None else {**found, table: model.get_submodule(table)}


def size_of(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a plain linear's or embedding's weight."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def install(model: Any, name: str, packed: PackedEmbedding) -> None:
    """Put a packed table in place of embedding `name`, and a TiedHead in place of the linear that is tied to it, if any."""
    packed.padding_idx = model.get_submodule(name).padding_idx
    replace(model, name, packed)
    for target, source in list(model.all_tied_weights_keys.items()):
        if source == f"{name}.weight":
            replace(model, target.removesuffix(".weight"), TiedHead(packed))
            untie(model, target)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def untie(model: nn.Module, target: str) -> None:
    """Make transformers forget, for this model only, that parameter `target` is tied: neither end is a parameter now."""
    for prefix, module in model.named_modules():
        inside = target.removeprefix(f"{prefix}." if prefix else "")
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if isinstance(ties, dict) and inside in ties:
                setattr(module, attribute, {key: value for key, value in ties.items() if key != inside})


def pack_table(weight: Tensor, fmt: Format) -> tuple[Fields, float]:
    """A table [N, K] of any float dtype -> its stored tensors, and the relative error |W - dequantized| / |W|.

    Round to nearest: no data is needed, and a second run gives the same bytes. Searching for better steps was tried; on
    SmolLM2's table it lowers the error of 4 bits by 3 % of itself, less than a step to shorter groups.
    """
    parts: list[Fields] = []
    lost = signal = 0.0
    for at in range(0, weight.shape[0], CHUNK_ROWS):
        rows = weight[at : at + CHUNK_ROWS].float()
        codes = fmt.nearest(rows)
        parts.append(fmt.pack(codes))
        lost += float((rows - fmt.dequantize(codes)).double().square().sum())
        signal += float(rows.double().square().sum())
    fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return fields, (lost / max(signal, 1e-300)) ** 0.5


def fill_table(weight: Tensor, fields: Fields, fmt: Format) -> None:
    """Overwrite a table [N, K] of any float dtype and device by what its stored tensors stand for."""
    n, k = weight.shape
    for at in range(0, n, CHUNK_ROWS):
        rows = fmt.rows(fields, slice(at, at + CHUNK_ROWS))
        count = min(CHUNK_ROWS, n - at)
        weight[at : at + count] = fmt.dequantize(fmt.unpack(rows, count, k)).to(weight.device, weight.dtype)
