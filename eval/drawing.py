"""Figures by matplotlib, which the package does without until one is asked for."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

from markupsafe import Markup


def require_matplotlib(option: str) -> None:
    """ValueError where figures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{option} needs matplotlib, which is not installed; pip install 'lowbit[figures]'")


def pyplot() -> Any:
    """matplotlib.pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def svg(figure: Any) -> Markup:
    """A figure as an <svg> element to put into a page: text stays text, and nothing outside is named but the namespaces."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowbit"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    pyplot().close(figure)
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])
