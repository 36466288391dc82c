"""Fill Triton's cache on disk for the device present, by several processes at once: Triton itself compiles one at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable

import torch

from quant.kernels.gpu.launch import device_facts
from quant.kernels.gpu.plan import LARGE_M, PLANS, Layer, plan
from quant.kernels.gpu.program import Program, Step, compile_here

MOST_JOBS = 16  # each holds a CUDA context


def processes() -> int:
    """How many compile at once: one a core."""
    return min(os.cpu_count() or 1, MOST_JOBS)


def reason(step: Step) -> str | None:
    """Compile one program; why it cannot be, or None."""
    try:
        compile_here(step)
    except Exception as error:  # Triton raises what its stages raise
        return f"{type(error).__name__}: {next(reversed(str(error).strip().splitlines()), '')}"
    return None


def compile_all(steps: Iterable[Step], jobs: int | None = None) -> dict[Program, str]:
    """Compile the steps' programs; program -> reason of those that failed. jobs: processes, None: one a core."""
    unique = list({step.program: step for step in steps}.values())
    with multiprocessing.get_context("spawn").Pool(jobs or processes()) as pool:
        reasons = pool.map(reason, unique, chunksize=4)
    return {step.program: why for step, why in zip(unique, reasons, strict=True) if why is not None}


def steps_of(layers: Iterable[Layer]) -> list[Step]:
    """Every step that the layers take on the current device, for any number of tokens."""
    arch, processors = device_facts(torch.cuda.current_device())
    return [step for layer in layers for most in PLANS for step in plan(layer, most or LARGE_M, arch, processors).steps]
