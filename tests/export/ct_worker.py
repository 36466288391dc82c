"""Runs in a process of its own, under one copy of compressed-tensors: what that library itself writes and reads.

python ct_worker.py REQUEST.json
{"compress": [{"group": config group, "given": state dict file, "out": file}],
 "load": [{"folder": exported folder, "ids": [[...]], "out": file, "dtype": name, "dequantize": bool}]}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file


def compress(group: dict[str, Any], given: str, out: str) -> None:
    """The library's compressor on one linear."""
    scheme = QuantizationScheme.model_validate({**group, "targets": ["Linear"]})
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    made = compressor.compress(load_file(given), scheme)
    save_file({name: value.contiguous() for name, value in made.items()}, out)


@torch.no_grad()
def load(folder: str, ids: list[list[int]], out: str, dtype: str, dequantize: bool) -> None:
    """Logits of transformers' model with the activations in floats, then as served; and its weights."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)
    found = {}
    for key, enabled in (("logits", False), ("served", True)):
        for module in model.modules():
            module.quantization_enabled = enabled
        found[key] = model(torch.tensor(ids)).logits
    found |= {name: value.detach().clone() for name, value in model.state_dict().items() if name.endswith(".weight")}
    save_file(found, out)


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    for case in request["compress"]:
        compress(**case)
    for case in request["load"]:
        load(**case)
