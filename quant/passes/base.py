"""The kinds of pass, each with a promise that its test asserts.

A Refiner chooses formats before the run. A Transform changes weights but not the float output of a block. A Corrector
changes what the quantizer aims at. A Quantizer turns weight and statistics into Codes and never does worse than
round-to-nearest on the error it minimizes. A BlockTuner trains a packed block before the next one is quantized, and never
ends with a greater loss on held-out samples than it began with. A Tuner trains the packed model when all blocks are done.
A pass is one file here, named as in the recipe, holding a class `Pass`; its options are its pydantic fields.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from quant.kernels.activation import Activation
from quant.kernels.format import Codes, Fields, Format
from quant.rounding import descend, gptq_codes
from quant.search import shrunk
from quant.stats import ROWS_KEPT, InputStats

if TYPE_CHECKING:
    from quant.calibrate import Sample
    from quant.folds import BlockView
    from quant.plan import Plan
    from quant.targets import Target
    from quant.train.block import PackedBlock
    from quant.train.pace import Pace


class BasePass(BaseModel):
    """Options of a pass; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: ClassVar[int] = ROWS_KEPT  # tokens of each sequence that it wants to see whole
    shifts: ClassVar[bool] = False  # whether it may shift inputs, so that every reader of a shifted norm needs a bias

    @classmethod
    def name(cls) -> str:
        """As recipes spell it."""
        return cls.__module__.rpartition(".")[2]

    @property
    def rounded(self) -> bool:
        """Whether passes after the transforms shall see statistics of the inputs as packed layers read them: rounded."""
        return False


class Transform(BasePass, ABC):
    """Rewrites a float block in place, its output unchanged."""

    @abstractmethod
    def apply(self, view: BlockView) -> dict[str, str]:
        """Transform the block; return for each fold that was refused its name and the reason."""


class Corrector(BasePass, ABC):
    """Moves the quantizer's target."""

    @property
    def needs_float(self) -> bool:
        """Whether `stats.drift` must be that to the float chain."""
        return True

    @abstractmethod
    def correct(self, weight: Tensor, stats: InputStats) -> Tensor:
        """The [N, K] weight to quantize instead of `weight`."""


class Quantizer(BasePass, ABC):
    """Weight and statistics -> Codes. Rows are independent of each other unless they share a codebook."""

    @abstractmethod
    def refuses(self, fmt: Format) -> str | None:
        """Why this method cannot write `fmt`, or None."""

    @abstractmethod
    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        """weight float32 [N, K] -> Codes of `fmt`."""

    def decide(self, weight: Tensor, stats: InputStats, fmt: Format, activation: Activation) -> tuple[Codes, Fields]:
        """Codes, and the tensors that the activation rule stores, none without data.

        A method that chooses the two together overrides this.
        """
        return self.quantize(weight, stats, fmt), stats.fitted(activation)


class Choice(NamedTuple):
    """A format for one layer, and why, in a few words for the plan and the report."""

    format: Format
    note: str


class Refiner(BasePass, ABC):
    """Chooses formats from the weights while the plan is made (quant/refine.py). May be the recipe's Quantizer as well.

    Transforms have not run then: the weights are those of the checkpoint.
    """

    @abstractmethod
    def refine(self, families: Sequence[Sequence[Target]], read: Callable[[str], Tensor]) -> dict[str, Choice]:
        """A choice by layer name; layers that are left out keep their format.

        families: targets that serving stacks fuse, which must get one format; what a rule fixes is not among them.
        read: layer name -> its float32 weight [N, K], rotated as its activation rule asks, read from disk at each call.
        """


class BlockTuner(BasePass, ABC):
    """Changes numbers of a packed block, never names, shapes or dtypes, while its inputs and the float outputs are at hand."""

    def prepare(self, plan: Plan, samples: list[Sample], folder: Path, device: torch.device) -> None:
        """Measure on the float model, before the first block, what `tune` wants to read from `folder`.

        Called again when a killed run goes on; the folder then holds what was written before.
        """

    @abstractmethod
    def tune(self, block: PackedBlock, folder: Path, pace: Pace | None) -> dict[str, Any]:
        """Train `block` in place; returns what report.json says of it. pace: the time for it, None for the pass's own steps."""


Tell = Callable[[int, int, float], None]  # training steps done, of how many, and the loss


class Tuner(BasePass, ABC):
    """Changes numbers in a folder of packed tensors, never their names, shapes or dtypes."""

    @property
    def maps(self) -> int:
        """How many tensors of the size of an attention map [heads, tokens, tokens] it holds at once, for every layer."""
        return 0

    @abstractmethod
    def tune(
        self, folder: Path, plan: Plan, device: torch.device, state: Path, tell: Tell, pace: Pace | None
    ) -> dict[str, Any]:
        """Train the packed model in `folder`; returns what report.json says of it.

        state: what a killed run goes on from. pace: the time for it, None for the pass's own steps.
        """


class GridRounder(Quantizer, ABC):
    """A quantizer that chooses a grid first and then rounds to it by GPTQ and coordinate descent.

    round: by GPTQ, or to nearest. act_order: visit input channels by falling energy. damp: share of the mean Gram diagonal.
    shrink: 0 to 1, see `search.shrunk`. sweeps: of coordinate descent after GPTQ. Published GPTQ is act_order with shrink =
    sweeps = 0.
    """

    round: Literal["nearest", "gptq"] = "gptq"
    act_order: bool = True
    damp: float = Field(0.01, gt=0, le=1)
    shrink: float = Field(0.0, ge=0, le=1)
    sweeps: int = Field(3, ge=0, le=100)

    def gram(self, stats: InputStats) -> Tensor:
        """The Gram matrix [K, K] that errors are measured with."""
        return shrunk(stats.gram, self.shrink)

    def codes(self, weight: Tensor, gram: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
        """uint8 codes [N, K] on a grid of step and zero [N, K // G]. Raises ValueError where `gram` cannot be factored."""
        if self.round == "nearest":
            grouped = weight.view(*step.shape, -1) / step.unsqueeze(-1)
            codes = (grouped.round_() + zero.unsqueeze(-1)).clamp_(0, levels - 1)
            return codes.to(torch.uint8).view(weight.shape)
        codes = gptq_codes(weight, gram, step, zero, levels, act_order=self.act_order, damp=self.damp)
        return descend(weight, gram, codes, step, zero, levels, self.sweeps)


def names() -> list[str]:
    """Every pass there is, by file name."""
    from quant import passes

    return sorted(m.name for m in pkgutil.iter_modules(passes.__path__) if m.name != "base")


def find(name: str) -> type[BasePass]:
    """The pass called `name`; `names()` lists them."""
    found: type[BasePass] = importlib.import_module(f"quant.passes.{name}").Pass
    return found
