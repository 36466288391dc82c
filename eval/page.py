"""`quantize eval --html`: an evaluation as one page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from quant import page
from quant.eval import report
from quant.eval.divergence import KL_EDGES, Fidelity
from quant.eval.drawing import pyplot, svg


def write(result: report.Evaluation, path: Path) -> None:
    """Write the page; ValueError when the place cannot be written."""
    found: Mapping[str, Fidelity] = {}
    if result.masked is not None:
        found = {f"{share} masked": fidelity for share, fidelity in result.masked.fidelity.items()}
    elif (part := result.text or result.speech) is not None and part.fidelity is not None:
        found = {"": part.fidelity}
    page.write(
        path,
        "eval.html",
        result=result,
        sections=[section for section in report.sections(result) if section.title != report.SIDES],
        pairs=report.pairs(result),
        figure=histogram(found) if found else "",
        numbers=report.as_json(result),
    )


def histogram(found: Mapping[str, Fidelity]) -> Markup:
    """Shares of tokens by KL divergence, one line each; for a single one its percentiles as well."""
    plot = pyplot()
    figure, axis = plot.subplots(figsize=(8.5, 3.6), layout="constrained")
    for name, one in found.items():
        shares = [count / one.tokens for count in one.kl_counts]
        axis.stairs(shares, KL_EDGES, fill=len(found) == 1, alpha=0.6 if len(found) == 1 else 1, label=name)
    if len(found) == 1:
        marks = {"median": one.kl_median, "mean": one.kl_mean, "99 %": one.kl_p99, "99.9 %": one.kl_p999, "max": one.kl_max}
        for at, (name, value) in enumerate(marks.items()):
            if value >= KL_EDGES[0]:
                axis.axvline(value, color="tab:orange", linewidth=1)
                axis.text(value, 1.02 + 0.07 * (at % 2), name, transform=axis.get_xaxis_transform(), ha="center", fontsize=8)
    else:
        axis.legend(fontsize=8)
    used = [at for one in found.values() for at, count in enumerate(one.kl_counts) if count]
    axis.set_xscale("log")
    axis.set_xlim(KL_EDGES[min(used)], KL_EDGES[max(used) + 1])
    axis.set_xlabel("KL divergence of a token (nats); the first and the last bar hold what lies beyond")
    axis.set_ylabel("share of tokens")
    axis.grid(alpha=0.3)
    return svg(figure)
