"""Masked-diffusion language models: which models are such, and the masks they are calibrated and measured with.

Such a model sees a whole text at once, some tokens of it replaced by a mask token, and predicts the tokens under the masks
(LLaDA, Nie et al., 2025). Decoding starts with everything masked and ends with nothing masked, so its layers meet every
share of masks, which plain text never shows them. Calibration therefore masks its windows:

    l of the L positions, drawn without replacement, hold the mask token,    l uniform in 1 .. L, stratified over windows

and leaves a quarter of the windows visible, as the last steps of decoding are. Errors at positions that are predicted count
fully, those at visible ones, which only later layers read, by `calibration.visible_weight`. Its default is 1: on a small Llama
trained to fill in masks (three seeds; GPTQ at 3 bits, DGQ), 0.5 had more KL at masked positions in five of six cases and 0.1
in all, while masks as such divided it by 2.2 to 3.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.calibrate import Sample
from quant.recipe import Calibration

VISIBLE_EVERY = 4  # of so many windows one is not masked
FILLERS = {"llada": 0, "Dream": 1}  # config.model_type of models that are known to fill in masks -> Masking.shift


@dataclass(frozen=True)
class Masking:
    """token: the id that stands at a masked position. shift: the output for position i is read at i - shift (at 0 for 0)."""

    token: int
    shift: int = 0

    def read_at(self, masked: Tensor) -> Tensor:
        """int64 positions at which the predictions for the True positions of `masked` [L] are read, in order."""
        return (masked.nonzero().squeeze(1) - self.shift).clamp_min(0)


def masking(config: Mapping[str, Any]) -> Masking | None:
    """How the model of a config.json is masked; None for a model that is no masked-diffusion language model.

    Such a config names its mask token, and says `is_causal: false`, by which transformers lets a decoder attend to both
    sides, or is of a type in FILLERS.
    """
    token = config.get("mask_token_id")
    return Masking(token, shift_of(config)) if bidirectional(config) and type(token) is int else None


def shift_of(config: Mapping[str, Any]) -> int:
    """Masking.shift of the model of a config.json."""
    return FILLERS.get(str(config.get("model_type")), 0)


def bidirectional(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json attends to both sides."""
    return config.get("is_causal") is False or config.get("model_type") in FILLERS


def masking_for(config: Mapping[str, Any], wanted: Calibration, rows: int) -> tuple[Masking | None, str]:
    """How to mask the calibration data of the model of a config.json, and a line where a model like this is not masked.

    rows: tokens that the model knows. Raises ValueError for a mask token that is none of them, or of a causal model.
    """
    own, asked = masking(config), wanted.mask_token
    if asked == "none":
        return None, f"calibrated on text without masks, although the model fills in token {own.token}" if own else ""
    if asked is None:
        if own is None and bidirectional(config):
            return None, (
                "calibrated on text without masks: the model attends to both sides and config.json names no mask_token_id; "
                "if it fills in masks, --set calibration.mask_token=ID"
            )
        found = own
    else:
        if not bidirectional(config):
            raise ValueError(
                f"calibration.mask_token is {asked}, but the model attends to the left only; drop it, or write "
                '"is_causal": false into config.json if the model was trained to fill in masks'
            )
        found = Masking(asked, shift_of(config))
    if found is not None and not 0 <= found.token < rows:
        raise ValueError(f"the mask token is {found.token}, the model has {rows}; --set calibration.mask_token=ID")
    return found, ""


def counts(draws: int, length: int, generator: torch.Generator) -> list[int]:
    """For each of `draws` windows how many of its `length` positions are masked: uniform in 1 .. length, one per stratum."""
    unit = (torch.arange(draws) + torch.rand(draws, generator=generator, dtype=torch.float64)) / draws
    found = 1 + (unit * length).long().clamp_max(length - 1)
    shuffled: list[int] = found[torch.randperm(draws, generator=generator)].tolist()
    return shuffled


def positions(length: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `length` positions, drawn without replacement, as a bool mask [length]."""
    chosen = torch.zeros(length, dtype=torch.bool)
    chosen[torch.randperm(length, generator=generator)[:count]] = True
    return chosen


def masked_samples(
    windows: Tensor, how: Masking, wanted: Calibration, seed: int, device: torch.device
) -> tuple[list[Sample], str]:
    """Windows [W, L] of token ids as samples of the masked process, and what was masked in words."""
    count, length = windows.shape
    generator = torch.Generator().manual_seed(seed)
    draws = counts(count - count // VISIBLE_EVERY, length, generator)
    left = iter(draws)
    samples = []
    for at, row in enumerate(windows, 1):
        hidden = positions(length, next(left) if at % VISIBLE_EVERY else 0, generator).to(device)
        ids = row.to(device).masked_fill(hidden, how.token)
        predicted = torch.zeros_like(hidden)
        predicted[how.read_at(hidden)] = True
        weights = torch.where(predicted, 1.0, wanted.visible_weight)
        samples.append(Sample({"input_ids": ids.unsqueeze(0)}, {length: weights.unsqueeze(0)}, predicted))
    line = (
        f"{len(draws)} of them with {min(draws) / length:.0%} to {max(draws) / length:.0%} of the tokens masked by "
        f"token {how.token}, errors at visible tokens weighed by {wanted.visible_weight:g}"
    )
    return samples, line
