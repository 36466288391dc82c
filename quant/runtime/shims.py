"""Direct calls of our operators from compiled graphs.

AOTInductor reaches an operator that it does not know through a generic call, for operators defined in Python through the
interpreter: some 15 us, 200 times per token. One with a shim is called as a C function instead. `shims.h` holds them: each
calls the C function that the eager operator calls, so both run the same kernel.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import torch

from quant.kernels.cpu.build import FOLDER, LIBRARY
from quant.kernels.dispatch import load_all

HEADER = Path(__file__).with_name("shims.h")


@cache
def table() -> dict[torch._ops.OpOverload, list[str]]:
    """Operator -> C++ text, as `aot_inductor.custom_ops_to_c_shims` takes it."""
    load_all()  # registers the operators
    text = HEADER.read_text(encoding="utf-8")
    names = dict.fromkeys(re.findall(r"AOTITorchError aoti_torch_cpu_(\w+)\(", text))
    first, *rest = (getattr(torch.ops.lowbit, name).default for name in names)
    # inductor writes `extern "C" { extern TEXT; }`: the first declaration and the last brace turn that into our own text
    whole = f'int lowbit_open;\n}}\n{text}\nextern "C" {{\nextern int lowbit_close'
    return {first: [whole], **{operator: [] for operator in rest}}


@cache
def publish() -> ctypes.CDLL:
    """Makes the C functions visible to libraries loaded later; compiled graphs find them by name."""
    return ctypes.CDLL(str(FOLDER / LIBRARY), mode=ctypes.RTLD_GLOBAL)
