"""What happens to tokens before they meet a weight: an exact rotation, then rounding. The reference that kernels reproduce.

A new rule is one file in `activations/` with a class decorated by `@register`. Rules without stored tensors measure each
token as it comes (dynamic); others keep what calibration found beside the weights (static).
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from quant.kernels.format import Field, Fields, Format, check_fields
from quant.kernels.registry import import_files, made
from quant.kernels.rotation import largest_block, rotate

ABSMAX_FLOOR = 1e-5  # an all-zero token gets this absmax, so its scale is never zero


@dataclass(frozen=True, kw_only=True)
class Activation(ABC):
    """rotate: block size of a Hadamard rotation of the input channels, 0 for none; the weight's codes are then those of W R."""

    name: ClassVar[str]
    rotate: int = 0

    def refuses(self, k: int) -> str | None:
        """Why inputs of K channels cannot be treated so, or None."""
        if self.rotate and (self.rotate < 2 or largest_block(self.rotate, k) != self.rotate):
            return f"rotate {self.rotate} is no power of two above 1 that divides K = {k}"
        return None

    def fields(self, k: int) -> dict[str, Field]:
        """Name -> shape and dtype of the tensors stored beside the weight, all called `input_...`."""
        return {}

    def fit(self, tokens: Tensor, absmax: Tensor) -> Fields:
        """The stored tensors, from rotated calibration tokens [T, K] and the absmax of each channel over all tokens [K]."""
        return {}

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        """Raise ValueError, naming the first stored tensor beside an [n, k] weight that is wrong."""
        check_fields(self.name, self.fields(k), fields, n, k)

    @abstractmethod
    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Rotated tokens [..., K] as the multiplication sees them: rounded, in float32."""

    def rotated(self, x: Tensor) -> Tensor:
        """x [..., K] in the channels that the weight's codes belong to, in x's dtype."""
        return rotate(x, self.rotate)

    def config(self) -> str | dict[str, Any]:
        """From which `from_config` makes an equal object: the name alone where all else is as by default."""
        values = asdict(self)
        changed = {k: v for k, v in values.items() if v != type(self).__dataclass_fields__[k].default}
        return {"name": self.name, **changed} if changed else self.name

    def __str__(self) -> str:
        config = self.config()
        if isinstance(config, str):
            return config
        return ", ".join([self.name, *(f"{key} {value}" for key, value in config.items() if key != "name")])


def fields_of(fmt: Format, activation: Activation, n: int, k: int) -> dict[str, Field]:
    """Name -> shape and dtype of everything that is stored of an [n, k] linear but its bias."""
    return {**fmt.fields(n, k), **activation.fields(k)}


ACTIVATIONS: dict[str, type[Activation]] = {}
A = TypeVar("A", bound=type[Activation])


def register(cls: A) -> A:
    """Class decorator: make an activation rule known under its name."""
    assert cls.name not in ACTIVATIONS, f"two activation rules are called {cls.name}"
    ACTIVATIONS[cls.name] = cls
    return cls


@cache
def load_all() -> dict[str, type[Activation]]:
    """Import every file in `activations/` and return the registry."""
    from quant.kernels import activations

    import_files(activations)
    return ACTIVATIONS


def from_config(config: str | Mapping[str, Any]) -> Activation:
    """Inverse of `Activation.config`. Raises ValueError for an unknown rule or parameter."""
    values = {"name": config} if isinstance(config, str) else dict(config)
    name, known = values.pop("name", None), load_all()
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(known))}"
        raise ValueError(f"unknown activation {name!r}; {hint}")
    return made(known[name], f"activation {name}", values)
