"""How fast the GPU kernels are beside torch's own, timed on the GPU present: `python -m quant.eval.gpu_speed`.

Off by default: nothing calls it. Each call takes the next of enough copies of the weight to exceed the L2 cache, all candidates
take turns, times are medians of CUDA events around replays of a graph of 20 calls, as serving engines launch their kernels.
Times of our kernels include the quantization of the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu.clock import Call, captured, elapsed_us, taking_turns
from quant.kernels.gpu.layers import layer_of
from quant.kernels.gpu.plan import Layer
from quant.kernels.gpu.warm import compile_all, steps_of

TOKENS = (1, 16, 64, 512, 2048)
BURST = 20
L2_TIMES = 3  # the copies of a weight together exceed the L2 cache so many times
RIVAL = "torch bf16"


@dataclass(frozen=True)
class Candidate:
    """What is timed: `at` gives a function of the weight's tensors for tokens [M, K]; the copies; the kernel's name."""

    at: Callable[[Tensor], Callable[..., object]]
    copies: list[tuple[Tensor, ...]]
    kernel: str

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.copies[0])

    def call(self, x: Tensor) -> Call:
        """Multiplies by the next copy."""
        return rotating(self.at(x), self.copies)


def formats(names: Sequence[str] = ()) -> list[tuple[Format, Activation]]:
    """What is timed: (format, activation rule), all or those that the table calls by one of the names."""
    problems: list[tuple[Format, Activation]] = [
        (Int4Dual(group=128), Int8Token()),
        (IntGroup(bits=8, group=-1, symmetric=True), Int8Token()),
    ]
    problems += [(IntGroup(bits=bits, group=128, symmetric=True), Unquantized()) for bits in (8, 4, 3, 2)]
    problems += [(Fp4Block(kind=kind), Unquantized()) for kind in ("nvfp4", "mxfp4")]
    problems += [(fmt, Unquantized()) for fmt in (FpChannel(group=128), FpChannel(bits=8), BinaryDual(group=128))]
    problems += [(Codebook(books=books, group=4 * books), Unquantized()) for books in (1, 2)]
    return [problem for problem in problems if not names or label(*problem) in names]


NAMES = [label(*problem) for problem in formats()]


def copies(tensors: tuple[Tensor, ...], cache_bytes: int) -> list[tuple[Tensor, ...]]:
    """The tensors and enough copies of them that no call finds its own in the cache."""
    size = sum(t.nbytes for t in tensors)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(L2_TIMES * cache_bytes // size))]


def ours(n: int, k: int, device: str, cache_bytes: int, names: Sequence[str] = ()) -> Iterator[tuple[str, Candidate]]:
    """(name, candidate) of `formats`. Raises ValueError where no kernel takes one."""
    for fmt, activation in formats(names):
        spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device=device)
        kernel, refusals = dispatch.choose(spec)
        if kernel.name == "reference":
            raise ValueError(f"no kernel to time for {fmt}: {'; '.join(f'{name} {why}' for name, why in refusals.items())}")
        with torch.device(device):
            prepared = kernel.prepare(random_fields(fmt, n, k), spec)

        def at(x: Tensor, kernel: dispatch.Kernel = kernel, spec: MatmulSpec = spec) -> Callable[..., Tensor]:
            return lambda *tensors: kernel.matmul(x, tensors, None, spec)

        yield label(fmt, activation), Candidate(at, copies(prepared, cache_bytes), kernel.name)


def rivals(n: int, k: int, device: str, cache_bytes: int) -> Iterator[tuple[str, Candidate]]:
    """(name, candidate) of torch's own: dense, and on a GPU int4 (tinygemm, group 128), int8 and FP8, whose tokens are
    quantized already and whose outputs are raw int32 and bfloat16."""
    dense = torch.randn(n, k, device=device).bfloat16()
    yield RIVAL, Candidate(lambda x: partial(torch.nn.functional.linear, x), copies((dense,), cache_bytes), "torch")
    if device == "cpu":
        return
    packed = torch.ops.aten._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), device=device).to(torch.uint8), 8)
    scales = torch.rand(k // 128, n, 2, device=device).bfloat16()
    int4 = torch.ops.aten._weight_int4pack_mm
    yield "torch int4", Candidate(lambda x: lambda w, s: int4(x, w, 128, s), copies((packed, scales), cache_bytes), "torch")
    codes = torch.randint(-127, 128, (n, k), device=device).to(torch.int8)
    yield "torch int8", Candidate(int8_at, copies((codes,), cache_bytes), "torch")
    if torch.cuda.get_device_capability() >= (8, 9):
        yield "torch fp8", Candidate(fp8_at, copies((dense.to(torch.float8_e4m3fn),), cache_bytes), "torch")


def warm(n: int, k: int, names: Sequence[str] = ()) -> None:
    """Compile what `ours` launches."""
    specs = [MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cuda") for fmt, activation in formats(names)]
    layers = [layer_of(spec, torch.bfloat16, None) for spec in specs]
    compile_all(steps_of(layer for layer in layers if isinstance(layer, Layer)))


def int8_at(x: Tensor) -> Callable[..., Tensor]:
    """cuBLAS takes 17 tokens or more: fewer are padded."""
    codes = torch.randint(-127, 128, (max(len(x), 32), x.shape[1]), device=x.device).to(torch.int8)
    return lambda w: torch._int_mm(codes, w.t())


def fp8_at(x: Tensor) -> Callable[..., Tensor]:
    one, codes = torch.ones((), device=x.device), x.to(torch.float8_e4m3fn)
    return lambda w: torch._scaled_mm(codes, w.t(), one, one, out_dtype=torch.bfloat16)


def candidates(n: int, k: int, device: str, cache_bytes: int, names: Sequence[str] = ()) -> dict[str, Candidate]:
    """Name -> candidate, torch's own first."""
    return dict([*rivals(n, k, device, cache_bytes), *ours(n, k, device, cache_bytes, names)])


def graph_us(call: Call) -> Callable[[], float]:
    """A function that replays a burst of the calls and returns microseconds per call."""
    graph = captured([call] * BURST)

    def clock(call: Call = call) -> float:  # holds the call: the graph reads its tensors
        return elapsed_us(graph.replay) / BURST

    return clock


def rows_of(m: int, n: int, k: int, timed: dict[str, float], found: dict[str, Candidate]) -> list[dict[str, Any]]:
    """One plain row per candidate."""
    return [
        {
            "m": m,
            "n": n,
            "k": k,
            "format": name,
            "kernel": found[name].kernel,
            "us": us,
            "weight_gb_s": found[name].weight_bytes / us / 1e3,
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
@click.option("--format", "names", multiple=True, type=click.Choice(NAMES), help="Only these of our formats.")
@click.option("--n", type=int, default=8192, show_default=True, help="Out features.")
@click.option("--k", type=int, default=8192, show_default=True, help="In features; a multiple of 128.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=None, help="Also write the rows to this file.")
def main(tokens: tuple[int, ...], names: tuple[str, ...], n: int, k: int, file: Path | None) -> None:
    """Times every GPU kernel beside torch's own on the GPU that is present."""
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no CUDA device; nothing was timed")
    if k % 128:
        raise click.UsageError(f"k {k} is not a multiple of 128, the group length of the comparison; give a multiple")
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    warm(n, k, names)
    with torch.no_grad():
        found = candidates(n, k, "cuda", facts.L2_cache_size, names)
        for m in tokens:
            x = torch.randn(m, k, device="cuda").bfloat16()
            timed = taking_turns({name: graph_us(one.call(x)) for name, one in found.items()})
            rows += rows_of(m, n, k, timed, found)
    title = f"timed on {facts.name}, torch {torch.__version__}, CUDA {torch.version.cuda}; medians, L2 cold"
    Console(width=130).print(table(rows, title))
    if file:
        where = {"device": facts.name, "torch": torch.__version__, "cuda": torch.version.cuda}
        file.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
