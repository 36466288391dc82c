"""`quantize compile OUT --target sm_90`: a deployment bundle of GPU programs for a folder that `quantize` wrote.

No GPU takes part: the programs are compiled, their parameters are checked against the machine code, nothing is run or timed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from quant.checkpoint import check_layers, has_bias, read_config, scheme_of
from quant.embedding import size_of
from quant.kernels.dispatch import MatmulSpec
from quant.models import index, model_class
from quant.naming import match
from quant.stacks import skeleton

AMD = "gfx942"
DTYPES = ("float16", "bfloat16", "float32")
CHECKED = "compiled without a GPU: parameters checked against the machine code, nothing was run or timed on one"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the programs of a layer depend on."""

    spec: MatmulSpec
    bias: bool


def shapes_of(folder: Path) -> tuple[dict[Shape, int], torch.dtype]:
    """(distinct packed linears of a folder -> how many layers, dtype that `quant.load` gives the rest on a GPU).

    Reads headers only. Raises ValueError for a folder that `quantize` did not write or that is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that quantize wrote")
    section, tensors = read_config(folder)["quantization_config"], index(folder)
    config, cls = model_class(folder)
    model = skeleton(config, cls, config.dtype or torch.float32)
    packed = check_layers(section, tensors, model)
    on_disk = match(model, packed, {name.rpartition(".")[0] for name in tensors}, least=1, suffix=".weight")
    found: dict[Shape, int] = {}
    for name in sorted(packed):
        scheme = scheme_of(section, on_disk[name])
        assert scheme is not None, name
        module = model.get_submodule(name)
        n, k = size_of(module)
        spec = MatmulSpec(n=n, k=k, format=scheme[0], activation=scheme[1], device="cuda")
        shape = Shape(spec=spec, bias=has_bias(section, on_disk[name], module))
        found[shape] = found.get(shape, 0) + 1
    return found, config.dtype or torch.float32


def gpu_layers(shapes: dict[Shape, int], dtypes: list[torch.dtype]) -> tuple[list[Any], dict[str, int]]:
    """(the GPU kernels' layers of all shapes and dtypes; reason -> layers that no GPU kernel takes)."""
    from quant.kernels.gpu.layers import layer_of

    layers, refused = [], dict[str, int]()
    for shape, count in shapes.items():
        for dtype in dtypes:
            layer = layer_of(shape.spec, dtype, dtype if shape.bias else None)
            if isinstance(layer, str):
                refused[layer] = refused.get(layer, 0) + count
                break
            layers.append(layer)
    return list(dict.fromkeys(layers)), refused


def targets_of(text: str) -> list[str]:
    """ "sm_90,sm_80" -> its targets. Raises ValueError naming one that is unknown."""
    from quant.kernels.gpu.tiles import ARCHITECTURES

    known = [*(f"sm_{arch}" for arch in ARCHITECTURES), AMD]
    targets = [part.strip() for part in text.split(",") if part.strip()]
    for target in targets:
        if target not in known:
            raise ValueError(f"unknown target {target!r}; known: {', '.join(known)} ({AMD}: compile check only)")
    if not targets:
        raise ValueError(f"no target given; known: {', '.join(known)}")
    return list(dict.fromkeys(targets))


def need_triton() -> None:
    """Raise ValueError where Triton cannot compile."""
    import importlib.util
    import os

    if importlib.util.find_spec("triton") is None:
        raise ValueError("triton is not installed and it is the compiler of the GPU programs; pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set, which cannot compile; unset it")


def check_amd(console: Console, layers: list[Any]) -> None:
    """Compile the plain twins for AMD and say what that proves."""
    from quant.kernels.gpu.aot import compile_program
    from quant.kernels.gpu.bundle import twin_plans

    began = time.monotonic()
    programs = list(dict.fromkeys(step.program for steps in twin_plans(layers) for step in steps.steps))
    for program in programs:
        compile_program(program, AMD)
    console.print(
        f"{AMD}: {len(programs)} programs for few tokens compile ({time.monotonic() - began:.1f} s); a compile check only: "
        "nothing is written, lowbit runs no AMD GPU yet"
    )


def result_table(manifest: dict[str, Any], layers: int) -> Table:
    """Programs, bytes and seconds per target."""
    table = Table("target", "layer shapes", "launches", "programs", "bytes", "compile s", box=None)
    for target, part in manifest["targets"].items():
        steps = sum(len(p["steps"]) for entry in part["launches"] for p in entry["plans"])
        size = sum({row["digest"]: row["size_bytes"] for row in part["programs"]}.values())
        seconds = f"{part['compile_seconds']:.1f}"
        table.add_row(target, str(layers), str(steps), str(len(part["programs"])), f"{size:,}", seconds)
    return table


@click.command("compile")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--target", metavar="LIST", help="sm_80, sm_89, sm_90, sm_100; several with commas. gfx942: compile check only.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle to write; OUT/lowbit-bundle by default.")
@click.option("--dtype", metavar="LIST", help="Dtypes of the tokens: float16, bfloat16, float32. The model's by default.")
@click.option("--report", is_flag=True, help="Print the machine-code counts of the shipped launch tables instead.")
def command(out: Path | None, target: str | None, output: Path | None, dtype: str | None, report: bool) -> None:
    """Compile the GPU programs of a quantized folder for GPUs that are not here.

    quant.load uses them, without Triton, where LOWBIT_BUNDLE=use is set.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if report:
        from quant.kernels.gpu import aot
        from quant.kernels.gpu.bundle import arch_of
        from quant.kernels.gpu.tiles import ARCHITECTURES

        architectures = tuple(arch_of(t) for t in targets_of(target) if t != AMD) if target else ARCHITECTURES
        aot.report(architectures)
        return
    if out is None:
        raise ValueError("no folder given; give the folder that quantize wrote, or --report")
    if target is None:
        raise ValueError("no --target given; for example --target sm_90")
    targets = targets_of(target)
    names = dtype.split(",") if dtype else []
    if wrong := [name for name in names if name not in DTYPES]:
        raise ValueError(f"unknown dtype {wrong[0]!r}; known: {', '.join(DTYPES)}")
    need_triton()
    shapes, stored = shapes_of(out)
    layers, refused = gpu_layers(shapes, [getattr(torch, name) for name in names] or [stored])
    for reason, count in refused.items():
        console.print(f"{count} layers have no GPU program and run on the reference kernel: {reason}")
    if not layers:
        raise ValueError(f"no layer of {out} has a GPU program; see the reasons above")
    if AMD in targets:
        check_amd(console, layers)
        targets.remove(AMD)
    if targets:
        write_bundle(console, out, output, targets, layers)


def write_bundle(console: Console, out: Path, output: Path | None, targets: list[str], layers: list[Any]) -> None:
    """Compile and write, with a progress line, and print the table."""
    from quant.kernels.gpu import bundle

    folder = output or out / bundle.FOLDER
    tables = {name: bundle.launches(layers, bundle.arch_of(name)) for name in targets}
    with console.status("") as status:
        manifest = bundle.write(folder, tables, lambda name, done, of: status.update(f"{name}: {done} of {of} programs"))
    console.print(result_table(manifest, len(layers)))
    console.print(f"{folder}: {CHECKED}")
    if folder == out / bundle.FOLDER:
        console.print(f'on such a GPU, with LOWBIT_BUNDLE=use: quant.load("{out}", device="cuda")')
        console.print("check it there: python -m quant.kernels.gpu.smoke")
    else:
        console.print(f"move it to {out / bundle.FOLDER}, where quant.load looks for it")
