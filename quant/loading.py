"""`quant.load`: a folder written by `quantize` -> an ordinary transformers model, everything checked before it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import check_layers, read_config
from quant.models import index, model_class
from quant.resources import usable_device
from quant.siblings import link
from quant.stacks import disk_names, unfilled


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """The packed model in `path` in eval mode.

    dtype: of everything that is not packed (None: as in config.json; on a CPU, float16 becomes bfloat16, which CPUs
    compute in). device: any torch device. Raises ValueError, before reading tensors, for a folder that is not ours, an
    unknown format version, a file cut short, and the first tensor that is missing or has the wrong shape or dtype.
    """
    import accelerate

    from quant.serve import hook

    hook.install()
    folder = Path(path)
    if device is not None:
        usable_device(str(device))
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder that quantize wrote")
    config = read_config(folder)
    tensors = index(folder)
    auto, cls = model_class(folder)
    with accelerate.init_empty_weights():
        empty = cls._from_config(auto)
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
    link(model)
    return model.to(device).eval() if device is not None else model.eval()
