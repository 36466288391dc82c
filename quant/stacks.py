"""The model's shape without its weights: stacks of blocks that run one after another, and where each tensor is on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.experts import unstack
from quant.models import model_class, read_header
from quant.naming import match

PACKED = ".weight_packed"


@dataclass(frozen=True)
class Stack:
    """A module list whose blocks run in sequence, by name: ("model.layers", ("model.layers.0", ...))."""

    name: str
    blocks: tuple[str, ...]


def empty_model(folder: Path) -> Any:
    """The transformers model of a folder with all parameters on the meta device and real buffers, its experts apart.

    Raises ValueError when config.json cannot be used or names no class that this transformers knows.
    """
    config, cls = model_class(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized already; give the float model it was made from")
    model = skeleton(config, cls, torch.float32)
    model.eval()
    model.requires_grad_(False)
    return model


def skeleton(config: Any, cls: Any, dtype: torch.dtype) -> Any:
    """A model of class `cls` with all parameters on the meta device in `dtype` and real buffers, its experts apart."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        model = cls._from_config(config, dtype=dtype)
    unstack(model)
    return model


def find_stacks(model: nn.Module) -> list[Stack]:
    """Outermost module lists whose entries are of one class and all hold an nn.Linear, in the order they are defined.

    transformers defines encoders before decoders, which is also the order they run in.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer.name}.") for outer in stacks):
            continue
        same = len({type(block) for block in module}) == 1
        if same and all(any(type(m) is nn.Linear for m in block.modules()) for block in module):
            stacks.append(Stack(name, tuple(f"{name}.{i}" for i in range(len(module)))))
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no list of blocks that hold linear layers; nothing to quantize")
    return stacks


def disk_names(model: nn.Module, on_disk: Iterable[str]) -> dict[str, str]:
    """Parameter name in memory -> tensor name on disk, for every parameter that is stored."""
    return match(model, (name for name, _ in model.named_parameters()), on_disk, least=2)


def unfilled(model: nn.Module, disk: Mapping[str, str]) -> list[str]:
    """Parameters that loading would have to invent: not stored, not tied to another, not declared optional by the class.

    `disk`: as `disk_names` gives it.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    absent = [name for name, _ in model.named_parameters() if name not in disk and name not in tied]
    return [name for name in absent if not any(re.search(pattern, name) for pattern in optional)]


def disk_layers(model: nn.Module, layers: Iterable[str], files: Iterable[str | Path]) -> dict[str, str]:
    """Packed layer in memory -> its name on disk, read from the headers of a checkpoint's safetensors files."""
    stored = [name for file in files for name in read_header(Path(file))]
    packed = [name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)]
    return match(model, layers, packed, least=1, suffix=".weight")
