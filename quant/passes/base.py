"""The kinds of pass, each with a promise that its test asserts.

A Transform changes weights but not the float output of a block. A Corrector changes what the quantizer aims at. A
Quantizer turns weight and statistics into Codes and never does worse than round-to-nearest on the error it minimizes.
A pass is one file here, named as in the recipe, holding a class `Pass`; its options are its pydantic fields.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from quant.kernels.format import Codes, Format
from quant.stats import InputStats

if TYPE_CHECKING:
    from quant.folds import BlockView


class BasePass(BaseModel):
    """Options of a pass; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Transform(BasePass, ABC):
    """Rewrites a float block in place, its output unchanged."""

    @abstractmethod
    def apply(self, view: BlockView) -> dict[str, str]:
        """Transform the block; return for each fold that was refused its name and the reason."""


class Corrector(BasePass, ABC):
    """Moves the quantizer's target."""

    @abstractmethod
    def correct(self, weight: Tensor, stats: InputStats) -> Tensor:
        """The [N, K] weight to quantize instead of `weight`."""


class Quantizer(BasePass, ABC):
    """Weight and statistics -> Codes. Rows are independent of each other."""

    @abstractmethod
    def refuses(self, fmt: Format) -> str | None:
        """Why this method cannot write `fmt`, or None."""

    @abstractmethod
    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        """weight float32 [N, K] -> Codes of `fmt`."""


def names() -> list[str]:
    """Every pass there is, by file name."""
    from quant import passes

    return sorted(m.name for m in pkgutil.iter_modules(passes.__path__) if m.name != "base")


def find(name: str) -> type[BasePass]:
    """The pass called `name`; `names()` lists them."""
    found: type[BasePass] = importlib.import_module(f"quant.passes.{name}").Pass
    return found
