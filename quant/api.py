"""`quant.quantize`: a float model in, a low-bit folder and model out. The command does the same through `compile_folder`."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant import checkpoint, forecast
from quant.calibrate import Sample
from quant.card import model_card
from quant.compile import BlockReport, Listener, TableReport, run_block, run_blocks, run_table
from quant.loading import load
from quant.models import INDEX
from quant.passes.base import BlockTuner, Tell, Tuner
from quant.plan import Plan, make_plan
from quant.recipe import Recipe, load_recipe
from quant.resources import peak_memory_bytes, usable_device
from quant.samples import make_samples
from quant.train.pace import Pace, left_seconds
from quant.train.processes import joined
from quant.workspace import Workspace, partial_folder

NOT_COPIED = {"config.json", "demo.json", INDEX, "README.md", "report.json", "recipe.yaml"}
COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def quantize(
    model: str | Path | nn.Module,
    recipe: str = "dgq",
    output: str | Path | None = None,
    *,
    bits: float | None = None,
    calib: str | None = None,
    overrides: Iterable[str] = (),
    device: str = "cpu",
    tokenizer: Any = None,
) -> Any:
    """The packed transformers model of `model`, written to `output` on the way.

    model: folder, hub id, demo:NAME, or a transformers model in memory, which then needs its `tokenizer` (or processor).
    recipe: a shipped recipe, a .yaml file, or "auto", which tries them; bits: stored bits per weight to spend, see
    quant/budget.py; overrides: "key.key=value". calib: as in the recipe's calibration.source.
    output None: the folder is temporary and gone when this returns. Raises ValueError with one line for user mistakes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError("a model in memory needs tokenizer= (or its processor) to calibrate and to be saved with")
            given = Path(scratch) / "source"
            model.save_pretrained(given)  # type: ignore[operator]
            tokenizer.save_pretrained(given)
            model = str(given)
        sets = [*overrides, *([f"calibration.source={json.dumps(calib)}"] if calib else [])]
        target = Path(output) if output is not None else Path(scratch) / "packed"
        require_free(target)
        where = usable_device(device)
        plan = make_plan(str(model), find_recipe(str(model), recipe, bits, sets, where), device=where)
        if plan.note:
            warnings.warn(plan.note, stacklevel=2)
        return load(compile_folder(plan, target, where))


def find_recipe(
    given: str, name: str, bits: float | None, sets: list[str], device: torch.device, say: Any = lambda line: None
) -> Recipe:
    """The recipe called `name` with overrides and budget; for "auto", the one that measures best on the model `given`."""
    if name == "auto":
        auto: Any = importlib.import_module("quant.eval.auto")  # it measures, so it lies above this file
        chosen: Recipe = auto.choose(given, bits, sets, device, say)
        return chosen
    return load_recipe(name, sets if bits is None else [*sets, f"bits={bits}"])


def require_free(output: Path) -> None:
    """Raise ValueError unless `output` can be made: it does not exist or is an empty folder, in a place one can write to."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists and is not empty; give another -o or remove it")
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{output} cannot be made: {parent} is no folder that you can write to; give another -o")


def compile_folder(
    plan: Plan,
    output: Path,
    device: torch.device,
    listen: Listener = lambda done, total, block: None,
    tell: Tell = lambda done, total, loss: None,
) -> Path:
    """Run a plan to the end and return `output`. An interrupted run leaves OUTPUT.partial and goes on when called again.

    Under `accelerate launch` the first process quantizes and writes, all of them train.
    """
    require_free(output)
    began, crew = time.monotonic(), joined(device)
    predicted = forecast.peak_memory_bytes(plan)
    samples, calibration = make_samples(plan, device)
    work = Workspace(output, plan.identity(calibration)) if crew.main else None
    report = {} if work is None else pack(plan, samples, calibration, work, device, listen, began)
    crew.wait()
    folder = partial_folder(output)
    final = folder / "final"
    tuned = train_all(plan, plan.recipe.tuners(), folder, device, tell, time.monotonic() - began)
    if work is not None:
        if plan.recipe.budget is not None:
            steps = {entry["pass"]: entry["steps"] for entry in tuned if "steps" in entry}
            (final / "recipe.yaml").write_text(
                plan.recipe.with_steps(steps | block_steps(plan, report)).dump(), encoding="utf-8"
            )
        if tuned:
            report["tuned"] = tuned
        report["totals"] |= {
            "seconds": time.monotonic() - began,
            "peak_memory_bytes": peak_memory_bytes(),
            "predicted_peak_memory_bytes": predicted,
        }
        (final / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (final / "README.md").write_text(model_card(plan, report, output.name), encoding="utf-8")
        for path in sorted(plan.source.iterdir()):
            if path.is_file() and path.suffix in COPIED and path.name not in NOT_COPIED:
                shutil.copyfile(path, final / path.name)
        work.publish(final, output)
    crew.wait()
    return output


def train_all(
    plan: Plan, tuners: Sequence[Tuner], folder: Path, device: torch.device, tell: Tell, spent: float
) -> list[dict[str, Any]]:
    """Train the packed model `final` in `folder`; returns what report.json says of it. spent: seconds of the budget, so far."""
    began, budget, tuned = time.monotonic() - spent, plan.recipe.seconds(), []
    for i, tuner in enumerate(tuners):
        state, seconds = folder / f"tuned-{i}", time.monotonic() - began
        pace = None if budget is None else Pace(left_seconds(budget, seconds, len(tuners) - i), state / "steps.json")
        tuned.append(tuner.tune(folder / "final", plan, device, state, tell, pace))
    return tuned


def pack(
    plan: Plan,
    samples: list[Sample],
    calibration: str,
    work: Workspace,
    device: torch.device,
    listen: Listener,
    since: float,
) -> dict[str, Any]:
    """Quantize all blocks and write a folder that loads, `final` in the workspace; returns what report.json says so far.

    since: when the run began, by time.monotonic.
    """
    resumed = len(work.reports)
    try:
        table = run_table(plan, work)
        passes = plan.recipe.build_passes()
        make = partial(
            run_block,
            plan,
            samples=samples,
            passes=passes,
            weights=plan.weights(),
            device=device,
            folder=work.folder,
            since=since,
        )
        blocks = run_blocks(plan, samples, work, device, listen, passes, make)
    except BaseException:
        if not work.reports:
            work.remove()  # nothing in it that a second run could use
        raise
    final = work.folder / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    checkpoint.write(final, plan.pieces(work.made()))
    config = json.loads((plan.source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = plan.config_section()
    if plan.masking is not None:
        config["mask_token_id"] = plan.masking.token  # as the calibration had it, for `quantize eval`
    (final / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (final / "recipe.yaml").write_text(plan.recipe.dump(), encoding="utf-8")
    report = make_report(plan, blocks, table, calibration, str(device))
    report["totals"]["blocks_resumed"] = resumed
    return report


def block_steps(plan: Plan, report: dict[str, Any]) -> dict[str, int]:
    """How many steps the trainings of a block took, by pass."""
    names = [step.name() for step in plan.recipe.build_passes() if isinstance(step, BlockTuner)]
    trained = next((block["trained"] for block in report["blocks"] if block["trained"]), None)
    return {} if trained is None else {name: entry["steps"] for name, entry in zip(names, trained, strict=True)}


def make_report(
    plan: Plan, blocks: list[BlockReport], table: TableReport | None, calibration: str, device: str
) -> dict[str, Any]:
    """report.json: totals, environment, and one entry per layer."""
    import transformers

    from quant import __version__

    float_bytes = sum(e.stop - e.start for e in plan.tensors.values())
    return {
        "source": plan.given,
        "recipe": plan.recipe.name,
        "calibration": calibration,
        "totals": {
            "layers": len(plan.targets),
            "kept_in_float": plan.selection.kept,
            "quantized_without_data": [layer.name for block in blocks for layer in block.layers if not layer.data],
            "packed_weights": plan.packed_weights(),
            "packed_bits_per_weight": plan.bits_per_weight(),
            "head": None if table is None else asdict(table),
            "weight_files_bytes": plan.bytes_on_disk(),
            "source_weights_bytes": float_bytes,
        },
        "environment": {
            "lowbit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": device,
        },
        "blocks": [asdict(block) for block in blocks],
    }
