"""lowbit: turns float Hugging Face checkpoints into low-bit ones that load where people already serve.

    model = quant.quantize("path-or-id", recipe="dgq", output="out")
    model = quant.load("out")

Importing this package is cheap and makes transformers able to load what it wrote.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quant.serve import hook

if TYPE_CHECKING:
    from quant.api import quantize as quantize
    from quant.linear import PackedLinear as PackedLinear
    from quant.loading import load as load

__version__ = "0.1.0"
PUBLIC = {"quantize": "quant.api", "load": "quant.loading", "PackedLinear": "quant.linear"}

hook.install()


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"quant has no {name!r}; it has {', '.join(PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
