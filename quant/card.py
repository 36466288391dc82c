"""The README.md of a quantized folder: a model card that says what was done, what it cost, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.plan import Plan

CARD = """---
library_name: lowbit
tags: [quantized, {recipe}]
{base}---

# {name}

`{source}`, quantized by [lowbit](https://pypi.org/project/lowbit/) with recipe `{recipe}`: {description}.

    import quant
    model = quant.load("{name}")

`AutoModel*.from_pretrained` works after `import quant`; without that import transformers refuses these weights.

| | |
| --- | --- |
| packed linears | {layers}, {bits:.3f} bits per weight, scales included |
{head}| weight files | {megabytes:.1f} MB (source {source_megabytes:.1f} MB) |
| kept in float | {kept} |
| activations | {activation} |
| calibration | {calibration} |
| mean layer error{before} | {error:.4f} (round-to-nearest {rtn_error:.4f}), relative to the layer's output |
{tuned}
The exact recipe is in `recipe.yaml`, errors layer by layer in `report.json`. Measure it: `quantize eval {name}`.
"""

HEAD = "| packed head{both} | {bits_per_weight:.3f} bits per weight, relative error of the weights {error:.4f} |\n"
TUNED = "| {pass} | {steps} steps; held-out mean KL {held_out_kl[0]:.4f} before, {held_out_kl[1]:.4f} after |\n"


def model_card(plan: Plan, report: dict[str, Any], name: str) -> str:
    """The card of a finished run."""
    totals = report["totals"]
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    return CARD.format(
        recipe=plan.recipe.name,
        base="" if plan.given.startswith("demo:") or Path(plan.given).exists() else f"base_model: {plan.given}\n",  # a hub id
        source=plan.given,
        name=name,
        description=plan.recipe.description,
        layers=totals["layers"],
        bits=totals["packed_bits_per_weight"],
        head=""
        if totals["head"] is None
        else HEAD.format(**totals["head"], both=" and input embedding" * totals["head"]["tied"]),
        megabytes=totals["weight_files_bytes"] / 1e6,
        source_megabytes=totals["source_weights_bytes"] / 1e6,
        kept=", ".join(totals["kept_in_float"]) or "only what is not a linear layer",
        activation=plan.recipe.activation_of(None),
        calibration=report["calibration"],
        error=sum(layer["error"] for layer in layers) / len(layers),
        rtn_error=sum(layer["rtn_error"] for layer in layers) / len(layers),
        before=" before training" if "tuned" in report else "",
        tuned="".join(TUNED.format(**tuned) for tuned in report.get("tuned", []) if "steps" in tuned),
    )
