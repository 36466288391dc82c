"""Loads the compiled C++ kernels and chooses the instruction set, once per process.

The library is a plain C interface without torch headers, so one build serves every torch. It is loaded after torch
and takes OpenMP from the libgomp that torch brought, so there is one thread pool. LOWBIT_CPU_ISA=amx, avx512, avx2
or portable forces a path; without it the best one that the processor has is used.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels.cpu.build import FOLDER, LIBRARY, REASON
from quant.kernels.dispatch import MatmulSpec

ISAS = ("portable", "avx2", "avx512", "amx")  # position = number in the C interface
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # likewise

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "lowbit_a8w4_multi": (_P, _I, _L, _L, _P, _I, _P, _P, _L, _P, _I, ctypes.c_float),
    "lowbit_w8a8_multi": (_P, _I, _L, _L, _P, _I, _P, _P),
    "lowbit_weight_only_multi": (_P, _I, _L, _L, _P, _I, _I, _P, _P, _I, _P, _L),
    "lowbit_fp_channel_multi": (_P, _I, _L, _L, _P, _I, _P, _P, _I, _P, _L, _P),
    "lowbit_dual_multi": (_P, _I, _L, _L, _P, _I, _P, _P, _I, _L),
    "lowbit_codebook": (_P, _I, _L, _L, _P, _I, _P, _P, _I, _I, _P),
    "lowbit_fp_shift": (_P, _I, _P, _P, _P, _L, _L, *(ctypes.c_float, _I, *[ctypes.c_float] * 3, _L, ctypes.c_float)),
    "lowbit_rotate": (_P, _I, _P, _L, _L, _L, ctypes.c_float),
    "lowbit_nearest": (_P, _P, _P, _P, _L, _I, _I),
    "lowbit_sweep": (_P, _P, _P, _P, _P, _P, _L, _L, _I, _I, _I),
    "lowbit_gptq_block": (_P, _P, _P, _P, _P, _P, _L, _I, _I, *[ctypes.c_float] * 3),
    "lowbit_descend_block": (_P, _P, _P, _P, _P, _P, _P, _L, _I, _I, *[ctypes.c_float] * 3),
    "lowbit_fp4_multi": (_P, _I, _L, _L, _P, _I, _P, _P, _I, _P),
    "lowbit_read": (_P, _L),
    "lowbit_attention": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _L, ctypes.c_float, _I),
    "lowbit_append": (_P, _P, _P, _P, _P, _P, _P, _P, _L, _I),
    "lowbit_norm": (_P, _P, _P, _P, _L, _L, ctypes.c_float, _I, _I),
    "lowbit_activate": (_P, _P, _P, _L, _I, _I),
}


class Output(ctypes.Structure):
    """One layer's output and bias, as in lowbit.h."""

    _fields_ = (("y", _P), ("bias", _P), ("n", _L), ("bias_dtype", _L))


class Unavailable(Exception):
    """There is no usable library; the text says why, in one line."""


def open_library(folder: Path) -> ctypes.CDLL:
    """The library in `folder` with its signatures declared. Raises Unavailable."""
    path = folder / LIBRARY
    if not path.exists():
        reason = folder / REASON
        if reason.exists():
            raise Unavailable(f"built without a C++ compiler: {reason.read_text().strip()}")
        raise Unavailable("the C++ kernels are not built; run: python -m quant.kernels.cpu.build")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path.name} does not load: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise Unavailable("the C++ kernels are older than these sources; run: python -m quant.kernels.cpu.build")
        function.argtypes, function.restype = arguments, None
    return library


@cache
def load() -> ctypes.CDLL:
    """The library with its instruction set selected. Raises Unavailable, or ValueError for a wrong LOWBIT_CPU_ISA."""
    library = open_library(FOLDER)
    wanted = os.environ.get("LOWBIT_CPU_ISA")
    if wanted:
        select(library, wanted)
    else:
        select_best(library)
    return library


def available() -> bool:
    """Whether there is a usable library."""
    try:
        load()
    except Unavailable:
        return False
    return True


def supported(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that this processor has. All kernels are left with the last of them, the best."""
    return [name for number, name in enumerate(ISAS) if library.lowbit_select(number) == 0]


def select_best(library: ctypes.CDLL) -> str:
    """Make all kernels use the best instruction set of this processor, and say which."""
    return supported(library)[-1]


def select(library: ctypes.CDLL, isa: str) -> None:
    """Make all kernels use `isa`. Raises ValueError where it is unknown or this processor lacks it."""
    if isa not in ISAS:
        raise ValueError(f"LOWBIT_CPU_ISA={isa} is unknown; allowed: {', '.join(ISAS)}")
    if library.lowbit_select(ISAS.index(isa)):
        raise ValueError(f"LOWBIT_CPU_ISA={isa} is not supported by this processor; it has: {', '.join(supported(library))}")


def refuses(spec: MatmulSpec) -> str | None:
    """The part of a refusal that all C++ kernels share."""
    if spec.device != "cpu":
        return f"it runs on cpu, not on {spec.device}"
    try:
        load()
    except Unavailable as error:
        return str(error)
    return None


def dtype_code(given: Tensor) -> int:
    """The C number of a float dtype. Raises ValueError for one the kernels do not take."""
    code = DTYPES.get(given.dtype)
    if code is None:
        raise ValueError(f"{given.dtype} input is not supported; give float32, bfloat16 or float16")
    return code


def arguments(
    x: Tensor, k: int, blocks: int, biases: Sequence[Tensor | None], ns: Sequence[int]
) -> tuple[list[Tensor], tuple[object, ...]]:
    """Fresh outputs [M, n] for each n, and the arguments that all C functions begin with: x, dtype, M, K, outputs, count.

    Raises ValueError for shapes that would make C++ read outside a tensor.
    """
    if x.dim() != 2 or x.shape[1] != k or not x.is_contiguous():
        raise ValueError(f"x is {tuple(x.shape)}, strides {x.stride()}; the kernel needs a contiguous [M, {k}]")
    if len(biases) != len(ns) or blocks != sum(-(-n // 32) for n in ns):
        raise ValueError(f"{len(biases)} biases and rows {list(ns)} do not fit a weight of {blocks} blocks of 32 rows")
    outputs = (Output * len(ns))()
    results = []
    for out, bias, n in zip(outputs, biases, ns, strict=True):
        if bias is not None:
            if bias.numel() != n or not bias.is_contiguous():
                raise ValueError(f"bias is {tuple(bias.shape)}, strides {bias.stride()}; the kernel needs a contiguous [{n}]")
            out.bias, out.bias_dtype = bias.data_ptr(), dtype_code(bias)
        y = torch.empty((x.shape[0], n), dtype=x.dtype)
        out.y, out.n = y.data_ptr(), n
        results.append(y)
    return results, (x.data_ptr(), dtype_code(x), x.shape[0], k, outputs, len(ns))


class ForwardOnly(torch.autograd.Function):
    """Ties outputs to the input they came from, so that a backward pass is an error and not a silent zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *ys: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in ys)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError("the C++ kernels have no backward pass; to train, set LOWBIT_KERNEL=reference before loading")


def call(operator: Callable[..., Tensor], x: Tensor, *rest: object) -> Tensor:
    """operator(x, *rest), forward only. The operators are bare (no autograd kernel): that saves 20 us on every call."""
    if x.requires_grad and torch.is_grad_enabled():
        linked: Tensor = ForwardOnly.apply(x, operator(x.detach(), *rest))[0]  # type: ignore[no-untyped-call]
        return linked
    return operator(x, *rest)


def call_multi(operator: Callable[..., list[Tensor]], x: Tensor, *rest: object) -> list[Tensor]:
    """`call` for an operator with several results."""
    if x.requires_grad and torch.is_grad_enabled():
        return list(ForwardOnly.apply(x, *operator(x.detach(), *rest)))  # type: ignore[no-untyped-call]
    return operator(x, *rest)


def fake_outputs(x: Tensor, ns: Sequence[int]) -> list[Tensor]:
    """What the operators of several layers return, for tracing."""
    return [x.new_empty((x.shape[0], n)) for n in ns]
