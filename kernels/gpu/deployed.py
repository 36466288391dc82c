"""Bundles at run time: which were offered, which are in use on a device, and how a step of theirs is launched.

`offer` only remembers a folder. The first GPU layer that looks for its kernel makes `on` verify and load what was offered; a
bundle that is used, or refused with the reason, is named on the error stream, once. Bundles hold machine code and lie in
checkpoint folders, so `quant.load` offers one only where LOWBIT_BUNDLE=use says that the folder's origin is trusted.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
from collections.abc import Mapping
from ctypes import c_void_p
from pathlib import Path

import torch
from torch import Tensor

from quant.kernels.gpu.bundle import FOLDER, Bundle, Compiled, Refused, plan_for, read
from quant.kernels.gpu.driver import CudaError, Driver, driver
from quant.kernels.gpu.plan import Layer
from quant.kernels.gpu.program import Plan, Program, Step

OFFERED: list[Path] = []


class Deployed:
    """Verified bundles whose programs are loaded on one device."""

    def __init__(self, index: int, cuda: Driver) -> None:
        self.index, self.cuda = index, cuda
        self.bundles: list[Bundle] = []
        self.loaded: dict[Program, tuple[Compiled, c_void_p]] = {}
        self.absent: set[Layer] = set()

    def add(self, bundle: Bundle) -> None:
        """Load every program that no earlier bundle brought. Raises CudaError; then nothing of it is used."""
        fresh = {p: c for p, c in bundle.programs.items() if p not in self.loaded}
        loaded = {p: (c, self.cuda.load(c.code, c.symbol, c.shared_bytes, self.index)) for p, c in fresh.items()}
        self.loaded |= loaded
        self.bundles.append(bundle)

    def plan(self, layer: Layer, m: int) -> Plan | None:
        """The steps for `m` tokens; None where no bundle has the layer, so that Triton must compile it.

        Raises ValueError for such a layer where Triton is not installed.
        """
        for bundle in self.bundles:
            found = plan_for(bundle, layer, m)
            if found is not None:
                return found
        if layer not in self.absent:
            self.absent.add(layer)
            shape = f"{layer.policy} [{layer.n}, {layer.k}], {layer.x} tokens, {layer.bias or 'no'} bias"
            what = f"{self.bundles[-1].folder} has no program for {shape}"
            if not has_triton():
                raise ValueError(f"{what} and triton is not installed; compile again with --dtype {layer.x}")
            say(f"{what}; Triton compiles it now")
        return None

    def launch(self, step: Step, values: Mapping[str, Tensor | int], m: int) -> None:
        """Enqueue one step on torch's current stream of the device."""
        compiled, function = self.loaded[step.program]
        numbers: list[int] = []
        keep: list[Tensor] = []
        for name, _ in compiled.arguments:
            value = values[name]
            if isinstance(value, Tensor):
                if value.data_ptr() % 16:  # a caller's view; the program was compiled for 16-byte loads
                    value = value.clone()
                    keep.append(value)
                value = value.data_ptr()
            numbers.append(value)
        packed = struct.pack(compiled.packing, *numbers, 0, 0)
        stream = current_stream(self.index)
        self.cuda.launch(function, step.grid(m), compiled.threads, compiled.shared_bytes, stream, packed, self.index)


DEVICES: dict[int, Deployed | None] = {}


def offer(folder: Path) -> None:
    """Use the bundle in `folder` (of `quantize`) on GPUs that it fits. No bundle there: nothing happens."""
    bundle = folder / FOLDER
    if bundle.is_dir() and bundle not in OFFERED:
        OFFERED.append(bundle)
        DEVICES.clear()


def on(index: int) -> Deployed | None:
    """What is in use on CUDA device `index`; verifies and loads the offered bundles when first asked."""
    if not OFFERED:
        return None
    if index not in DEVICES:
        DEVICES[index] = activate(index)
    return DEVICES[index]


def activate(index: int) -> Deployed | None:
    """Every offered bundle that fits device `index`, loaded; says which were refused, and why."""
    major, minor = torch.cuda.get_device_capability(index)
    deployed = None
    for folder in OFFERED:
        try:
            bundle = read(folder, 10 * major + minor)
            deployed = deployed or Deployed(index, driver())
            deployed.add(bundle)
            say(f"{len(bundle.programs)} programs of {folder} run on {bundle.target}; Triton compiles none of them")
        except (Refused, CudaError) as reason:
            after = "Triton compiles the programs instead" if has_triton() else "triton is not installed: no GPU kernel runs"
            say(f"{folder} is refused: {reason}; {after}")
    return deployed if deployed is not None and deployed.bundles else None


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def current_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


def say(line: str) -> None:
    """To the error stream, where it mixes with no result."""
    print(f"lowbit: {line}", file=sys.stderr)
