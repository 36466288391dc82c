"""Which tokens keep 8 bits: a threshold per block on the attention that a token pays the sink, after all blocks are packed.

The threshold of a block is the quantile of its tokens' importance at which `share` of them reach it. One forward pass chooses
all: every block chooses on tokens that went through the blocks before it as they will be served. Ranking the tokens of each
window, as published, would let later tokens decide over earlier ones; a threshold can be served. (EdgeQAT, Shen et al., 2024.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from quant.kernels import sinks
from quant.passes.base import Tell, Tuner
from quant.resources import compute_dtype
from quant.serve.token_bits import Sink, attentions
from quant.train.processes import joined

if TYPE_CHECKING:
    from quant.plan import Plan
    from quant.train.pace import Pace


class Pass(Tuner):
    """share: of the tokens of calibration text that keep 8 bits, 0 to 1. windows: that are looked at, of `length` tokens.

    length: null for calibration.length. Take that of the texts to be served: in longer ones the mass on the sink falls, and so
    does the share. SmolLM2-135M with thresholds of windows of 512 keeps 40 % instead of 50 in windows of 1024.
    """

    share: float = Field(0.5, ge=0, le=1)
    windows: int = Field(16, ge=1)
    length: int | None = Field(None, ge=8)

    def tune(
        self, folder: Path, plan: Plan, device: torch.device, state: Path, tell: Tell, pace: Pace | None
    ) -> dict[str, Any]:
        from quant.loading import load
        from quant.samples import make_samples

        wanted = plan.recipe.calibration
        length = self.length or wanted.length
        looked = wanted.model_copy(update={"length": length, "tokens": self.windows * length})
        samples, line = make_samples(replace(plan, recipe=plan.recipe.model_copy(update={"calibration": looked})), device)
        ids = torch.cat([sample.inputs["input_ids"] for sample in samples])
        crew = joined(device)
        if crew.main:
            found = calibrate(load(folder, dtype=compute_dtype(device), device=device, compile=False), ids, self.share)
            path = folder / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config["quantization_config"]["token_thresholds"] = found
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        crew.wait()
        return {"pass": self.name(), "data": line, "share": self.share}


@dataclass
class Choosing(Sink):
    """Chooses its threshold by the first tokens that it sees."""

    share: float = 0.5
    chosen: bool = False

    def mark(self, importance: Tensor) -> None:
        if not self.chosen:
            self.threshold, self.chosen = sinks.threshold(importance, self.share), True
        super().mark(importance)


@torch.no_grad()
def calibrate(model: Any, ids: Tensor, share: float) -> list[float]:
    """Give a loaded model thresholds for windows of tokens [B, T], which are returned."""
    places = attentions(model)
    for module in places:
        module.token_bits = Choosing(module.token_bits.tags, 0.0, share)
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    thresholds = [float(module.token_bits.threshold) for module in places]
    for module, threshold in zip(places, thresholds, strict=True):
        module.token_bits = Sink(module.token_bits.tags, threshold)
    return thresholds
