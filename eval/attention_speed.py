"""How fast the CPU attention is beside torch's, in one process: `python -m quant.eval.attention_speed [--threads 1]`.

Shapes are those of SmolLM2-135M (9 query heads on 3 key-value heads) and Whisper tiny.en (6 heads), all of head dimension
64. Both candidates take turns within every round; medians over calls are printed. Torch gets views of the valid keys, as it
has no cache of its own. The int8 column reads our int8 cache in place of keys and values in the dtype of the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quant.eval.kernel_speed import measure
from quant.kernels.cpu import attention

DIM = 64
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """One kind of call: `tokens` queries that are the last of `keys` tokens, or see all of them when not causal."""

    name: str
    heads: int
    kv_heads: int
    tokens: int
    keys: int
    causal: bool


SHAPES = (
    Shape("prefill 512", 9, 3, 512, 512, True),
    Shape("decode at 512", 9, 3, 1, 512, True),
    Shape("decode at 2048", 9, 3, 1, 2048, True),
    Shape("whisper encoder", 6, 6, 1500, 1500, False),
    Shape("whisper cross", 6, 6, 1, 1500, False),
    Shape("whisper decoder at 100", 6, 6, 1, 100, True),
)


def calls_of(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name -> call without arguments. Raises quant.kernels.cpu.library.Unavailable where the kernels are not built."""
    torch.manual_seed(0)
    q = torch.randn(1, shape.tokens, shape.heads, DIM).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, shape.kv_heads, shape.keys, DIM).to(dtype) for _ in "kv")
    start = torch.tensor([shape.keys - shape.tokens]) if shape.causal else None
    codes = [torch.empty(k.shape, dtype=torch.int8) for _ in "kv"]
    scales = [torch.empty(k.shape[:3]) for _ in "kv"]
    channel = k.float().abs().amax((0, 2))
    attention.cpu_append_kv_int8(k, v, codes[0], codes[1], scales[0], scales[1], channel, torch.tensor([0]))
    torch_attention: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention
    causal, grouped = shape.causal and shape.tokens > 1, shape.heads != shape.kv_heads
    return {
        "lowbit": partial(torch.ops.lowbit.cpu_attention, q, k, v, start, None, DIM**-0.5),
        "int8": partial(torch.ops.lowbit.cpu_attention_int8, q, *codes, *scales, channel, start, None, DIM**-0.5),
        "torch": partial(torch_attention, q, k, v, is_causal=causal, enable_gqa=grouped),
    }


@torch.no_grad()
def attention_speed(*, threads: int = 1, rounds: int = 15) -> list[dict[str, Any]]:
    """One row per dtype and shape: median microseconds of each candidate."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for name, dtype in DTYPES.items():
            for shape in SHAPES:
                times = measure(calls_of(shape, dtype), rounds, burst=20 if shape.tokens == 1 else 1)
                row = {"threads": threads, "dtype": name, "shape": shape.name}
                rows.append(row | {f"{candidate}_us": seconds * 1e6 for candidate, seconds in times.items()})
    finally:
        torch.set_num_threads(before)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    out = Table(title=f"Attention on this CPU, torch {torch.__version__}, medians in microseconds")
    for heading in ("threads", "dtype", "shape", "lowbit", "int8 cache", "torch", "faster than torch"):
        out.add_column(heading, justify="left" if heading in ("dtype", "shape") else "right")
    for row in rows:
        times = [f"{row[f'{name}_us']:.0f}" for name in ("lowbit", "int8", "torch")]
        out.add_row(str(row["threads"]), row["dtype"], row["shape"], *times, f"{row['torch_us'] / row['lowbit_us']:.2f}x")
    return out


@click.command()
@click.option("--threads", "-t", multiple=True, type=int, default=(1,), show_default=True, help="Repeat for several counts.")
@click.option("--rounds", type=int, default=15, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default=None, help="Also write the rows to this file.")
def main(threads: tuple[int, ...], rounds: int, file: Path | None) -> None:
    """Times the C++ attention beside torch's scaled_dot_product_attention."""
    rows = [row for count in threads for row in attention_speed(threads=count, rounds=rounds)]
    Console(width=120).print(table(rows))
    if file:
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
