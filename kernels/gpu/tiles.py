"""Launch parameters of the GEMMs: one table per architecture, made offline by compiling and counting, never at run time.

`sm_80.json` and so on: variant -> tiles, each beside the counts of its machine code and the time the cost model predicts for
one layer. `python -m quant.kernels.gpu.aot --update` rewrites them. At run time `choose` ranks the few tiles that serve the
number of tokens with the same model. No figure in these tables was timed on a GPU; which tiles sm_90 has was (`tune.py`).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.kernels.gpu import model
from quant.kernels.gpu.layout import POLICIES

ARCHITECTURES = (80, 89, 90, 100)
BUCKETS = (16, 64, None)  # a tile serves up to so many tokens (None: any)
SPLITS = (1, 2, 4, 8)
TRIPS = 4  # a split K leaves each program at least so many blocks


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A family of programs that share their tiles."""

    policy: str
    slice: int
    groups: int
    compute: str  # int8, fp16, bf16, fp32

    @property
    def key(self) -> str:
        return f"{self.policy}/{self.slice}/{self.groups}/{self.compute}"

    @property
    def block(self) -> int:
        """Codes of a row in one K block."""
        return POLICIES[self.policy].slices * self.slice

    def block_bytes(self, columns: int) -> float:
        """Bytes of weights and parameter words in one block of `columns` rows."""
        policy = POLICIES[self.policy]
        return columns * (policy.planes * self.slice + 4 * policy.words(self.groups))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """BM tokens x BN output features per program."""

    max_m: int | None
    bm: int
    bn: int
    warps: int
    stages: int
    swap: bool  # weights as the left operand of the MMA
    on_sum: bool  # the group scale multiplies the sum of a group
    few: bool = False  # rows of x past the last token are not loaded


def table_path(arch: int) -> Path:
    return Path(__file__).with_name(f"sm_{arch}.json")


@functools.cache
def read_table(arch: int) -> dict[str, Any]:
    """The JSON table of an architecture of ARCHITECTURES, as stored."""
    table: dict[str, Any] = json.loads(table_path(arch).read_text())
    return table


def tile_of(row: dict[str, Any]) -> Tile:
    return Tile(**{name: row[name] for name in Tile.__dataclass_fields__ if name in row})


def table_arch(capability: int) -> int:
    """The architecture whose table serves a device of compute capability `capability` (86, 90, 120, ...), at least 80.

    12.x has neither the tensor memory nor the shared memory of 10.x, so it takes the table of 8.9; 8.6 has the shared
    memory of 8.9 as well.
    """
    if capability >= 120 or capability in (86, 89):
        return 89
    return max(arch for arch in ARCHITECTURES if arch <= capability)


def bucket_of(m: int) -> int | None:
    return next((most for most in BUCKETS if most is not None and m <= most), None)


@functools.lru_cache(4096)
def choose(arch: int, variant: Variant, m: int, n: int, k: int, processors: int) -> tuple[Tile, int]:
    """(tile, parts of K) that the model predicts to be fastest; of equals the first.

    Up to 64 tokens the answer depends on M only through its bucket, so that a token's result does not depend on how many
    others are with it; above, K is never split.
    """
    most = bucket_of(m)
    rows = [row for row in read_table(arch)["tiles"][variant.key] if row["max_m"] == most]
    blocks = -(-k // variant.block)
    best: tuple[float, Tile, int] | None = None
    for row in rows:
        trip = model.from_row(row, variant.compute, variant.block, variant.block_bytes(row["bn"]))
        for splits in SPLITS if most is not None else (1,):
            if splits > 1 and blocks < splits * TRIPS:
                continue
            time = trip.predicted_us(model.DEVICES[arch], most or m, n, k, splits, processors)
            if best is None or time < best[0]:
                best = (time, tile_of(row), splits)
    assert best is not None, f"sm_{arch} has no tile for {variant.key} and {m} tokens"
    # Ceilings can leave the last part empty (9 blocks in 8 parts of 2): fewer parts then.
    splits = -(-blocks // -(-blocks // best[2]))
    return best[1], splits
