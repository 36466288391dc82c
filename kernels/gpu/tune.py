"""Choose tiles without a GPU: compile candidates, refuse those that `Row.faults` names, rank the rest by the cost model.

The first variant of a policy is searched; its winners are compiled for the other variants, each checked like the first. Where
a variant has no winner left for a number of tokens, it is searched itself. Architectures of one kind share the search: 8.9
starts from the winners of 8.0, 10.0 from those of 9.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from quant.kernels.gpu import model
from quant.kernels.gpu.aot import Row, measure, source_hash
from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.tiles import BUCKETS, Tile, Variant, read_table, table_path, tile_of

# bucket -> problems [M, N, K]: many columns, few columns. The best tile for each is kept.
PROBLEMS = {16: ((16, 16384, 4096), (16, 1024, 4096)), 64: ((64, 16384, 4096), (64, 1024, 4096)), None: ((2048, 4096, 4096),)}
# bucket -> (BM, BN, warps, stages)
SHAPES: dict[int | None, tuple[tuple[int, int, int, int], ...]] = {
    16: ((16, 128, 4, 4), (16, 128, 2, 4), (16, 32, 1, 8)),
    64: ((64, 128, 4, 4), (64, 64, 4, 4)),
    None: ((128, 128, 8, 3), (128, 128, 4, 3), (64, 128, 4, 4)),
}
RELATIVE = {89: 80, 100: 90}
FLOAT32_SHAPES = ((16, 128, 4, 2), (16, 64, 2, 3))  # for all buckets: a float32 model on a GPU is a rare guest


def variants(policy: str) -> Iterator[Variant]:
    """The one that is searched comes first."""
    known = POLICIES[policy]
    for compute in ("int8",) if known.integer else ("fp16", "bf16", "fp32"):
        for slice_, groups in known.blockings:
            yield Variant(policy=policy, slice=slice_, groups=groups, compute=compute)


def candidates(variant: Variant, bucket: int | None) -> Iterator[Tile]:
    """Weights on either side; the group scale on the sum up to 64 tokens, above on either."""
    grouped = not POLICIES[variant.policy].integer
    for bm, bn, warps, stages in FLOAT32_SHAPES if variant.compute == "fp32" else SHAPES[bucket]:
        for swap in (False, True):
            # Two accumulators of 128 x 128 do not fit the registers of four warps.
            either = bucket is None and (bm, warps) != (128, 4)
            for on_sum in (False,) if not grouped else (True, False) if either else (bucket is not None,):
                if variant.compute == "fp32" and (swap or not on_sum):
                    continue
                yield Tile(max_m=bucket, bm=bm, bn=bn, warps=warps, stages=stages, swap=swap, on_sum=on_sum)


def stored(row: Row) -> dict[str, Any]:
    """As the table holds it."""
    entry: dict[str, Any] = {**asdict(row.tile), "shared_bytes": row.shared_bytes, "counts": asdict(row.counts)}
    variant = row.variant
    trip = model.from_row(entry, variant.compute, variant.block, variant.block_bytes(row.tile.bn))
    device = model.DEVICES[row.arch]
    times = {f"{m}x{n}x{k}": trip.predicted_us(device, m, n, k) for m, n, k in PROBLEMS[row.tile.max_m]}
    return entry | {"predicted_us": {name: round(time, 2) for name, time in times.items()}}


def sound(arch: int, variant: Variant, tiles: Iterable[Tile]) -> list[dict[str, Any]]:
    """The tiles that compile and have no fault."""
    kept = []
    for tile in tiles:
        try:
            row = measure(arch, variant, tile)
        except RuntimeError as error:  # no loop, or the compiler refuses the shape
            print(f"sm_{arch} {variant.key} {tile}: {str(error).splitlines()[-1]}")
            continue
        if faults := row.faults():
            print(f"sm_{arch} {variant.key} {tile.bm}x{tile.bn} w{tile.warps} swap={tile.swap}: {'; '.join(faults)}")
        else:
            kept.append(stored(row))
    return kept


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best row for each problem of their bucket, without repeats."""
    best: list[dict[str, Any]] = []
    for problem in rows[0]["predicted_us"] if rows else ():
        row = min(rows, key=lambda r: (r["predicted_us"][problem], r["counts"]["alu_per_weight"]))
        if row not in best:
            best.append(row)
    return best


def tables(arch: int, policy: str) -> dict[str, list[dict[str, Any]]]:
    """Variant -> rows, for all variants of a policy."""
    out: dict[str, list[dict[str, Any]]] = {}
    searched: dict[tuple[bool, int | None], list[Tile]] = {}
    relative = read_table(RELATIVE[arch])["tiles"] if arch in RELATIVE else {}
    for variant in variants(policy):
        rows: list[dict[str, Any]] = []
        for bucket in BUCKETS:
            kind = (variant.compute == "fp32", bucket)
            seeds = [tile_of(row) for row in relative.get(variant.key, ()) if row["max_m"] == bucket]
            found = sound(arch, variant, seeds or searched.get(kind, ()))
            if not found:
                found = winners(sound(arch, variant, candidates(variant, bucket)))
                searched.setdefault(kind, [tile_of(row) for row in found])
            if not found:
                raise RuntimeError(f"sm_{arch} {variant.key}: no sound tile for bucket {bucket}")
            rows += found
        out[variant.key] = rows
        worst = max(row["counts"]["alu_per_weight"] for row in rows)
        print(f"sm_{arch} {variant.key}: {len(rows)} tiles, at most {worst} ALU/weight", flush=True)
    return out


def update(arch: int, policies: Iterable[str] = tuple(POLICIES)) -> None:
    """Make the tables of some policies again and write them; the others stay."""
    import triton

    path = table_path(arch)
    stored_table = json.loads(path.read_text()) if path.exists() else {"source": {}, "tiles": {}}
    known, source = stored_table["tiles"], stored_table["source"]
    for policy in policies:
        source[policy] = source_hash()
        known = {key: rows for key, rows in known.items() if key.split("/")[0] != policy} | tables(arch, policy)
    head = {"triton": triton.__version__, "source": dict(sorted(source.items())), "device": model.DEVICES[arch].name}
    path.write_text(json.dumps(head | {"tiles": dict(sorted(known.items()))}, indent=1) + "\n")
    read_table.cache_clear()
