"""Norms and activations that round alike in eager layers and in compiled graphs, on every instruction set.

Left to themselves the two differ in the last bit: a graph sums a row in another order than the eager mean, and has another
error function. In greedy text a last bit is enough to choose another token some hundred tokens later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.cpu import library

KINDS = ("silu", "gelu")  # position = number in the C interface


def _contiguous(x: Tensor) -> None:
    if not x.is_contiguous():  # graphs call the C functions with the strides that were traced
        raise ValueError(f"x is {tuple(x.shape)}, strides {x.stride()}; the kernel needs it contiguous")


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centered: bool) -> Tensor:
    _contiguous(x)
    k = x.shape[-1] if x.dim() else 0
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and (given.shape != (k,) or given.dtype != x.dtype or not given.is_contiguous()):
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}; it must be a contiguous {x.dtype} [{k}]")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        library.load().lowbit_norm(
            *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()),
            *(x.numel() // k, k, eps, centered, library.dtype_code(x)),
        )
    return y


def cpu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension; the bracket is rounded to x's dtype first."""
    return _norm(x, weight, None, eps, centered=False)


def cpu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """weight * (x - mean) / sqrt(variance + eps) + bias over the last dimension, rounded once."""
    return _norm(x, weight, bias, eps, centered=True)


def _activate(x: Tensor, by: Tensor | None, kind: str) -> Tensor:
    _contiguous(x)
    if by is not None and (by.shape != x.shape or by.dtype != x.dtype or not by.is_contiguous()):
        raise ValueError(f"by is {by.dtype} {tuple(by.shape)}; it must be a contiguous {x.dtype} {tuple(x.shape)}, as x")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.load().lowbit_activate(
        *(x.data_ptr(), None if by is None else by.data_ptr(), y.data_ptr(), x.numel(), KINDS.index(kind)),
        library.dtype_code(x),
    )
    return y


def cpu_silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x)."""
    return _activate(x, None, "silu")


def cpu_silu_mul(x: Tensor, by: Tensor) -> Tensor:
    """silu(x), rounded to x's dtype, times `by`: what two layers would give."""
    return _activate(x, by, "silu")


def cpu_gelu(x: Tensor) -> Tensor:
    """x / 2 * (1 + erf(x / sqrt(2)))."""
    return _activate(x, None, "gelu")


for _operator, _schema in (
    (cpu_rms_norm, "(Tensor x, Tensor weight, float eps) -> Tensor"),
    (cpu_layer_norm, "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor"),
    (cpu_silu, "(Tensor x) -> Tensor"),
    (cpu_silu_mul, "(Tensor x, Tensor by) -> Tensor"),
    (cpu_gelu, "(Tensor x) -> Tensor"),
):
    _name = f"lowbit::{_operator.__name__}"
    torch.library.define(_name, _schema)
    torch.library.impl(_name, "cpu", _operator)
    torch.library.register_fake(_name, lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))
