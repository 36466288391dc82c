"""What a low-bit weight format is: named fields on disk, and the way between codes, bytes and floats.

Dimensions: N out features, K in features, G group length along K. Invariants of every format:
    unpack(pack(codes)) == codes                          exactly
    fields(n, k) names every tensor with shape and dtype   so empty modules and checks need no data
    dequantize(pack(codes)) is what the codes mean         the oracle for every kernel
A new format is one file in `formats/` with a class decorated by `@register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, dtype

from quant.kernels.registry import import_files, made

Fields = dict[str, Tensor]
F = TypeVar("F", bound="Format")


class Field(NamedTuple):
    """Shape and dtype of one tensor of a format."""

    shape: tuple[int, ...]
    dtype: dtype


@dataclass(frozen=True)
class Codes:
    """The unpacked decision for one linear.

    codes: unsigned integer codes, uint8 [N, K]; of a codebook's vectors [N, K // tile, M].
    params: the format's other tensors by field name (scales, zeros, offsets), as stored.
    """

    codes: Tensor
    params: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """One byte layout with its parameters; subclasses add fields such as bits and group."""

    name: ClassVar[str]
    whole: ClassVar[frozenset[str]] = frozenset()  # fields that belong to a weight as a whole; all others have a row per row
    additive: ClassVar[frozenset[str]] = frozenset()  # fields that training moves by sums: they may change their sign

    @classmethod
    def from_values(cls: type[F], values: Mapping[str, Any]) -> F:
        """The format with these parameters. Raises ValueError for one that is unknown or of a wrong type."""
        return made(cls, f"format {cls.name}", values)

    @property
    def inner(self) -> Format:
        """The format that the codes and scales are of: itself, unless something is added to it."""
        return self

    @property
    def tile(self) -> int:
        """Neighbouring weights of a row that share codes: 1, or the length of a codebook's vectors."""
        return 1

    @abstractmethod
    def refuses(self, n: int, k: int) -> str | None:
        """Why an [n, k] matrix cannot be stored in this format, or None."""

    @abstractmethod
    def fields(self, n: int, k: int) -> dict[str, Field]:
        """Name -> shape and dtype of every stored tensor. The code tensor is `weight_packed`."""

    @abstractmethod
    def pack(self, codes: Codes) -> Fields:
        """Codes -> contiguous tensors exactly as `fields` says."""

    @abstractmethod
    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        """Inverse of `pack`."""

    @abstractmethod
    def dequantize(self, codes: Codes) -> Tensor:
        """The float32 [N, K] matrix that the codes stand for."""

    @abstractmethod
    def nearest(self, weight: Tensor) -> Codes:
        """Round-to-nearest codes of a float32 [N, K] weight: the baseline every method has to beat."""

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """The distance of neighbouring codes around 0, float32 [N, K // G], for parameters as stored or in float32."""
        raise ValueError(
            f"{self.name} has no steps; codes train in int_group, int4_dual, fp4_block, fp_channel and binary_dual"
        )

    def project(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The uint8 codes [N, K] nearest to a float32 weight under given parameters."""
        raise ValueError(f"{self.name} cannot round under given scales, so its codes cannot be trained; leave pv_tuning out")

    def nearer(self, weight: Tensor, codes: Codes) -> Tensor:
        """Codes no further from a float32 weight [N, K] than those given, under their parameters: the nearest, if feasible."""
        return self.project(weight, codes.params)

    def reach(self, codes: Codes) -> Tensor:
        """A squared distance [N, K // tile] from what a tile is: nearer weights than that keep its codes. 0 says nothing."""
        return torch.zeros(len(codes.codes), 1, device=codes.codes.device)

    def shares(self, codes: Codes) -> dict[str, float]:
        """What a report says of a weight's codes: shares by name, none for most formats."""
        return {}

    def rows(self, tensors: Mapping[str, Tensor], rows: slice | Tensor) -> dict[str, Tensor]:
        """What the fields or parameters of a weight are for some of its rows: a slice, or int64 indices [M].

        A field of the whole weight is copied, so that parts of a weight can be saved side by side.
        """
        return {name: t.clone() if name in self.whole else t[rows] for name, t in tensors.items()}

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        """Raise ValueError, naming the first stored tensor whose presence, shape, dtype or range is wrong."""
        check_fields(self.name, self.fields(n, k), fields, n, k)

    def stored_bytes(self, n: int, k: int) -> int:
        """Bytes of all fields of one [n, k] weight."""
        total = 0
        for shape, kind in self.fields(n, k).values():
            size = kind.itemsize
            for dim in shape:
                size *= dim
            total += size
        return total

    def bits_per_weight(self, n: int, k: int) -> float:
        """Stored bits per weight, scales and zeros included."""
        return 8 * self.stored_bytes(n, k) / (n * k)

    def config(self) -> dict[str, Any]:
        """Plain values from which `from_config` makes an equal object."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Grouped(Format):
    """Codes of `bits` bits along K, a scale per `group` channels, or per row for -1."""

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.group != -1 and self.group < 1:
            raise ValueError(f"group {self.group} is not allowed; give a positive length, or -1 for one scale per row")

    def groups(self, k: int) -> int:
        """Groups per row."""
        return 1 if self.group == -1 else k // self.group

    def refuses(self, n: int, k: int) -> str | None:
        if self.group != -1 and k % self.group:
            return f"group {self.group} does not divide K = {k}"
        if k * self.bits % 8:
            return f"a row of K = {k} {self.bits}-bit codes is not a whole number of bytes"
        return None


def check_fields(owner: str, wanted: Mapping[str, Field], given: Mapping[str, Tensor], n: int, k: int) -> None:
    """Raise ValueError, naming the first tensor that `owner` stores and that is missing, misshapen, or not finite."""
    for name, (shape, kind) in wanted.items():
        if name not in given:
            raise ValueError(f"{name} is missing; {owner} stores {sorted(wanted)}")
        tensor = given[name]
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {owner} needs {kind} {shape} for a [{n}, {k}] weight"
            )
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{name} holds a NaN or an infinity; the checkpoint is damaged, quantize again")


def storable(step: Tensor, kind: dtype) -> Tensor:
    """Steps as they will be read back from `kind`: float32, rounded to it, never 0, and 1 where the given one is 0."""
    tiny = torch.finfo(kind).smallest_normal
    return torch.where(step != 0, step.abs().clamp_min(tiny).copysign(step), 1.0).to(kind).float()


FORMATS: dict[str, type[Format]] = {}
T = TypeVar("T", bound=type[Format])


def register(cls: T) -> T:
    """Class decorator: make a format known under its name."""
    assert cls.name not in FORMATS, f"two formats are called {cls.name}"
    FORMATS[cls.name] = cls
    return cls


@cache
def load_all() -> dict[str, type[Format]]:
    """Import every file in `formats/` and return the registry."""
    from quant.kernels import formats

    import_files(formats)
    return FORMATS


def from_config(config: Mapping[str, Any]) -> Format:
    """Inverse of `Format.config`. Raises ValueError for an unknown format or parameter."""
    values = dict(config)
    name = values.pop("name", None)
    known = load_all()
    if name not in known:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(sorted(known))}")
    return known[name].from_values(values)


def fit_group(group: int, k: int) -> int | None:
    """The group length used for K in features when `group` was asked for.

    The rule: the largest divisor of K that is a multiple of 16 and at most `group`; -1 (per channel) stays.
    576 with 128 asked gives 96. None when K has no such divisor.
    """
    if group == -1:
        return -1
    return next((g for g in range(min(group, k) // 16 * 16, 0, -16) if k % g == 0), None)
