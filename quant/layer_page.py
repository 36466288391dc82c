"""`quantize inspect --html`: where a model loses, block by block and layer by layer, and the command that spends bits there."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from quant import page
from quant.kernels.format import from_config
from quant.recipe import Recipe, load_recipe
from quant.show import pattern_of
from quant.targets import family_of

WORST = 10  # layers that are listed

Layer = Mapping[str, Any]  # one of report.json


@dataclass(frozen=True)
class Cell:
    """One field of a map: its number as shown, its layers by name, and a CSS colour, the darker the greater."""

    text: str
    title: str
    color: str


@dataclass(frozen=True)
class Map:
    """One quantity over the blocks of a stack (rows) and the kinds of layers in them (columns); None where there is none."""

    title: str
    kinds: list[str]
    rows: dict[str, list[Cell | None]]


QUANTITIES: dict[str, tuple[Callable[[Layer], float | None], str]] = {
    "error of the output, relative to it": (lambda layer: layer["error"], ".3f"),
    "error, that of round-to-nearest being 1": (lambda layer: layer["error"] / max(layer["rtn_error"], 1e-12), ".2f"),
    "bits per weight": (lambda layer: layer["bits_per_weight"], ".2f"),
    "outliers: the greatest input channel over the median one": (lambda layer: layer.get("outlier_ratio"), ".0f"),
    "share of inputs that round to zero": (lambda layer: (layer["zero_fraction"] or [None])[0], ".1%"),
}


def write(path: Path, folder: Path, lines: list[str], table: Table, report: dict[str, Any], stored: Mapping[str, int]) -> None:
    """Write the page. lines, table: what the command prints. stored: bytes of each packed layer, by name on disk."""
    layers = layers_of(report)
    recipe = load_recipe(str(folder / "recipe.yaml"))
    advice = more_bits(worst(layers), [layer["name"] for layer in layers], recipe)
    page.write(
        path,
        "inspect.html",
        folder=str(folder),
        lines=lines,
        table=table,
        trained=any(block.get("trained") for block in report["blocks"]) or "tuned" in report,
        maps=[found for title, (read, shape) in QUANTITIES.items() for found in maps(title, report["blocks"], read, shape)],
        worst=worst_table(layers),
        command=command(folder, report["source"], recipe, advice),
        extra=extra_bytes(advice, layers, stored),
        folds=folds_table(report["blocks"]),
    )


def layers_of(report: Mapping[str, Any]) -> list[Layer]:
    """All layers, in order."""
    return [layer for block in report["blocks"] for layer in block["layers"]]


def worst(layers: Iterable[Layer]) -> list[Layer]:
    """The layers of greatest relative output error."""
    return sorted(layers, key=lambda layer: -layer["error"])[:WORST]


def maps(title: str, blocks: Iterable[Mapping[str, Any]], read: Callable[[Layer], float | None], shape: str) -> list[Map]:
    """One map per stack of blocks; none of a quantity that the report lacks or that is the same everywhere.

    Layers of one kind in one block, the experts, share a cell that shows the greatest.
    """
    values: dict[str, dict[str, dict[str, list[tuple[float, str]]]]] = {}  # stack -> block -> kind -> layers
    for block in blocks:
        row = values.setdefault(pattern_of(block["name"]), {}).setdefault(block["name"], {})
        for layer in block["layers"]:
            value = read(layer)
            if value is not None:
                kind = pattern_of(layer["name"].removeprefix(f"{block['name']}."))
                row.setdefault(kind, []).append((value, layer["name"]))
    numbers = [value for rows in values.values() for row in rows.values() for cell in row.values() for value, _ in cell]
    if not numbers or min(numbers) == max(numbers):
        return []
    return [
        Map(
            f"{stack}: {title}",
            kinds := list(dict.fromkeys(kind for row in rows.values() for kind in row)),
            {name: [cell_of(row.get(kind), shape, min(numbers), max(numbers)) for kind in kinds] for name, row in rows.items()},
        )
        for stack, rows in values.items()
    ]


def cell_of(members: list[tuple[float, str]] | None, shape: str, low: float, high: float) -> Cell | None:
    """The field of some layers, coloured by where the greatest lies between `low` and `high`."""
    if not members:
        return None
    value, name = max(members)
    return Cell(f"{value:{shape}}", f"{name}: {value:.6g}", f"hsl(20 90% {97 - 42 * (value - low) / (high - low):.1f}%)")


def worst_table(layers: Iterable[Layer]) -> Table:
    """The worst layers with everything that is known of them."""
    table = Table("layer", "format", "bits", "error", "round-to-nearest", "outliers", "zeros", "tokens", "note")
    for layer in worst(layers):
        fmt = " ".join(f"{value}" if key == "name" else f"{key}={value}" for key, value in layer["format"].items())
        ratio, zeros = layer.get("outlier_ratio"), layer["zero_fraction"]
        table.add_row(
            layer["name"],
            fmt,
            f"{layer['bits_per_weight']:.3f}",
            f"{layer['error']:.4f}",
            f"{layer['rtn_error']:.4f}",
            "" if ratio is None else f"{ratio:.1f}",
            "" if zeros is None else f"{zeros[0]:.1%}",
            str(layer["tokens"]),
            layer["note"]
            if layer.get("data", True)
            else f"too few tokens, quantized without data; {layer['note']}".strip("; "),
        )
    return table


def more_bits(bad: Iterable[Layer], names: Iterable[str], recipe: Recipe) -> dict[tuple[str, ...], dict[str, Any]]:
    """Layers that must share one scheme -> the rule that gives them 8 bits, or leaves them in float where the recipe's
    quantizer has no 8-bit codes or they have 8 bits already.
    """
    names = list(names)
    owners = {name.rpartition(".")[0].rpartition(".")[0] for name in names}
    experts = {owner for owner in owners if owner.endswith("experts")}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(family_of(name, experts), []).append(name)
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for layer in bad:
        fmt: dict[str, Any] = {"name": "int_group", "bits": 8}
        if recipe.format["name"] != "int_group":
            fmt |= {"group": -1, "symmetric": True}
        full = from_config({**(recipe.base_format().config() if recipe.format["name"] == "int_group" else {}), **fmt})
        narrow = layer["format"].get("bits", 4) < 8 and recipe.quantizer().refuses(full) is None
        found[tuple(members[family_of(layer["name"], experts)])] = {"format": fmt} if narrow else {"skip": True}
    return found


def command(folder: Path, source: str, recipe: Recipe, advice: Mapping[tuple[str, ...], dict[str, Any]]) -> str:
    """The run that applies the advice; the rules that the recipe has come after it, since the first that matches decides."""
    alike: dict[str, list[str]] = {}
    for names, rule in advice.items():
        alike.setdefault(json.dumps(rule), []).extend(names)
    rules: list[dict[str, Any]] = [{"match": names, **json.loads(rule)} for rule, names in alike.items()]
    rules += [rule.model_dump(exclude_defaults=True) for rule in recipe.rules]
    made = ["--recipe", str(folder / "recipe.yaml"), "-o", f"{folder}-more-bits", "--set", f"rules={json.dumps(rules)}"]
    return shlex.join(["quantize", source, *made])


def extra_bytes(
    advice: Mapping[tuple[str, ...], dict[str, Any]], layers: Iterable[Layer], stored: Mapping[str, int]
) -> int | None:
    """About how many bytes the advice adds; None where a layer has another name on disk."""
    bits = {layer["name"]: layer["bits_per_weight"] for layer in layers}
    total = 0.0
    for names, rule in advice.items():
        for name in names:
            if name not in stored:
                return None
            total += stored[name] * ((16 if "skip" in rule else 8) / bits[name] - 1)
    return round(total)


def folds_table(blocks: Iterable[Mapping[str, Any]]) -> Table | None:
    """Kinds of layers whose inputs were scaled, and where, or why not; None where the recipe folds nothing."""
    found: Counter[tuple[str, str]] = Counter()
    for block in blocks:
        found.update((pattern_of(name), pattern_of(maker)) for name, maker in block.get("folds", {}).items())
        found.update((pattern_of(name), f"refused: {reason}") for name, reason in block["refused_folds"].items())
    table = Table("input of", "folded into", "layers")
    for (name, where), count in sorted(found.items()):
        table.add_row(name, where, str(count))
    return table if found else None
