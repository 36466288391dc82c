"""`quantize inspect OUT`, `--plan` and the lines after a run: tables of what is, or would be, in a folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from quant.checkpoint import layers_on_disk, read_config
from quant.kernels.reference import Reference
from quant.models import Entry, index, read_json
from quant.plan import Plan


def megabytes(count: int) -> str:
    """Bytes as MB with the exact number beside it."""
    return f"{count / 1e6:,.1f} MB ({count:,} bytes)"


def print_plan(console: Console, plan: Plan, device: str, output: Path) -> None:
    """What a run would do."""
    from quant.forecast import peak_memory_bytes

    recipe = plan.recipe
    console.print(f"{plan.given} -> {output}, recipe {recipe.name}: {recipe.description}")
    rows: dict[tuple[str, ...], int] = {}
    for t in plan.packed.values():
        fmt = " ".join(f"{v}" if k == "name" else f"{k}={v}" for k, v in t.format.config().items())
        size = f"{t.format.bits_per_weight(t.n, t.k):.3f} bits"
        row = (pattern_of(t.name), f"[{t.n}, {t.k}]", fmt, str(t.activation), size, t.note)
        rows[row] = rows.get(row, 0) + 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells, count in rows.items():
        texts = (text.ljust(width) for text, width in zip(cells, widths, strict=True))
        console.print(f"  {count:3} x " + "  ".join(texts).rstrip())
    for name, reason in plan.selection.kept.items():
        console.print(f"kept in float: {name}: {reason}")
    kind = torch_device(device)
    own = "gpu_" if kind == "cuda" else f"{kind}_"
    for kernel, (count, refusals) in plan.kernels(kind).items():
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if name.startswith(own))
        console.print(f"kernel on {device}: {kernel} for {count} layers" + (f" ({why})" if kernel == Reference.name else ""))
    bits = plan.bits_per_weight()
    console.print(f"packed linears: {plan.packed_weights():,} weights at {bits:.3f} bits, {megabytes(plan.packed_bytes())}")
    if plan.masking is not None:
        weight = recipe.calibration.visible_weight
        console.print(f"calibration text is masked by token {plan.masking.token}; errors at visible tokens weigh {weight:g}")
    head, table = plan.selection.head, plan.selection.table
    if head is not None and table is not None:
        stored, bits = table.format.stored_bytes(table.n, table.k), table.format.bits_per_weight(table.n, table.k)
        console.print(f"packed {kind_of(head.tied)}: {table.n * table.k:,} weights at {bits:.3f} bits, {megabytes(stored)}")
    console.print(f"weight files on disk: {megabytes(plan.bytes_on_disk())}, exact")
    console.print(f"peak memory of the run: about {peak_memory_bytes(plan) / 1e6:,.0f} MB")


def kind_of(tied: bool) -> str:
    """What a packed table serves."""
    return "head and input embedding" if tied else "head"


def head_line(head: dict[str, Any]) -> str:
    """The packed head in a finished report, in words."""
    return f"{kind_of(head['tied'])} at {head['bits_per_weight']:.3f} bits per weight (relative error {head['error']:.4f})"


def pattern_of(name: str) -> str:
    """A layer's name with `*` for the numbers of its blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def torch_device(device: str) -> str:
    """The device type of a torch device string."""
    return device.partition(":")[0]


def print_result(console: Console, folder: Path) -> None:
    """The lines after a finished run."""
    report = json.loads((folder / "report.json").read_text())
    totals = report["totals"]
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    mean = sum(layer["error"] for layer in layers) / len(layers)
    rtn = sum(layer["rtn_error"] for layer in layers) / len(layers)
    console.print(f"calibrated on {report['calibration']}")
    console.print(
        f"{folder}: {totals['layers']} linears at {totals['packed_bits_per_weight']:.3f} bits per weight, "
        + (f"{head_line(totals['head'])}, " if totals["head"] else "")
        + f"{totals['weight_files_bytes'] / 1e6:.1f} MB of {totals['source_weights_bytes'] / 1e6:.1f}, "
        f"mean layer error {mean:.4f} (round-to-nearest {rtn:.4f}), "
        f"{totals['seconds']:.0f} s, peak memory {totals['peak_memory_bytes'] / 1e6:,.0f} MB"
    )
    for tuned in (step for step in report.get("tuned", []) if "steps" in step):
        before, after = tuned["held_out_kl"]
        console.print(f"{tuned['pass']}, {tuned['steps']} steps: held-out mean KL {before:.4f} before, {after:.4f} after")
    blind = totals["quantized_without_data"]
    if blind:
        listed = ", ".join(blind[:3]) + (" and others" if len(blind) > 3 else "")
        console.print(f"{len(blind)} linears of experts saw too few tokens and were quantized without data: {listed}")
    console.print(f'load it: quant.load("{folder}"); prove it: quantize eval {folder}; time it: quantize bench {folder}')


@click.command("inspect")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Every layer instead of one line per kind.")
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write a page: maps of errors, the worst layers, what to do."
)
def command(out: Path, layers: bool, html: Path | None) -> None:
    """Formats, bits per weight, per-layer error and provenance of a quantized folder."""
    tensors = index(out)
    path = out / "report.json"
    report: dict[str, Any] = read_json(path) if path.is_file() else {}
    if html is not None and not report:
        raise ValueError(f"{path} does not exist, and a page is made of it; inspect a folder that `quantize` wrote")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    lines = facts(out, tensors, report)
    for line in lines:
        console.print(line)
    if report:
        console.print(error_table(report, layers))
    if html is not None:
        from quant import layer_page

        stored: Counter[str] = Counter()
        for name, entry in tensors.items():
            stored[name.rpartition(".")[0]] += entry.stop - entry.start
        layer_page.write(html, out, lines, error_table(report, layers), report, stored)


def facts(out: Path, tensors: dict[str, Entry], report: dict[str, Any]) -> list[str]:
    """What holds of the whole folder."""
    section = read_config(out)["quantization_config"]
    size = sum(entry.stop - entry.start for entry in tensors.values())
    lines = [f"{out}: format version {section['version']}, {len(layers_on_disk(tensors))} packed layers"]
    lines += [f"  {rule['match']}: {rule['format']}, activation {rule['activation']}" for rule in section["rules"]]
    lines += [f"tensors: {len(tensors)}, {megabytes(size)}"]
    if report:
        totals = report["totals"]
        lines += [f"made from {report['source']} by recipe {report['recipe']}, calibrated on {report['calibration']}"]
        lines += [f"packed linears: {totals['packed_bits_per_weight']:.3f} bits per weight; {totals['seconds']:.0f} s"]
        lines += [f"packed {head_line(totals['head'])}"] if totals.get("head") else []
        lines += [" ".join(f"{key} {value}" for key, value in report["environment"].items())]
    return lines


def error_table(report: dict[str, Any], each: bool) -> Table:
    """Errors against round-to-nearest, by layer or by kind of layer."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for block in report["blocks"]:
        for layer in block["layers"]:
            name = layer["name"]
            key = name if each else pattern_of(name)
            rows.setdefault(key, []).append(layer)
    table = Table("layer", "count", "bits/weight", "error", "worst", "round-to-nearest", "tokens", box=None)
    for key, members in rows.items():
        errors = [m["error"] for m in members]
        table.add_row(
            key,
            str(len(members)),
            f"{members[0]['bits_per_weight']:.3f}",
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f}",
            f"{sum(m['rtn_error'] for m in members) / len(members):.4f}",
            str(min(m["tokens"] for m in members)),
        )
    return table
