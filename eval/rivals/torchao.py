"""torchao on the float checkpoint, run by transformers in bfloat16; every linear is quantized, the output layer included.

A8W4 is not among the variants: torchao's CPU kernel for it is not in its wheels. The int4 tensors that torch's CPU kernel
takes are in torchao's prototype folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quant.eval import loading
from quant.eval.rivals.base import Rival
from quant.eval.speed_worker import Repeat, Workload, prompt_ids, text_repeat


class TorchAo(Rival):
    """Quantizes when it loads, as its users do, so it has no files."""

    distribution, pinned, module, kind = "torchao", ">=0.17,<0.20", "torchao", "text"
    variants = {  # noqa: RUF012
        "int4": "weights 4 bit in groups (128, or 64 or 32 where K asks for it), activations bfloat16",
        "int8": "weights 8 bit per row, activations 8 bit per token",
    }

    def open(self, source: Path, made: Path, variant: str, work: Workload, threads: int) -> Callable[[], Repeat]:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = loading.load(source, torch.bfloat16, "cpu")
        quantize_(model, Int8DynamicActivationInt8WeightConfig() if variant == "int8" else int4_config(model))
        ids = prompt_ids(model.config.vocab_size, work)
        return lambda: text_repeat(model, ids, work.new)


def int4_config(model: torch.nn.Module) -> Any:
    """Weight-only int4 with the largest group length that divides the in features of every linear; ValueError without one."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    widths = {module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear)}
    group = next((g for g in (128, 64, 32) if all(width % g == 0 for width in widths)), None)
    if group is None:
        raise ValueError(f"no group of 128, 64 or 32 divides the in features {sorted(widths)}")
    return PrototypeInt4WeightOnlyConfig(group_size=group)


RIVAL = TorchAo()
