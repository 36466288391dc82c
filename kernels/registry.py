"""What registries of formats, activation rules and kernels share: files that register themselves, objects from plain values."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def import_files(package: ModuleType) -> None:
    """Import every file of a package, each of which registers what it defines."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def made(cls: type[T], what: str, values: Mapping[str, Any]) -> T:
    """cls(**values) for a dataclass with defaults. Raises ValueError in one line for an unknown parameter or a wrong type.

    what: the object in words, for instance "format int_group".
    """
    allowed: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
    for key, value in values.items():
        if key not in allowed:
            raise ValueError(f"{what} has no parameter {key!r}; it has: {', '.join(allowed)}")
        kind = type(allowed[key].default)
        if type(value) is not kind:
            raise ValueError(f"{what}: {key} is {value!r}; it must be of type {kind.__name__}")
    return cls(**values)
