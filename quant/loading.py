"""`quant.load`: a folder written by `quantize` -> an ordinary transformers model, everything checked before it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import check_layers, layers_on_disk, read_config
from quant.models import index
from quant.stacks import match_names


def load(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Any:
    """The packed model in `path` in eval mode.

    dtype: of everything that is not packed (None: as in config.json; on a CPU, float16 becomes bfloat16, which CPUs
    compute in). device: any torch device. Raises ValueError, before reading tensors, for a folder that is not ours, an
    unknown format version, a file cut short, and the first tensor that is missing or has the wrong shape or dtype.
    """
    import accelerate
    import transformers

    from quant.serve import hook

    hook.install()
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is not a folder; give the folder that quantize wrote")
    config = read_config(folder)
    tensors = index(folder)
    auto = transformers.AutoConfig.from_pretrained(folder)
    name = (auto.architectures or [""])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(f"{folder} holds a {name or 'nameless'} model, which transformers {transformers.__version__} lacks")
    with accelerate.init_empty_weights():
        empty = cls._from_config(auto)
    linears = {n: (m.out_features, m.in_features) for n, m in empty.named_modules() if type(m) is torch.nn.Linear}
    on_disk = match_names(linears, [*layers_on_disk(tensors), *(n.removesuffix(".weight") for n in tensors)], least=1)
    check_layers(config["quantization_config"], tensors, {on_disk.get(n, n): shape for n, shape in linears.items()})
    if dtype is None:
        dtype = auto.dtype or torch.float32
        if dtype == torch.float16 and torch.device(device or "cpu").type == "cpu":
            dtype = torch.bfloat16
    model = cls.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval() if device is not None else model.eval()
