"""How fast the CPU kernels are beside torch's own, in one process: `python -m quant.eval.kernel_speed [--threads 1]`.

Rivals: `torch int4` (aten::_weight_int4pack_mm_for_cpu, bfloat16 tokens, group 128), `torch int8` (torch._int_mm, whose
tokens are already quantized and whose output is raw int32), `torch bf16` (linear), and where llama-cpp-python is installed
ggml's `Q4_0` and `Q8_0` (float32 tokens, groups of 32). Candidates take turns within every round, so a machine that slows
down slows all of them; medians over calls are printed. Up to 64 tokens find their weights cold: each call uses the next of
enough copies to exceed the last-level cache several times. For one token a turn is eight calls, as a decoder calls one
kernel layer after layer. `stream` is the yardstick of reading bandwidth: a C++ loop that only adds up memory, in huge pages
and asking ahead as the kernels do, the fastest way found. The share of it that a kernel reaches counts every byte it stores.
`torch sum` reads ordinary memory, as torch's own kernels do. Groups have 128 weights, or 64 or 32 where 128 does not divide K.

`--isa` times our kernels on a lower instruction set too, as LOWBIT_CPU_ISA would choose it; the rivals are not changed by it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quant.eval.rivals import ggml
from quant.kernels import dispatch
from quant.kernels.activation import Activation
from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.cpu import library, memory
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.format import Codes, Format
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import ENTRIES, Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup

GROUPS = (128, 64, 32)  # weights per group: the first that divides K
COLD_BYTES = 160 << 20  # of copies of one weight; several times the last-level cache of usual machines
STREAM_BYTES = 16 << 20
COLD_TOKENS = 64  # up to so many tokens a call finds its weights cold, as it does in a decoder
Call = Callable[[], object]


def group_of(k: int) -> int:
    """The group length that is measured. Raises ValueError where K has none."""
    group = next((group for group in GROUPS if k % group == 0), None)
    if group is None:
        raise ValueError(f"k {k} is not a multiple of {GROUPS[-1]}, the shortest group of the comparison; give a multiple")
    return group


def random_fields(fmt: Format, n: int, k: int) -> dict[str, Tensor]:
    """A valid random [n, k] weight in `fmt` (int4_dual, int_group, fp4_block, fp_channel, binary_dual or codebook)."""
    if isinstance(fmt, Fp4Block | FpChannel | BinaryDual):
        return fmt.pack(fmt.nearest(torch.randn(n, k)))
    if isinstance(fmt, Int4Dual):
        groups = k // fmt.group
        scale = torch.full((n, groups), 8, dtype=torch.uint8)
        params = {"group_scale": scale, "group_offset": torch.full((n, groups), -64, dtype=torch.int8)}
        return fmt.pack(Codes(torch.randint(0, 16, (n, k), dtype=torch.uint8), params | {"row_scale": torch.rand(n)}))
    if isinstance(fmt, Codebook):
        params = {"codebook": torch.randn(fmt.books, ENTRIES, fmt.group).half(), "weight_scale": torch.rand(n, 1)}
        return fmt.pack(Codes(torch.randint(0, ENTRIES, (n, k // fmt.group, fmt.books), dtype=torch.uint8), params))
    assert isinstance(fmt, IntGroup)
    params = {"weight_scale": torch.rand(n, fmt.groups(k)).to(fmt.scale_dtype)}
    if not fmt.symmetric:
        params["weight_zero"] = torch.randint(0, 2**fmt.bits, (n, fmt.groups(k)), dtype=torch.uint8)
    return fmt.pack(Codes(torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8), params))


def copies_of(tensors: tuple[Tensor, ...], cold: bool) -> list[tuple[Tensor, ...]]:
    """One copy, or when `cold` enough to exceed COLD_BYTES."""
    size = sum(t.nbytes for t in tensors)
    count = COLD_BYTES // size + 1 if cold else 1
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def rotating(function: Callable[..., object], weights: Sequence[tuple[Tensor, ...]]) -> Call:
    """A call without arguments that uses the next weight each time."""
    following: Iterator[tuple[Tensor, ...]] = itertools.cycle(weights)
    return lambda: function(*next(following))


def ours(m: int, n: int, k: int) -> dict[str, tuple[Call, int]]:
    """Name -> (call, bytes of weight it reads) of every C++ kernel that does not refuse."""
    x, group = torch.randn(m, k).bfloat16(), group_of(k)
    problems: list[tuple[Format, Activation]] = [
        (Int4Dual(group=group), Int8Token()),
        (IntGroup(bits=8, group=-1, symmetric=True), Int8Token()),
        *((IntGroup(bits=bits, group=group, symmetric=True), Unquantized()) for bits in (8, 4, 3, 2)),
        *((Fp4Block(kind=kind), Unquantized()) for kind in ("nvfp4", "mxfp4")),
        (BinaryDual(group=group), Unquantized()),
        *((Codebook(books=books, group=4 * books), Unquantized()) for books in (1, 2)),
        (FpChannel(group=group), Unquantized()),
        (FpChannel(group=group), FpShift(bits=8, dynamic=True)),
    ]
    out = {}
    for fmt, activation in problems:
        spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cpu")
        kernel, refusals = dispatch.choose(spec)
        if kernel.name == "reference":
            raise ValueError(f"there is no C++ kernel to measure for {fmt.name}: {refusals}")
        prepared = kernel.prepare(random_fields(fmt, n, k) | activation.fit(x.float(), x.float().abs().amax(0)), spec)
        weights = [placed(kernel, copy) for copy in copies_of(prepared, cold=m <= COLD_TOKENS)]

        def call(*prepared: Tensor, kernel: dispatch.Kernel = kernel, spec: MatmulSpec = spec) -> Tensor:
            return kernel.matmul(x, prepared, None, spec)

        out[label(fmt, activation)] = rotating(call, weights), sum(t.nbytes for t in weights[0])
    return out


def label(fmt: Format, activation: Activation) -> str:
    """A8W4, W8A8, W3A16 ... as kernels are called in papers."""
    if isinstance(fmt, Int4Dual):
        return "A8W4"
    if isinstance(fmt, Fp4Block):
        return f"{fmt.kind}A16"
    if isinstance(fmt, BinaryDual):
        return "dual W2A16"
    if isinstance(fmt, Codebook):
        return f"{fmt.books}x8g{fmt.group} A16"
    if isinstance(fmt, FpChannel):
        return f"FP{fmt.bits}A{16 if activation.name == 'none' else 8}"
    assert isinstance(fmt, IntGroup)
    return f"W{fmt.bits}A{16 if activation.name == 'none' else 8}"


def placed(kernel: dispatch.Kernel, prepared: dispatch.Prepared) -> dispatch.Prepared:
    """The same tensors where a loaded model has them."""
    joined = kernel.join([prepared])
    return prepared if joined is None else joined[1][0]


def rivals(m: int, n: int, k: int, threads: int) -> dict[str, tuple[Call, int]]:
    """The same for torch's and ggml's kernels, and for plain reading."""
    x, q = torch.randn(m, k).bfloat16(), torch.randint(-127, 128, (m, k), dtype=torch.int8)
    cold, group = m <= COLD_TOKENS, group_of(k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scales = torch.rand(k // group, n, 2).bfloat16()
    int4 = torch.ops.aten._weight_int4pack_mm_for_cpu
    out: dict[str, tuple[Call, int]] = {
        "torch int4": (
            rotating(lambda w, s: int4(x, w, group, s), copies_of((packed, scales), cold)),
            packed.nbytes + scales.nbytes,
        ),
        "torch bf16": (
            rotating(lambda w: torch.nn.functional.linear(x, w), copies_of((torch.randn(n, k).bfloat16(),), cold)),
            2 * n * k,
        ),
    }
    if m > 16:  # torch._int_mm accepts no fewer tokens
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        out["torch int8"] = (lambda: torch._int_mm(q, weight.t())), n * k
    for kind in ("Q4_0", "Q8_0") if ggml.installed() else ():
        product = ggml.random(kind, m, n, k, threads, COLD_BYTES if cold else 0)
        out[f"ggml {kind}"] = product, product.weight_bytes
    chunk = torch.ones(STREAM_BYTES // 8, dtype=torch.int64)
    out["torch sum"] = rotating(torch.sum, copies_of((chunk,), cold=True)), STREAM_BYTES
    read = library.load().lowbit_read
    chunks = [(memory.empty((STREAM_BYTES,), torch.uint8).fill_(1),) for _ in range(COLD_BYTES // STREAM_BYTES + 1)]
    return out | {"stream": (rotating(lambda t: read(t.data_ptr(), STREAM_BYTES), chunks), STREAM_BYTES)}


def stopwatch(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(calls: dict[str, Call], rounds: int, burst: int) -> dict[str, float]:
    """Median seconds of each call; all take turns of `burst` calls, `rounds` times after two warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            for _ in range(burst):
                spent = call.seconds() if isinstance(call, ggml.Matmul) else stopwatch(call)
                if turn >= 2:
                    seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def kernel_speed(
    *,
    tokens: tuple[int, ...] = (1, 512),
    n: int = 4096,
    k: int = 4096,
    threads: int = 1,
    rounds: int | None = None,
    isa: str | None = None,
) -> list[dict[str, Any]]:
    """One row per kernel and token count: median milliseconds, GB/s of weights, speed relative to each rival.

    `isa`: the instruction set of our kernels, by default what LOWBIT_CPU_ISA says or else the best.
    Raises ValueError where the C++ kernels are not built, 32 does not divide K, or this processor lacks `isa`.
    """
    group_of(k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        used = use_isa(isa)
        for m in tokens:
            candidates = ours(m, n, k) | rivals(m, n, k, threads)
            counted, burst = rounds or (25 if m == 1 else 9), 8 if m == 1 else 1
            times = measure({name: call for name, (call, _) in candidates.items()}, counted, burst)
            stream = candidates["stream"][1] / times["stream"]
            for name, seconds in times.items():
                bandwidth = candidates[name][1] / seconds
                row = {"isa": used, "threads": threads, "m": m, "n": n, "k": k, "kernel": name, "ms": seconds * 1e3}
                row |= {"weight_gb_s": bandwidth / 1e9, "of_stream": bandwidth / stream}
                if name not in ("stream", "torch sum"):
                    row["tops"] = 2e-12 * m * n * k / seconds
                    matmuls = [rival for rival in times if rival.startswith(("torch", "ggml")) and rival != "torch sum"]
                    row["speed_vs"] = {rival: times[rival] / seconds for rival in matmuls}
                rows.append(row)
    finally:
        torch.set_num_threads(before)
        if isa is not None:
            use_isa(None)
    return rows


def use_isa(isa: str | None) -> str:
    """Make our kernels use `isa`, or with None what a new process would; which one it is. Raises ValueError."""
    wanted = isa or os.environ.get("LOWBIT_CPU_ISA")
    try:
        loaded = library.load()
    except library.Unavailable as error:
        raise ValueError(str(error)) from error
    if not wanted:
        return library.select_best(loaded)
    library.select(loaded, wanted)
    return wanted


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    versus = ["torch int4", "torch int8", "torch bf16", "ggml Q4_0", "ggml Q8_0"]
    out = Table(title=f"CPU kernels, torch {torch.__version__}, times are medians, ratios above 1 are faster")
    headings = ("ISA", "threads", "M", "N x K", "kernel", "ms", "TOPS", "GB/s", "of stream")
    for heading in (*headings, *(f"vs {name}" for name in versus)):
        out.add_column(heading, justify="left" if heading == "kernel" else "right")
    for row in rows:
        speed = row.get("speed_vs", {})
        ratios = [f"{speed[name]:.2f}" if name in speed else "" for name in versus]
        size = (row["isa"], str(row["threads"]), str(row["m"]), f"{row['n']} x {row['k']}", row["kernel"], f"{row['ms']:.3f}")
        tops = f"{row['tops']:.3f}" if "tops" in row else ""
        out.add_row(*size, tops, f"{row['weight_gb_s']:.1f}", f"{row['of_stream']:.0%}", *ratios)
    return out


@click.command()
@click.option("--threads", "-t", multiple=True, type=int, default=(1,), show_default=True, help="Repeat for several counts.")
@click.option("--tokens", "-m", multiple=True, type=int, default=(1, 512), show_default=True)
@click.option("--n", type=int, default=4096, show_default=True, help="Out features.")
@click.option("--k", type=int, default=4096, show_default=True, help="In features.")
@click.option("--rounds", type=int, default=None, help="Rounds per token count. [25 for one token, else 9]")
@click.option("--isa", multiple=True, type=click.Choice(library.ISAS), help="Of our kernels; repeat for several.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=None, help="Also write the rows to this file.")
def main(
    threads: tuple[int, ...],
    tokens: tuple[int, ...],
    n: int,
    k: int,
    rounds: int | None,
    isa: tuple[str, ...],
    file: Path | None,
) -> None:
    """Times the C++ kernels beside torch's int4, int8 and bfloat16 matmuls."""
    try:
        rows = [
            row
            for name in isa or (None,)
            for t in threads
            for row in kernel_speed(tokens=tokens, n=n, k=k, threads=t, rounds=rounds, isa=name)
        ]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    Console(width=160).print(table(rows))
    if file:
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
