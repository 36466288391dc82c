"""How fast the GPU kernels are beside torch's bfloat16 matmul, timed on the GPU present: `python -m quant.eval.gpu_speed`.

Off by default: nothing calls it. Each call takes the next of enough copies of the weight to exceed the L2 cache, all candidates
take turns, times are medians of CUDA events around a burst of calls. As of this version no GPU has run it, so the project
states no GPU time: what other pages say about GPUs is counted in machine code or predicted by a model.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quant.eval.kernel_speed import label, random_fields, rotating
from quant.kernels import dispatch
from quant.kernels.activation import Activation
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.format import Format
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup

TOKENS = (1, 16, 64, 512, 2048)
ROUNDS, BURST, WARM = 20, 20, 3
L2_TIMES = 3  # the copies of a weight together exceed the L2 cache so many times
RIVAL = "torch bf16"
Call = Callable[[], object]


def formats() -> list[tuple[Format, Activation]]:
    """What is timed: (format, activation rule)."""
    problems: list[tuple[Format, Activation]] = [
        (Int4Dual(group=128), Int8Token()),
        (IntGroup(bits=8, group=-1, symmetric=True), Int8Token()),
    ]
    return [*problems, *((IntGroup(bits=bits, group=128, symmetric=True), Unquantized()) for bits in (8, 4, 3, 2))]


def copies(tensors: tuple[Tensor, ...], cache_bytes: int) -> list[tuple[Tensor, ...]]:
    """The tensors and enough copies of them that no call finds its own in the cache."""
    size = sum(t.nbytes for t in tensors)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(L2_TIMES * cache_bytes // size))]


def candidates(m: int, n: int, k: int, device: str, cache_bytes: int) -> dict[str, tuple[Call, int, str]]:
    """Name -> (call, bytes of weight that it reads, kernel)."""
    x = torch.randn(m, k).bfloat16().to(device)
    dense = torch.randn(n, k).bfloat16().to(device)
    out: dict[str, tuple[Call, int, str]] = {}
    matmul = rotating(lambda w: torch.nn.functional.linear(x, w), copies((dense,), cache_bytes))
    out[RIVAL] = matmul, dense.nbytes, "torch"
    for fmt, activation in formats():
        spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device=torch.device(device).type)
        kernel, refusals = dispatch.choose(spec)
        if kernel.name == "reference":
            raise ValueError(f"no kernel to time for {fmt}: {'; '.join(f'{name} {why}' for name, why in refusals.items())}")
        prepared = kernel.prepare({name: t.to(device) for name, t in random_fields(fmt, n, k).items()}, spec)

        def call(*tensors: Tensor, kernel: dispatch.Kernel = kernel, spec: MatmulSpec = spec) -> Tensor:
            return kernel.matmul(x, tensors, None, spec)

        size = sum(t.nbytes for t in prepared)
        out[label(fmt, activation)] = rotating(call, copies(prepared, cache_bytes)), size, kernel.name
    return out


def measure(calls: dict[str, Call], burst_us: Callable[[Call], float]) -> dict[str, float]:
    """Median microseconds of each call; all take turns, the first rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + WARM):
        for name, call in calls.items():
            taken = burst_us(call)
            if turn >= WARM:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def cuda_burst_us(call: Call) -> float:
    """Microseconds per call of one burst, between two events on the stream."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(BURST):
        call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3 / BURST


def rows_of(m: int, n: int, k: int, timed: dict[str, float], found: dict[str, tuple[Call, int, str]]) -> list[dict[str, Any]]:
    """One plain row per candidate."""
    return [
        {
            "m": m,
            "n": n,
            "k": k,
            "format": name,
            "kernel": found[name][2],
            "us": us,
            "weight_gb_s": found[name][1] / us / 1e3,
            "tops": 2e-6 * m * n * k / us,
            "speed_vs_bf16": timed[RIVAL] / us,
        }
        for name, us in timed.items()
    ]


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows for a terminal."""
    out = Table("M", "N x K", "format", "kernel", "us", "TOPS", "GB/s of weights", f"vs {RIVAL}", title=title)
    for row in rows:
        figures = (f"{row['us']:.1f}", f"{row['tops']:.1f}", f"{row['weight_gb_s']:.0f}", f"{row['speed_vs_bf16']:.2f}")
        out.add_row(str(row["m"]), f"{row['n']} x {row['k']}", row["format"], row["kernel"], *figures)
    return out


@click.command()
@click.option("--tokens", "-m", multiple=True, type=click.IntRange(min=1), default=TOKENS, show_default=True)
@click.option("--n", type=int, default=8192, show_default=True, help="Out features.")
@click.option("--k", type=int, default=8192, show_default=True, help="In features; a multiple of 128.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=None, help="Also write the rows to this file.")
def main(tokens: tuple[int, ...], n: int, k: int, file: Path | None) -> None:
    """Times every GPU kernel beside torch's bfloat16 matmul on the GPU that is present."""
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no CUDA device; nothing was timed")
    if k % 128:
        raise click.UsageError(f"k {k} is not a multiple of 128, the group length of the comparison; give a multiple")
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for m in tokens:
            found = candidates(m, n, k, "cuda", facts.L2_cache_size)
            timed = measure({name: call for name, (call, _, _) in found.items()}, cuda_burst_us)
            rows += rows_of(m, n, k, timed, found)
    title = f"timed on {facts.name}, torch {torch.__version__}, CUDA {torch.version.cuda}; medians, L2 cold"
    Console(width=130).print(table(rows, title))
    if file:
        where = {"device": facts.name, "torch": torch.__version__, "cuda": torch.version.cuda}
        file.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
