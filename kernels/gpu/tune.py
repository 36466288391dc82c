"""Choose tiles without a GPU: compile candidates, refuse those that `Row.faults` names, rank the rest by the cost model.

The first variant of a policy is searched; its winners are compiled for the other variants, each checked like the first. Where
a variant has no winner left for a number of tokens, it is searched itself. Architectures of one kind share the search: 8.9
starts from the winners of 8.0, 10.0 from those of 9.0. For 9.0 the tiles that an H200 found fastest come first (TIMED); float8
was not timed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from quant.kernels.gpu import model
from quant.kernels.gpu.aot import Row, measure, source_hash, variants
from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.tiles import BUCKETS, Tile, Variant, read_table, table_path, tile_of

# bucket -> problems [M, N, K]: many columns, few columns. The best tile for each is kept.
PROBLEMS = {16: ((16, 16384, 4096), (16, 1024, 4096)), 64: ((64, 16384, 4096), (64, 1024, 4096)), None: ((2048, 4096, 4096),)}
TIMED_ARCH = 90
RELATIVE = {89: 80, 100: 90}  # related machine code: the second's winners are tried first
Shape = tuple[int, int, int, int, str]  # BM, BN, warps, stages, operands that may come first: x, w
# bucket -> rounds; a round is tried where no tile of the ones before it was sound. Wide tiles first: they read x less often.
# Larger tiles than these spill (hundreds of times) wherever they were tried.
ROUNDS: dict[int | None, tuple[tuple[Shape, ...], ...]] = {
    16: (((16, 128, 2, 4, "xw"), (16, 32, 1, 8, "x")), ((16, 128, 4, 4, "xw"),)),
    64: (((64, 128, 4, 4, "w"),), ((64, 64, 4, 4, "xw"), (32, 128, 4, 4, "xw"))),
    None: (((128, 128, 8, 3, "xw"),), ((64, 128, 4, 4, "xw"),), ((64, 64, 4, 4, "xw"), (32, 128, 4, 4, "xw"))),
}
# Scales always on the weights, rows of 16 bytes. Not one such row per thread (BN = 32 * warps): Triton then decodes in the
# layout of the load and sends the floats through shared memory, 7 to 10 ALU instructions per weight.
SCALED_ROUNDS: dict[int | None, tuple[tuple[Shape, ...], ...]] = {
    16: (((16, 128, 2, 4, "xw"), (16, 64, 1, 4, "w")),),
    64: (((64, 128, 8, 3, "xw"), (64, 64, 4, 4, "xw")),),
    None: (((128, 128, 8, 3, "xw"), (64, 64, 4, 4, "xw")),),
}
# Fastest of the sound ones among some 25 tiles and their splits of K on an H200, for layers of 4096 x 4096 and 14336 x 4096 and
# 1, 16, 64, 128, 256 and 2048 tokens (`python -m quant.eval.gpu_tiles --search`). Few rows of x are masked there.
# policy -> bucket -> (BM, BN, warps, stages, operand that comes first, scale on the sum).
Timed = tuple[int, int, int, int, str, bool]
WIDE: Timed = (16, 128, 2, 4, "w", True)
NARROW: Timed = (16, 64, 2, 4, "w", True)
SPLIT_DOWN: tuple[Timed, ...] = ((128, 128, 8, 3, "x", False), (64, 64, 4, 4, "x", False))
DUAL: dict[int | None, tuple[Timed, ...]] = {
    16: (NARROW, WIDE),
    64: ((64, 128, 4, 4, "w", False), (64, 64, 4, 5, "w", False)),
    None: ((128, 128, 8, 3, "w", False), (64, 128, 4, 4, "w", False)),
}
NIBBLES: dict[int | None, tuple[Timed, ...]] = {
    16: (NARROW, WIDE),
    64: ((64, 128, 4, 3, "x", True), (64, 64, 4, 4, "x", True)),
    None: ((64, 128, 4, 3, "x", False), *SPLIT_DOWN),
}
TIMED: dict[str, dict[int | None, tuple[Timed, ...]]] = {
    "dual4": DUAL,
    "dual4_pair": DUAL,
    "bytes8": {
        16: ((16, 64, 4, 4, "w", False), WIDE),
        64: ((64, 64, 4, 5, "w", False), (64, 128, 4, 4, "w", False)),
        None: ((128, 128, 4, 3, "w", False), (64, 128, 4, 4, "w", False)),
    },
    "int8": NIBBLES,
    "int4": NIBBLES,
    "float4": NIBBLES,
    "int3": {16: (WIDE,), 64: ((32, 128, 2, 4, "w", False), (64, 128, 4, 3, "x", True)), None: SPLIT_DOWN},
    "int2": {16: (NARROW, WIDE), 64: ((32, 128, 4, 4, "x", True),), None: ((64, 128, 4, 4, "x", False), SPLIT_DOWN[1])},
    "e2m1": {16: (WIDE,), 64: ((32, 128, 2, 4, "w", False), (64, 128, 4, 3, "x", False)), None: SPLIT_DOWN},
}
FLOAT32_ROUNDS: tuple[tuple[Shape, ...], ...] = (  # a rare guest
    ((16, 128, 4, 2, "x"),),
    ((16, 64, 2, 3, "x"),),
    ((16, 128, 8, 2, "x"), (16, 64, 8, 3, "x")),
    ((16, 32, 4, 2, "x"), (16, 128, 4, 2, "w")),
)


def rounds(variant: Variant, bucket: int | None) -> Iterator[list[Tile]]:
    """Candidates. The group scale goes on the sum up to 64 tokens, where it saves instructions, and on the weights above; that
    of a short group always on the weights."""
    policy = POLICIES[variant.policy]
    on_sum = not policy.integer and policy.scale_on_sum and (bucket is not None or variant.compute == "fp32")
    by_bucket = ROUNDS if policy.scale_on_sum or variant.slice > 16 else SCALED_ROUNDS
    for shapes in FLOAT32_ROUNDS if variant.compute == "fp32" else by_bucket[bucket]:
        yield [
            Tile(max_m=bucket, bm=bm, bn=bn, warps=warps, stages=stages, swap=first == "w", on_sum=on_sum)
            for bm, bn, warps, stages, left in shapes
            for first in left
        ]


def timed(variant: Variant, bucket: int | None) -> list[Tile]:
    """The tiles of TIMED; of float32 tokens, which were not timed, those that the table has."""
    if variant.compute == "fp32":
        return [tile_of(row) for row in read_table(TIMED_ARCH)["tiles"][variant.key] if row["max_m"] == bucket]
    scaled = POLICIES[variant.policy].scale_on_sum and not POLICIES[variant.policy].integer
    few = bucket is not None
    return [
        Tile(max_m=bucket, bm=bm, bn=bn, warps=warps, stages=stages, swap=first == "w", on_sum=on_sum and scaled, few=few)
        for bm, bn, warps, stages, first, on_sum in TIMED[variant.policy][bucket]
    ]


def stored(row: Row) -> dict[str, Any]:
    """As the table holds it."""
    kept = {"shared_bytes": row.shared_bytes, "spills_odd": row.spills_odd, "counts": asdict(row.counts)}
    entry: dict[str, Any] = asdict(row.tile) | kept
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
    """The best row of each width; `choose` ranks the widths for the layer at hand."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (sum(r["predicted_us"].values()), r["counts"]["alu_per_weight"])):
        best.setdefault(row["bn"], row)
    return list(best.values())


def tables(arch: int, policy: str, recount: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Variant -> rows, for all variants of a policy. recount: of the tiles that the table has."""
    out: dict[str, list[dict[str, Any]]] = {}
    searched: dict[tuple[bool, int | None], list[Tile]] = {}
    relative = read_table(arch if recount else RELATIVE[arch])["tiles"] if recount or arch in RELATIVE else {}
    for variant in variants(policy):
        rows: list[dict[str, Any]] = []
        for bucket in BUCKETS:
            kind = (variant.compute == "fp32", bucket)
            seeds = [tile_of(row) for row in relative.get(variant.key, ()) if row["max_m"] == bucket]
            if arch == TIMED_ARCH and policy in TIMED and not recount:
                seeds = timed(variant, bucket)
            found = sound(arch, variant, seeds or searched.get(kind, ()))
            if not found:
                found = next((best for tiles in rounds(variant, bucket) if (best := winners(sound(arch, variant, tiles)))), [])
                searched.setdefault(kind, [tile_of(row) for row in found])
            if not found:
                raise RuntimeError(f"sm_{arch} {variant.key}: no sound tile for bucket {bucket}")
            rows += found
        out[variant.key] = rows
        worst = max(row["counts"]["alu_per_weight"] for row in rows)
        print(f"sm_{arch} {variant.key}: {len(rows)} tiles, at most {worst} ALU/weight", flush=True)
    return out


def update(arch: int, policies: Iterable[str] = tuple(POLICIES), recount: bool = False) -> None:
    """Make the tables of some policies again and write them; the others stay. recount: with the tiles that they have."""
    import triton

    path = table_path(arch)
    stored_table = json.loads(path.read_text()) if path.exists() else {"source": {}, "tiles": {}}
    known, source = stored_table["tiles"], stored_table["source"]
    for policy in policies:
        rows = tables(arch, policy, recount)
        known = {key: row for key, row in known.items() if key.split("/")[0] != policy} | rows
        source[policy] = source_hash(policy)
        head = {"triton": triton.__version__, "device": model.DEVICES[arch].name, "source": dict(sorted(source.items()))}
        path.write_text(json.dumps(head | {"tiles": dict(sorted(known.items()))}, indent=1) + "\n")
        read_table.cache_clear()
