"""One kernel per linear, chosen once; every refusal keeps its reason.

A kernel is one file in `cpu/`, `gpu/` or this folder with a class decorated by `@register`. Kernels are asked in
order of `priority`, highest first; the first that does not refuse is used.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeVar

from torch import Tensor

from quant.kernels.activation import Activation, fields_of
from quant.kernels.format import Codes, Field, Fields, Format
from quant.kernels.registry import import_files

Prepared = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """y [M, N] = x [M, K] @ dequantize(weight) [N, K]^T, for any M."""

    n: int
    k: int
    format: Format
    activation: Activation
    device: str  # torch device type: "cpu", "cuda"

    def fields(self) -> dict[str, Field]:
        """Name -> shape and dtype of every canonical tensor of such a layer."""
        return fields_of(self.format, self.activation, self.n, self.k)


class Kernel(ABC):
    """Stateless; one instance serves all layers."""

    name: ClassVar[str]
    priority: ClassVar[int] = 0

    @abstractmethod
    def refuses(self, spec: MatmulSpec) -> str | None:
        """Why this kernel cannot serve `spec`, or None."""

    @abstractmethod
    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        """Canonical tensors -> the kernel's own layout, once per layer. Must not alias `fields` where it reorders."""

    @abstractmethod
    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        """Exact inverse of `prepare`: saving a loaded model writes the bytes it was loaded from."""

    def rows(self, prepared: Prepared, rows: Tensor, spec: MatmulSpec) -> Codes:
        """Codes of rows int64 [M] of the weight, in this order: how an embedding is read. Every format stores row by row."""
        picked = spec.format.rows(self.restore(prepared, spec), rows)
        return spec.format.unpack(picked, rows.shape[0], spec.k)

    @abstractmethod
    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        """x [M, K] float32, bfloat16 or float16, contiguous, rotated before -> [M, N] in its dtype; rounds x if asked to."""

    def unpacked(self, prepared: Prepared, spec: MatmulSpec) -> tuple[Kernel, Prepared]:
        """A kernel, and its tensors, whose results are the same bits, and which may take as much memory as a float weight."""
        return self, prepared

    def join(self, prepared: Sequence[Prepared]) -> tuple[Prepared, list[Prepared]] | None:
        """Layers of one K and format as one weight in its final place, and each layer's part of it, sharing memory.

        None where the kernel does not join. One layer may be given, to bring it to where it is read fastest.
        """
        return None

    def matmul_joined(
        self, x: Tensor, joined: Prepared, biases: Sequence[Tensor | None], specs: Sequence[MatmulSpec]
    ) -> list[Tensor]:
        """`matmul` of the same x with every layer of a joined weight; only for kernels that join."""
        raise NotImplementedError(f"{self.name} does not join layers")


KERNELS: dict[str, Kernel] = {}
C = TypeVar("C", bound=type[Kernel])


def register(cls: C) -> C:
    """Class decorator: make a kernel known under its name."""
    assert cls.name not in KERNELS, f"two kernels are called {cls.name}"
    KERNELS[cls.name] = cls()
    return cls


@cache
def import_all() -> None:
    """Import every kernel file."""
    from quant.kernels import cpu, gpu, reference, side_path

    assert {reference.Reference.name, side_path.SidePath.name} <= KERNELS.keys()
    for package in (cpu, gpu):
        import_files(package)


def load_all() -> list[Kernel]:
    """The registry in order of preference."""
    import_all()
    return sorted(KERNELS.values(), key=lambda kernel: -kernel.priority)


def choose(spec: MatmulSpec) -> tuple[Kernel, dict[str, str]]:
    """The kernel for `spec`, and the reason of each kernel that was asked before it and refused.

    The environment variable LOWBIT_KERNEL=reference restricts the choice to kernels whose name starts so.
    Raises ValueError, listing every refusal, when none is left.
    """
    wanted = os.environ.get("LOWBIT_KERNEL", "")
    refusals: dict[str, str] = {}
    for kernel in load_all():
        reason = f"LOWBIT_KERNEL={wanted} excludes it" if not kernel.name.startswith(wanted) else kernel.refuses(spec)
        if reason is None:
            return kernel, refusals
        refusals[kernel.name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ValueError(f"no kernel for {spec.format} {spec.activation} [{spec.n}, {spec.k}] on {spec.device}: {listed}")
