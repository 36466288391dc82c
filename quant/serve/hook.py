"""Registers the transformers adapter when, and only when, transformers' quantizer registry is imported.

`import quant` must not pay for importing transformers, and must work whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
ADAPTER = "quant.serve.transformers"


def install() -> None:
    """Register now if transformers' registry is loaded, else as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(ADAPTER)
    elif not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder(MetaPathFinder):
    """Finds the registry as everyone else does, but with a loader that calls back."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The registry's own spec with its loader wrapped; None for every other module."""
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = Following(spec.loader)
        return spec


class Following(Loader):
    """Runs a loader, then imports the adapter."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the wrapped loader does."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the wrapped loader does; then the adapter registers itself."""
        self.inner.exec_module(module)
        importlib.import_module(ADAPTER)
