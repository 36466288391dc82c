"""The part of a packed weight that one rank of a serving engine holds: loaded tensor by tensor, checked, then on a kernel.

Engines such as vLLM fuse matrices that read the same tensor (q, k, v) into one layer, and split a layer among ranks: along
N, or along K ("row parallel"). A `Shard` is one matrix on disk and the part of it that is here. Every field of a format or an
activation rule has dimensions that shrink with N, with K, or not at all, so comparing its shape for the whole matrix with
that for the part tells how to cut it; no field is known by name.

The tensors of all shards of one field lie in one parameter: rows of the shards one after another, or, for fields that have no
rows, an entry per shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quant.kernels.activation import Activation, fields_of
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, choose
from quant.kernels.format import Fields, Format
from quant.kernels.reference import Reference
from quant.linear import check

SHARD_IDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Shard:
    """full: [N, K] on disk. part: [n, k] here. row: the first row that is here. column: how many parts of k lie before ours.

    Rows past the end of the matrix are padding, and zero.
    """

    name: str
    full: tuple[int, int]
    part: tuple[int, int]
    row: int = 0
    column: int = 0

    @property
    def rows(self) -> int:
        """How many rows of the matrix are here, padding not counted."""
        return max(0, min(self.part[0], self.full[0] - self.row))


def fused_shards(
    names: Sequence[str], ns: Sequence[int], whole: tuple[int, int], k: int, rank: int, ranks: int, copies: int = 1
) -> list[Shard]:
    """The shards of one layer on one rank, from the sizes that vLLM gives it.

    ns: rows here of each matrix. whole: [N, K] of the layer over all ranks. k: channels here. Rows are split where ns do not
    add up to N, channels where k is not K. copies: ranks that share one head of keys and values, where those are fewer than
    ranks; they concern all matrices but the first, and vLLM counts them `copies` times in N.
    """
    split, column = sum(ns) != whole[0], rank if k != whole[1] else 0
    shards = []
    for index, (name, n) in enumerate(zip(names, ns, strict=True)):
        shared = copies if index else 1
        full = n * ranks // shared if split else n
        shards.append(Shard(name, (full, whole[1]), (n, k), rank // shared * n if split else 0, column))
    return shards


class Bound(NamedTuple):
    """A weight on its kernel."""

    kernel: Kernel
    prepared: Prepared
    spec: MatmulSpec


class PackedShards:
    """The shards of one layer.

    say: takes one line when no kernel but the reference serves. Raises ValueError, naming the matrix, where the part that a
    rank gets does not fit the format or the activation rule, and where no kernel serves it.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fmt: Format,
        activation: Activation,
        ranks: int,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        self.shards, self.format, self.activation, self.device = tuple(shards), fmt, activation, device
        self.loaded: set[tuple[str, int]] = set()
        for shard in shards:
            require_cut(shard, fmt, activation, ranks)
        self.k = shards[0].part[1]
        self.names = tuple(fields_of(fmt, activation, *shards[0].part))
        self.rowless = (fmt.whole | activation.fields(self.k).keys()) & set(self.names)
        try:
            kernel, refusals = choose(self.spec(sum(shard.part[0] for shard in shards)))
        except ValueError as error:
            raise ValueError(f"{shards[0].name}: {error}") from None
        if isinstance(kernel, Reference):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
            say(f"{fmt} with activation {activation} runs on the slow reference kernel ({reasons})")

    def spec(self, n: int) -> MatmulSpec:
        """The problem for n of our rows."""
        return MatmulSpec(n=n, k=self.k, format=self.format, activation=self.activation, device=self.device)

    def empty(self) -> Fields:
        """One tensor of zeros per field, for all shards."""
        total = sum(shard.part[0] for shard in self.shards)
        found = {}
        for name, (shape, dtype) in self.spec(total).fields().items():
            sized = (len(self.shards), *shape) if name in self.rowless else shape
            found[name] = torch.zeros(sized, dtype=dtype, device=self.device)
        return found

    def load(self, field: str, into: Tensor, value: Tensor, shard_id: str | int | None) -> None:
        """Copy our part of a tensor on disk. shard_id: an engine's name of the matrix in a fused layer.

        Raises ValueError, naming the tensor, for a shape or dtype that the format does not have.
        """
        index = self.index(shard_id)
        shard = self.shards[index]
        shape, dtype = fields_of(self.format, self.activation, *shard.full)[field]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"{shard.name}.{field} is {value.dtype} {list(value.shape)} on disk; {self.format.name} needs "
                f"{dtype} {list(shape)} for {list(shard.full)}"
            )
        target = self.view(field, into, index)
        if field not in self.rowless:
            value, target = value[shard.row : shard.row + shard.rows], target[: shard.rows]
        for dim in range(value.dim()):
            size = target.shape[dim]
            if value.shape[dim] != size:
                value = value.narrow(dim, shard.column * size, size)
        target.copy_(value)
        self.loaded.add((field, index))

    def index(self, shard_id: str | int | None) -> int:
        """Which shard an engine means. Raises ValueError where it means several at once."""
        index = SHARD_IDS.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
        if index is None and len(self.shards) == 1:
            return 0
        if not isinstance(index, int):
            names = ", ".join(shard.name for shard in self.shards)
            raise ValueError(f"{names} are fused in memory but one tensor on disk (shard {shard_id}); this is not served")
        return index

    def view(self, field: str, tensor: Tensor, index: int) -> Tensor:
        """One shard's part of a field's parameter."""
        if field in self.rowless:
            return tensor[index]
        start = sum(shard.part[0] for shard in self.shards[:index])
        return tensor[start : start + self.shards[index].part[0]]

    def require_loaded(self, fields: Sequence[str]) -> None:
        """Raise ValueError, naming the first tensor of these fields that was never loaded."""
        for field in fields:
            for index, shard in enumerate(self.shards):
                if (field, index) not in self.loaded:
                    raise ValueError(f"{shard.name}.{field} is missing from the checkpoint; copy it again or quantize again")

    def checked(self, tensors: Mapping[str, Tensor]) -> list[Fields]:
        """The loaded tensors as the fields of each shard.

        Raises ValueError, naming the tensor, for one that is missing or holds what its format does not allow.
        """
        self.require_loaded(list(tensors))
        found = []
        for index, shard in enumerate(self.shards):
            fields = {name: self.view(name, tensor, index) for name, tensor in tensors.items()}
            try:
                check(fields, self.format, self.activation, *shard.part)
            except ValueError as error:
                raise ValueError(f"{shard.name}.{error}") from None
            found.append(fields)
        return found

    def bind(self, tensors: Mapping[str, Tensor]) -> list[Bound]:
        """The tensors, `checked`, on their kernels: as one weight where all fields without rows are equal, else one each."""
        weights = self.checked(tensors)
        if all(bool((tensors[name] == tensors[name][:1]).all()) for name in self.rowless):
            together = {name: t[0] if name in self.rowless else t for name, t in tensors.items()}
            return [on_kernel(together, self.spec(sum(shard.part[0] for shard in self.shards)))]
        return [on_kernel(f, self.spec(s.part[0])) for f, s in zip(weights, self.shards, strict=True)]


def require_cut(shard: Shard, fmt: Format, activation: Activation, ranks: int) -> None:
    """Raise ValueError where our part of a matrix does not fit, saying how many ranks would do."""
    n, k = shard.part
    reason = fmt.refuses(n, k) or activation.refuses(k)
    if reason is None:
        return
    whole = shard.full[1]
    fits = (r for r in range(ranks - 1, 0, -1) if whole % r == 0)
    most = next((r for r in fits if not (fmt.refuses(n, whole // r) or activation.refuses(whole // r))), None)
    advice = f"at most {most} ranks fit" if most else "config.json is damaged, quantize again"
    raise ValueError(f"{shard.name} has K = {whole}, of which each of {ranks} ranks gets {k}: {reason}; {advice}")


def on_kernel(fields: Fields, spec: MatmulSpec) -> Bound:
    """The kernel for `spec`, the fields in its layout and, where it can, in the memory it reads fastest."""
    kernel, _ = choose(spec)
    prepared = kernel.prepare(fields, spec)
    placed = kernel.join([prepared])
    return Bound(kernel, prepared if placed is None else tuple(placed[1][0]), spec)


def multiply(x: Tensor, weights: Sequence[Bound], bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N], the outputs of the weights side by side; bias [N]."""
    spec = weights[0].spec
    flat = spec.activation.rotated(x.reshape(-1, spec.k)).contiguous()
    if len(weights) == 1:
        y = weights[0].kernel.matmul(flat, weights[0].prepared, bias, spec)
    else:
        sizes = [weight.spec.n for weight in weights]
        biases = [None] * len(weights) if bias is None else torch.split(bias, sizes)
        parts = [w.kernel.matmul(flat, w.prepared, b, w.spec) for w, b in zip(weights, biases, strict=True)]
        y = torch.cat(parts, 1)
    return y.view(*x.shape[:-1], y.shape[1])
