"""`quantize export OUT --to FORMAT`: a checkpoint that other engines read without this package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from quant.api import require_free

# format on the command line -> its file, and what its default output is called
FORMATS = {"compressed-tensors": "quant.export.compressed_tensors", "gguf": "quant.export.gguf"}
ENDINGS = {"compressed-tensors": "-compressed-tensors", "gguf": ".gguf"}


@click.command("export")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "target", type=click.Choice(list(FORMATS)), required=True, help="Whose layout.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder, or file for gguf, to write.")
@click.option("--widen", is_flag=True, help="Write what the format cannot hold wider (8 bits where exact, else dense).")
def command(out: Path, target: str, output: Path | None, widen: bool) -> None:
    """Write a folder that `quantize` wrote in the layout of other engines.

    compressed-tensors for vLLM and transformers, gguf for llama.cpp. The numbers stay what they are: a layer that the
    format cannot hold exactly is refused, unless --widen is given.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    written = output or out.with_name(f"{out.resolve().name}{ENDINGS[target]}")
    require_free(written)
    module: Any = importlib.import_module(FORMATS[target])
    export = module.write(out, written, widen)
    for line in export.lines():
        console.print(line)
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.glob("*.safetensors")))
    ours = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    console.print(f"{written}: {size / 1e6:,.1f} MB of weights ({out}: {ours / 1e6:,.1f} MB)")
