"""A packed folder in any mix of schemes, made without a run: every weight rounded to nearest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.checkpoint import SENTINEL_SHAPE, quantization_config, scheme_of
from quant.kernels.activation import Activation
from quant.kernels.format import Format
from quant.kernels.rotation import by_matrix
from quant.targets import Target

Scheme = Callable[[str], tuple[Format, Activation] | None]
Pack = Callable[[Path, Path, Scheme], Path]


@pytest.fixture(scope="session")
def pack() -> Pack:
    """pack(source, out, scheme): `source` with those matrices packed for which scheme(name on disk, no .weight) is not None."""

    def folder(source: Path, out: Path, scheme: Scheme) -> Path:
        shutil.copytree(source, out)
        tensors = load_file(out / "model.safetensors")
        targets, kept = {}, []
        for key in sorted(tensors):
            name = key.removesuffix(".weight")
            if not key.endswith(".weight") or tensors[key].ndim != 2:
                continue
            found = scheme(name)
            if found is None:
                kept.append(name)
                continue
            fmt, rule = found
            weight = by_matrix(tensors.pop(key).float(), rule.rotate)
            n, k = weight.shape
            tokens = torch.randn(64, k, generator=torch.Generator().manual_seed(len(targets)))
            fields = fmt.pack(fmt.nearest(weight)) | rule.fit(tokens, tokens.abs().amax(0))
            tensors |= {f"{name}.{field}": value for field, value in fields.items()}
            targets[name] = Target(name, n, k, False, fmt, rule)
        tensors[f"{next(iter(targets))}.weight"] = torch.empty(SENTINEL_SHAPE, dtype=torch.uint8)
        section = quantization_config(targets, [])
        section["float"] = [name for name in kept if scheme_of(section, name)]
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
        return out

    return folder
