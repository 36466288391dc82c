"""How near the CPU kernels come to what the machine can do: `python -m quant.eval.roofline FIGURE.png`.

No product can take less time than reading its bytes, or than its arithmetic:
    bound = max((weight bytes + 2 m (k + n)) / stream, 2 m n k / peak),    share of the roofline = bound / measured time
`stream` is the reading speed kernel_speed measures in the same run (weights, and bfloat16 tokens in and out, count once).
`peak` is the fastest product seen in this run with the same kind of operands: torch's int8 and bfloat16 GEMM on large
square matrices, or a measured kernel if that is faster. It is a speed reached, not a number from a data sheet.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from quant.eval.drawing import pyplot
from quant.eval.kernel_speed import kernel_speed

TOKENS = (1, 4, 16, 64, 512)
SIDES = (1024, 2048)  # of the square matrices
PANELS = {  # operands -> kernels as kernel_speed calls them, ours first
    "int8": (("A8W4", "W8A8"), ("ggml Q4_0", "ggml Q8_0", "torch int8")),
    "bf16": (("W8A16", "W4A16", "W3A16", "W2A16"), ("torch int4", "torch bf16")),
}
TITLES = {"int8": "8-bit tokens", "bf16": "bfloat16 tokens"}


@torch.no_grad()
def gemm_tops(operands: str, threads: int) -> float:
    """Tera-operations per second of torch's best large square product, "int8" or "bf16"."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    try:
        for side in SIDES:
            a, b = (
                torch.randint(-127, 128, (side, side), dtype=torch.int8)
                if operands == "int8"
                else torch.randn(side, side).bfloat16()
                for _ in range(2)
            )
            seconds = []
            for _ in range(7):
                start = time.perf_counter()
                torch._int_mm(a, b.t()) if operands == "int8" else torch.nn.functional.linear(a, b)
                seconds.append(time.perf_counter() - start)
            best = max(best, 2e-12 * side**3 / statistics.median(seconds[2:]))
    finally:
        torch.set_num_threads(before)
    return best


def shares(rows: list[dict[str, Any]], gemm: dict[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Kernel -> tokens -> share of the roofline, 1 at the roof; operands -> peak in TOPS. `rows` are kernel_speed's."""
    operands = {kernel: kind for kind, panel in PANELS.items() for group in panel for kernel in group}
    peaks = {
        kind: max([tops, *(row["tops"] for row in rows if operands.get(row["kernel"]) == kind)]) for kind, tops in gemm.items()
    }
    streams = {row["m"]: row["weight_gb_s"] for row in rows if row["kernel"] == "stream"}  # one in every turn
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["kernel"] not in operands:
            continue
        m, n, k = row["m"], row["n"], row["k"]
        size = row["weight_gb_s"] * row["ms"] * 1e6 + 2 * m * (k + n)  # bytes
        bound_ms = max(size / streams[m] * 1e-6, 2e-9 * m * n * k / peaks[operands[row["kernel"]]])
        found.setdefault(row["kernel"], {})[m] = bound_ms / row["ms"]
    return found, peaks


def draw(rows: list[dict[str, Any]], gemm: dict[str, float], machine: str, out: Path) -> None:
    """Write the figure: one panel per kind of operands, our kernels thick, rivals thin."""
    plot = pyplot()
    found, peaks = shares(rows, gemm)
    stream = statistics.median(row["weight_gb_s"] for row in rows if row["kernel"] == "stream")
    figure, axes = plot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, (kind, (ours, rivals)) in zip(axes, PANELS.items(), strict=True):
        for kernel in (*ours, *rivals):
            if kernel in found:
                tokens = sorted(found[kernel])
                style = {"linewidth": 2.4, "marker": "o"} if kernel in ours else {"linewidth": 0.9, "linestyle": "--"}
                axis.plot(tokens, [100 * found[kernel][m] for m in tokens], label=kernel, **style)
        axis.axhline(100, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["m"] for row in rows}), sorted({row["m"] for row in rows}))
        axis.set_xlabel("tokens per call (M)")
        axis.set_title(f"{TITLES[kind]}: roof {stream:.1f} GB/s, {peaks[kind]:.2f} TOPS", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("share of the roofline (%)")
    axes[0].set_ylim(bottom=0)
    first = rows[0]
    figure.suptitle(f"N = {first['n']}, K = {first['k']}, {first['threads']} thread(s), {machine}", fontsize=11)
    figure.savefig(out, dpi=130)
    plot.close(figure)


def machine_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--n", type=int, default=4096, show_default=True, help="Out features.")
@click.option("--k", type=int, default=4096, show_default=True, help="In features.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write the measurements here.")
@click.option("--from", "given", type=click.Path(path_type=Path, exists=True), help="Draw what --json wrote; measure nothing.")
def main(out: Path, threads: int, n: int, k: int, file: Path | None, given: Path | None) -> None:
    """Writes OUT, a PNG: share of the roofline per kernel and token count on this CPU."""
    if out.suffix != ".png":
        raise click.UsageError(f"{out} is no .png file; give a name that ends in .png")
    if given is None:
        try:
            rows = kernel_speed(tokens=TOKENS, n=n, k=k, threads=threads)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        measured: dict[str, Any] = {
            "rows": rows,
            "gemm": {kind: gemm_tops(kind, threads) for kind in PANELS},
            "machine": machine_name(),
        }
    else:
        measured = json.loads(given.read_text(encoding="utf-8"))
    if file is not None:
        file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    draw(measured["rows"], measured["gemm"], measured["machine"], out)


if __name__ == "__main__":
    main()
