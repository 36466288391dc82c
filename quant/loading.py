"""`quant.load`: a folder written by `quantize` -> an ordinary transformers model, everything checked before it is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import check_layers, read_config
from quant.kernels.gpu import deployed
from quant.models import index, model_class, resolve
from quant.resources import usable_device
from quant.stacks import disk_names, skeleton, unfilled


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    compile: bool | None = None,  # noqa: A002  # the word that torch users know
    cache: str = "float",
) -> Any:
    """The packed model in `path`, a folder or a hub id, in eval mode.

    dtype: of everything that is not packed (None: as in config.json; on a CPU, float16 becomes bfloat16, which CPUs
    compute in). device: any torch device. compile: whether `generate` runs compiled graphs (quant/runtime, CPUs only); True
    makes what is not on disk yet, which takes a minute and is said in one line; None takes what is there; False runs layer
    by layer. Both give the same text. cache: "float" or "int8" keys and values, for compiled graphs.

    Raises ValueError, before reading tensors, for a folder that is not ours, an unknown format version, a file cut short,
    and the first tensor that is missing or has the wrong shape or dtype.
    """
    from quant.serve import hook

    hook.install()
    if device is not None:
        usable_device(str(device))
    folder = Path(path) if Path(path).is_dir() else resolve(path)
    config = read_config(folder)
    tensors = index(folder)
    auto, cls = model_class(folder)
    empty = skeleton(auto, cls, auto.dtype or torch.float32)
    packed = check_layers(config["quantization_config"], tensors, empty)
    on_disk = disk_names(empty, tensors)
    for name in unfilled(empty, on_disk):
        if name.rpartition(".")[0] not in packed or not name.endswith(".weight"):
            raise ValueError(f"{name} is missing from {folder}; copy it again or quantize again")
    if dtype is None:
        dtype = auto.dtype or torch.float32
        if dtype == torch.float16 and torch.device(device or "cpu").type == "cpu":
            dtype = torch.bfloat16
    model = cls.from_pretrained(folder, dtype=dtype)
    if os.environ.get("LOWBIT_BUNDLE") == "use":  # machine code out of a checkpoint: only on the user's word
        deployed.offer(folder)
    model = model.to(device).eval() if device is not None else model.eval()
    if model.device.type == "cpu":
        if compile is not False:
            from quant.runtime import compiled

            compiled(model, cache, say if compile else None)
    elif compile:
        raise ValueError(f"compile=True was given with device {device}; compiled graphs run on the CPU: drop one of the two")
    return model


def say(line: str) -> None:
    """To the error stream, where it mixes with no result."""
    print(line, file=sys.stderr)
