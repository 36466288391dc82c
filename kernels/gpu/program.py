"""A launch as data. The JIT launch, the ahead-of-time compilation and a deployment bundle are all made from these objects.

A `Program` is everything that decides machine code; a `Step` binds its arguments to named tensors and numbers and says how the
grid follows from the number of tokens; a `Plan` is the steps of one operator and the scratch memory between them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.kernels.gpu.layout import POLICIES

Value = int | bool | str | None


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled function. Hashable; all fields are plain values."""

    name: str  # of `function`
    signature: tuple[tuple[str, str], ...]  # run-time arguments in order with Triton types: ("x_ptr", "*bf16"), ("M", "i32")
    constants: tuple[tuple[str, Value], ...]  # every other argument; UNPACK is the name of a policy
    aligned: tuple[str, ...]  # arguments that are multiples of 16, pointers included: loads shrink without it
    warps: int
    stages: int
    fusion: bool  # fused multiply-add allowed


@dataclass(frozen=True, kw_only=True)
class Step:
    """One launch. grid = (ceil(M / rows), ceil(N / columns), splits); columns 0: one program per row tile."""

    program: Program
    arguments: tuple[tuple[str, str | int], ...]  # name -> tensor of the plan, or number; "M" stands for the tokens
    rows: int
    columns: int = 0
    splits: int = 1
    n: int = 0

    def grid(self, m: int) -> tuple[int, int, int]:
        return -(-m // self.rows), -(-self.n // self.columns) if self.columns else 1, self.splits


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """A tensor that lives between steps: `per_token` elements for each token and `fixed` beside them."""

    name: str
    dtype: str
    per_token: int = 0
    fixed: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tensors: those of the caller (x, weight, words, row_scale, bias, divisor, y) and the scratch.

    dense: the steps leave the weight as the scratch of that name, and torch multiplies.
    """

    steps: tuple[Step, ...]
    scratch: tuple[Scratch, ...]
    dense: bool = False


Launch = Callable[[Step, Mapping[str, Tensor | int], int], None]  # step, its arguments by name, tokens


@functools.cache
def function(name: str) -> Any:
    """The Triton function of a program."""
    from quant.kernels.gpu.jit import activation, codebook, dense, dual, fp4_native, gemm

    known = {"gemm": gemm.gemm, "combine": gemm.combine, "quantize": activation.quantize_rows, "dequantize": dense.dequantize}
    known |= {"fp4_tokens": fp4_native.fp4_tokens, "fp4_gemm": fp4_native.fp4_gemm}
    known |= {"codebook_gemm": codebook.codebook_gemm, "codebook_dense": codebook.codebook_dense}
    known |= {"dual_gemm": dual.dual_gemm, "dual_dense": dual.dual_dense}
    return known[name]


def constants(program: Program) -> dict[str, Any]:
    """The constexpr arguments as Triton takes them: the policy's name becomes its function."""
    values: dict[str, Any] = dict(program.constants)
    if "UNPACK" in values:
        module = importlib.import_module(f"quant.kernels.gpu.jit.{POLICIES[values['UNPACK']].module}")
        values["UNPACK"] = getattr(module, values["UNPACK"])
    return values


def jit(step: Step, values: Mapping[str, Tensor | int], m: int, warmup: bool = False) -> None:
    """Launch a step through Triton, which compiles its program when it is new; `warmup` only compiles."""
    program = step.program
    options = dict(num_warps=program.warps, num_stages=program.stages, enable_fp_fusion=program.fusion)
    function(program.name).run(grid=step.grid(m), warmup=warmup, **values, **constants(program), **options)


def compile_here(step: Step) -> None:
    """Leave the step's program in Triton's cache on disk, compiled for the current device, as a launch would."""
    types = {"*i8": "int8", "*u8": "uint8", "*i16": "int16", "*i32": "int32", "*bf16": "bfloat16", "*fp16": "float16"}
    kinds, device = dict(step.program.signature), torch.cuda.current_device()
    values: dict[str, Tensor | int] = {}
    for name, value in step.arguments:
        dtype = getattr(torch, types.get(kinds[name], "float32"))
        values[name] = 1 if value == "M" else value if isinstance(value, int) else torch.empty(16, dtype=dtype, device=device)
    jit(step, values, 1, warmup=True)


def run(plan: Plan, tensors: Mapping[str, Tensor], m: int, launch: Launch = jit) -> None:
    """Launch every step on the current device; the outputs are among `tensors`. No synchronization."""
    x = tensors["x"]
    sizes = {s.name: (m * s.per_token + s.fixed, getattr(torch, s.dtype)) for s in plan.scratch}
    scratch = {name: torch.empty(size, dtype=dtype, device=x.device) for name, (size, dtype) in sizes.items()}
    known = {**tensors, **scratch}
    for step in plan.steps:
        values = {n: v if isinstance(v, int) else m if v == "M" else known[v] for n, v in step.arguments}
        launch(step, values, m)
    if plan.dense:
        dense, y = known["dense"].view(x.dtype).view(-1, x.shape[1]), known["y"].view(x.dtype)
        if "bias" in known:
            torch.addmm(known["bias"].to(x.dtype), x, dense.t(), out=y)
        else:
            torch.mm(x, dense.t(), out=y)
