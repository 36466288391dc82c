"""Times the tiles of the tables on the GPU present, beside what the cost model predicts: `python -m quant.eval.gpu_tiles`.

For each format, shape and number of tokens every stored tile is timed with every split of K (`--search`: and tiles that the
tables leave out), L2 cold, as in `gpu_speed`. The table shows the launch that the model chooses beside the fastest one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quant.eval.gpu_speed import NAMES, copies, formats, graph_us
from quant.eval.kernel_speed import label, random_fields, rotating
from quant.kernels import dispatch
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.gpu import model
from quant.kernels.gpu.clock import taking_turns
from quant.kernels.gpu.launch import device_facts, matmul
from quant.kernels.gpu.layers import layer_of
from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.plan import Layer, plan_with
from quant.kernels.gpu.program import Plan
from quant.kernels.gpu.tiles import SPLITS, TRIPS, Tile, bucket_of, choose, read_table, tile_of
from quant.kernels.gpu.warm import compile_all

SHAPES = ("4096x4096", "14336x4096", "1024x4096")
TOKENS = (1, 16, 64, 512, 2048)
TENSORS = ("weight", "words", "row_scale")
ROUNDS = 7
# most tokens -> (BM, BN, warps, stages, operands that come first) to try beside the stored ones. What comes first decides how
# the codes lie in registers: before a tile enters a table, `aot` checks that its words run along K.
SEARCHED: dict[int | None, tuple[tuple[int, int, int, int, str], ...]] = {
    16: (
        *((16, 64, 2, 4, "xw"), (16, 64, 2, 6, "xw"), (16, 64, 4, 4, "xw"), (16, 64, 4, 6, "w"), (16, 32, 2, 6, "x")),
        *((16, 128, 4, 4, "xw"), (16, 128, 4, 6, "w"), (16, 128, 8, 4, "xw")),
    ),
    64: (
        *((64, 64, 2, 4, "x"), (64, 64, 4, 4, "x"), (64, 64, 4, 5, "w"), (64, 128, 4, 3, "xw"), (64, 128, 8, 3, "xw")),
        *((32, 32, 1, 6, "w"), (32, 64, 1, 4, "w"), (32, 64, 2, 4, "xw"), (32, 64, 2, 6, "w"), (32, 64, 4, 4, "xw")),
        *((32, 128, 4, 4, "x"), (32, 128, 2, 4, "w"), (64, 32, 2, 4, "w"), (64, 32, 1, 4, "w")),
    ),
    None: (
        *((128, 128, 8, 3, "xw"), (128, 128, 4, 3, "xw"), (128, 64, 4, 4, "xw"), (64, 128, 8, 4, "xw"), (64, 128, 4, 4, "xw")),
        *((64, 64, 4, 4, "x"), (128, 128, 8, 4, "x"), (64, 128, 4, 3, "x")),
    ),
}
PROGRAMS = (96, 2400)  # of a searched launch: fewer leave multiprocessors idle, more are a K split too often


@dataclass(frozen=True, kw_only=True)
class Try:
    """One launch of a layer."""

    name: str  # of the format
    layer: Layer
    m: int
    tile: Tile
    splits: int
    predicted_us: float | None  # None for a tile without counts

    @property
    def plan(self) -> Plan:
        return plan_with(self.layer, self.tile, self.splits)


def searched(policy: str, bucket: int | None, on_sum: bool) -> Iterator[Tile]:
    """The tiles of SEARCHED; where weights come first and tokens are few, with the group scale on the sum and without."""
    scaled = POLICIES[policy].scale_on_sum and not POLICIES[policy].integer and bucket is not None
    for bm, bn, warps, stages, left in SEARCHED[bucket]:
        for first in left:
            for on in {scaled, False} if first == "w" else (on_sum,):
                swap, few = first == "w", bucket is not None
                yield Tile(max_m=bucket, bm=bm, bn=bn, warps=warps, stages=stages, swap=swap, on_sum=on, few=few)


def tries(name: str, layer: Layer, m: int, search: bool) -> Iterator[Try]:
    """What is timed. K is split for few tokens only, as `choose` does."""
    arch, processors = device_facts(torch.cuda.current_device())
    bucket, variant = bucket_of(m), layer.variant
    rows = [row for row in read_table(arch)["tiles"][variant.key] if row["max_m"] == bucket]
    tiles: dict[Tile, Any] = {}
    for row in rows:
        tiles[tile_of(row)] = model.from_row(row, variant.compute, variant.block, variant.block_bytes(row["bn"]))
    if search:
        for tile in searched(variant.policy, bucket, next(iter(tiles)).on_sum):
            tiles.setdefault(tile, None)
    for tile, trip in tiles.items():
        for splits in SPLITS if bucket is not None else (1,):
            programs = -(-m // tile.bm) * -(-layer.n // tile.bn) * splits
            if splits > 1 and layer.blocks < splits * TRIPS:
                continue
            if trip is None and bucket is not None and not PROGRAMS[0] <= programs <= PROGRAMS[1]:
                continue
            predicted = trip and trip.predicted_us(model.DEVICES[arch], m, layer.n, layer.k, splits, processors)
            yield Try(name=name, layer=layer, m=m, tile=tile, splits=splits, predicted_us=predicted)


def timed(wanted: list[Try], prepared: tuple[Tensor, ...], cache_bytes: int) -> dict[Try, float]:
    """Microseconds of each launch; one that cannot start is left out."""
    weights = copies(prepared, cache_bytes)
    clocks = {}
    for one in wanted:
        x = torch.randn(one.m, one.layer.k, device="cuda").bfloat16()

        def call(*tensors: Tensor, one: Try = one, x: Tensor = x) -> Tensor:
            return matmul(one.layer, x, None, dict(zip(names(one), tensors, strict=False)), steps=one.plan)

        try:
            clocks[one] = graph_us(rotating(call, weights))
        except Exception as error:  # too much shared memory, for one
            print(f"{one.name} m={one.m} {one.tile} split {one.splits}: {type(error).__name__} {str(error)[:100]}")
    return taking_turns(clocks, ROUNDS)


def names(one: Try) -> tuple[str, ...]:
    return TENSORS if one.layer.variant.policy != "bytes8" else ("weight", "row_scale")


def rows_of(times: dict[Try, float], arch: int, processors: int) -> Iterator[dict[str, Any]]:
    """Plain rows; `chosen` marks the launch that `choose` takes."""
    for one, us in times.items():
        layer = one.layer
        picked = choose(arch, layer.variant, one.m, layer.n, layer.k, processors)
        yield {
            "format": one.name,
            "variant": layer.variant.key,
            "m": one.m,
            "n": layer.n,
            "k": layer.k,
            **asdict(one.tile),
            "splits": one.splits,
            "us": us,
            "predicted_us": one.predicted_us,
            "chosen": picked == (one.tile, one.splits),
        }


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """For each problem: the chosen launch, the fastest, and how much is lost."""
    out = Table("format", "M", "N x K", "chosen", "us", "predicted", "fastest", "us", "lost", title=title)
    problems: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault((row["format"], row["m"], row["n"], row["k"]), []).append(row)
    for (name, m, n, k), tried in problems.items():
        best = min(tried, key=lambda row: float(row["us"]))
        chosen = next((row for row in tried if row["chosen"]), None)
        if chosen is not None:
            figures = (f"{chosen['us']:.1f}", f"{chosen['predicted_us']:.1f}", launch(best), f"{best['us']:.1f}")
            out.add_row(name, str(m), f"{n} x {k}", launch(chosen), *figures, f"{chosen['us'] / best['us'] - 1:.0%}")
    return out


def launch(row: dict[str, Any]) -> str:
    return f"{row['bm']}x{row['bn']} w{row['warps']} s{row['stages']} {'w' if row['swap'] else 'x'} /{row['splits']}"


@click.command()
@click.option("--format", "names", multiple=True, type=click.Choice(NAMES), help="Only these formats.")
@click.option("--tokens", "-m", multiple=True, type=click.IntRange(min=1), default=TOKENS, show_default=True)
@click.option("--shape", multiple=True, default=SHAPES, show_default=True, help="N x K; K a multiple of 128.")
@click.option("--search", is_flag=True, help="Also time tiles that the tables leave out.")
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Compiling processes; one a core.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=None, help="Also write the rows to this file.")
def main(
    names: tuple[str, ...], tokens: tuple[int, ...], shape: tuple[str, ...], search: bool, jobs: int | None, file: Path | None
) -> None:
    """Times the tiles of the tables on the GPU that is present."""
    if not torch.cuda.is_available():
        raise click.UsageError("torch sees no CUDA device; nothing was timed")
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    problems = []
    for fmt, activation in formats(names):
        for given in shape:
            n, k = map(int, given.split("x"))
            spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cuda")
            layer = layer_of(spec, torch.bfloat16, None)
            if isinstance(layer, Layer):  # the others have no table of tiles
                problems.append((spec, [one for m in tokens for one in tries(label(fmt, activation), layer, m, search)]))
    refused = compile_all((step for _, wanted in problems for one in wanted for step in one.plan.steps), jobs)
    for program, why in refused.items():
        print(f"{dict(program.constants).get('UNPACK')}: {why}")
    rows: list[dict[str, Any]] = []
    arch, processors = device_facts(torch.cuda.current_device())
    with torch.no_grad():
        for spec, wanted in problems:
            kernel, _ = dispatch.choose(spec)
            with torch.device("cuda"):
                prepared = kernel.prepare(random_fields(spec.format, spec.n, spec.k), spec)
            sound = [one for one in wanted if not any(step.program in refused for step in one.plan.steps)]
            rows += rows_of(timed(sound, prepared, facts.L2_cache_size), arch, processors)
            if file:  # after each problem: the lease of a GPU may end
                found = {"device": facts.name, "torch": torch.__version__, "rows": rows}
                file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    title = f"timed on {facts.name}, torch {torch.__version__}; medians, L2 cold"
    Console(width=150).print(table(rows, title))


if __name__ == "__main__":
    main()
