"""Launch parameters of the A8W4 matmul: a table per architecture made offline by compiling and counting, never at run time.

`a8w4_configs.json`: architecture -> HALF -> tiles, ordered by `max_m` and then from wide to narrow. Each tile carries the
counts of its compiled code (`counts`), which `python -m quant.kernels.gpu.aot --update` rewrites.

How the rows were chosen, none of it timed on a GPU: no spills, shared memory within the architecture, weights loaded 16
bytes at a time, then the fewest ALU instructions per weight, which makes the weights the left operand in tiles of 32 tokens
and more. The stages of the 16-token tiles are arithmetic from data sheets: bytes in flight that cover DRAM latency.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("a8w4_configs.json")
ARCHITECTURES = (80, 89, 90, 100)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # per block, CUDA guide
WIDEST = 128  # largest BN of any tile; the weight layout has that many slack rows


@dataclass(frozen=True, kw_only=True)
class Tile:
    """BM tokens x BN output features per program; serves up to `max_m` tokens (None: any)."""

    max_m: int | None
    bm: int
    bn: int
    warps: int
    stages: int
    swap: bool  # weights as the left operand of the MMA


def read_table() -> dict[str, Any]:
    """The JSON table as stored, counts included."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


@functools.cache
def tiles(arch: int, half: int) -> tuple[Tile, ...]:
    """Every tile for an architecture of ARCHITECTURES and a half-block of 32 or 64, in order of choice."""
    rows = read_table()[str(arch)][str(half)]
    return tuple(Tile(**{key: value for key, value in row.items() if key != "counts"}) for row in rows)


def table_arch(capability: int) -> int:
    """The architecture whose table serves a device of compute capability `capability` (86, 90, 120, ...), at least 80.

    12.x has neither the tensor memory nor the shared memory of 10.x, so it takes the table of 8.9; 8.6 has the shared
    memory of 8.9 as well.
    """
    if capability >= 120 or capability in (86, 89):
        return 89
    return max(arch for arch in ARCHITECTURES if arch <= capability)


@functools.lru_cache(4096)
def choose_tile(arch: int, half: int, m: int, n: int, processors: int) -> Tile:
    """The widest tile of the bucket of M whose grid gives every processor work; the narrowest when none does."""
    bucket = [tile for tile in tiles(arch, half) if tile.max_m is None or m <= tile.max_m]
    bucket = [tile for tile in bucket if tile.max_m == bucket[0].max_m]
    for tile in bucket:
        if -(-m // tile.bm) * -(-n // tile.bn) >= processors:
            return tile
    return bucket[-1]
