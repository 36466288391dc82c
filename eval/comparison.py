"""A comparison as a table, as CSV and JSON, and as a figure with its Pareto front."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from quant.eval.compare import Cost, Made, Row
from quant.eval.drawing import pyplot
from quant.eval.judge import Measured
from quant.eval.tables import pm, table_of

FRONT = "*"  # marks rows that no other row beats in bits and KL at once


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points (cost, loss) that no other is as good as in both and better than in one."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    return {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}


def done(rows: Sequence[Row]) -> list[tuple[str, Made, Measured]]:
    """The rows that have numbers."""
    return [(row.recipe, row.made, row.measured) for row in rows if row.made is not None and row.measured is not None]


def show(model: str, about: str, rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the comparison."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    console.print(f"{model}; {about}", markup=False, highlight=False, soft_wrap=True)
    ready = done(rows)
    if ready:
        console.print(_table(ready))
        console.print(
            f"{FRONT} Pareto front: no other recipe has fewer bits and a smaller mean KL", markup=False, highlight=False
        )
    for row in rows:
        if row.failed:
            console.print(f"{row.recipe}: {row.failed}", markup=False, highlight=False, soft_wrap=True)


def _table(ready: Sequence[tuple[str, Made, Measured]]) -> Any:
    speech = ready[0][2].perplexity is None
    columns: dict[str, Callable[[Made, Measured], str]] = {
        "bits/weight": lambda made, got: f"{made.bits_per_weight:.3f}",
        "on disk": lambda made, got: f"{made.weight_bytes / 1e6:.1f} MB",
    }
    first = ready[0][2]
    if speech:
        columns |= {
            f"WER (float {first.reference_wer:.2%})" if first.reference_wer is not None else "WER": lambda made, got: pm(
                got.wer, None, ".2%"
            ),
            "change": lambda made, got: pm(got.wer_change, got.wer_change_error, "+.2%"),
        }
    else:
        columns |= {
            f"perplexity (float {first.reference_perplexity:.3f})": lambda made, got: pm(got.perplexity, None, ".3f"),
            "ratio": lambda made, got: pm(got.ratio, got.ratio_error, ".4f"),
        }
    columns |= {
        "mean KL": lambda made, got: pm(got.kl_mean, got.kl_error, ".5f"),
        "99 % KL": lambda made, got: f"{got.kl_p99:.4f}",
        "top-1": lambda made, got: pm(got.top1, got.top1_error, ".2%"),
        "quantized in": lambda made, got: f"{made.quantize_seconds:.0f} s",
    }
    table = table_of("recipe", *columns)
    best = front([(made.bits_per_weight, got.kl_mean) for _, made, got in ready])
    for at, (name, made, got) in enumerate(ready):
        table.add_row(f"{name} {FRONT * (at in best)}".rstrip(), *(cell(made, got) for cell in columns.values()))
    return table


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per recipe, numbers unrounded; a recipe that failed has its reason and empty numbers."""
    numbers = [*Made.__dataclass_fields__, *Measured.__dataclass_fields__]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["recipe", *numbers, "failed"])
        writer.writeheader()
        for row in rows:
            parts = [asdict(part) for part in (row.made, row.measured) if part is not None]
            writer.writerow({"recipe": row.recipe, "failed": row.failed, **{k: v for part in parts for k, v in part.items()}})


def write_json(model: str, about: str, rows: Sequence[Row], path: Path) -> None:
    """The same, nested as in the dataclasses."""
    found = {"model": model, "data": about, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(model: str, about: str, rows: Sequence[Row], path: Path, cost: Cost) -> None:
    """The cost against mean KL, and against the perplexity ratio or the change of the word error rate."""
    plot = pyplot()
    ready = done(rows)
    if not ready:
        return
    names = [name for name, _, _ in ready]
    costs = [cost.of(made) for _, made, _ in ready]
    panels = [("mean KL divergence (nats)", "log", [(got.kl_mean, got.kl_error or 0) for *_, got in ready])]
    if ready[0][2].ratio is not None:
        panels.append(("perplexity / float", "log", [(got.ratio or 0, got.ratio_error or 0) for *_, got in ready]))
    elif ready[0][2].wer_change is not None:
        changes = [(100 * (got.wer_change or 0), 100 * (got.wer_change_error or 0)) for *_, got in ready]
        panels.append(("change of WER (points)", "linear", changes))
    figure, axes = plot.subplots(1, len(panels), figsize=(8.5 * len(panels), 7.5), layout="constrained", squeeze=False)
    for axis, (title, scale, found) in zip(axes[0], panels, strict=True):
        values = [value for value, _ in found]
        axis.set_yscale(scale)
        best = sorted(front(list(zip(costs, values, strict=True))), key=lambda i: costs[i])
        axis.plot([costs[i] for i in best], [values[i] for i in best], color="tab:orange", linewidth=1.2, label="Pareto front")
        axis.errorbar(costs, values, [error for _, error in found], fmt="none", ecolor="gray", elinewidth=0.8)
        rest = [i for i in range(len(ready)) if i not in best]
        axis.scatter([costs[i] for i in rest], [values[i] for i in rest], color="tab:blue", zorder=3)
        axis.scatter([costs[i] for i in best], [values[i] for i in best], color="tab:orange", edgecolor="black", zorder=3)
        axis.margins(0.15)
        axis.set_xscale(cost.scale)
        axis.set_xlabel(cost.title)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        for log, sides in ((scale == "log", axis.yaxis), (cost.scale == "log", axis.xaxis)):
            if log:
                sides.set_major_formatter("{x:g}")
                sides.set_minor_formatter("{x:g}")
        named = range(len(ready)) if axis is axes[0][0] else best  # once is enough, where there are many
        label(figure, axis, [(costs[i], values[i], names[i]) for i in named])
    figure.suptitle(f"{model}\n{about}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")
    plot.close(figure)


def label(figure: Any, axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """A name beside each point, in the first of some places around it where it covers no other name and no point.

    From left to right and, at the same x, down.
    """
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # fixes the scales, so that text has a size
    renderer = figure.canvas.get_renderer()
    dots = [axis.transData.transform((x, y)) for x, y, _ in points]
    corners = [(7, 5), (-7, 5), (7, -12), (-7, -12)]
    places = [*corners, *((side * 7, step * 13) for step in (2, -2, 3, -3, 4, -4) for side in (1, -1))]
    taken: list[Any] = []

    def fits(box: Any) -> bool:
        inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0 and box.y1 <= axis.bbox.y1
        return inside and not any(map(box.overlaps, taken)) and not any(box.contains(*dot) for dot in dots)

    for x, y, name in sorted(points, key=lambda point: (point[0], -point[1])):
        text = axis.annotate(name, (x, y), xytext=corners[0], textcoords="offset points", fontsize=8)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable where a line passes
        for dx, dy in (*places, corners[0]):
            text.set_position((dx, dy))
            text.set_horizontalalignment("left" if dx > 0 else "right")
            box = text.get_window_extent(renderer).padded(1)
            if fits(box):
                break
        taken.append(box)
