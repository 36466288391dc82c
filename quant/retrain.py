"""`quantize train OUT`: the trainings of a recipe on a folder that is packed already, for more quality or for an ablation.

Two trainings are compared fairly when they start from the same bytes; and a model that took an hour to pack is better trained
for another hour than made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from quant.api import require_free, train_all
from quant.calibrate import Chain, Sample
from quant.card import model_card
from quant.compile import BlockReport, Listener, run_blocks
from quant.kernels.format import Fields
from quant.models import Weights, index, read_json
from quant.passes.base import BlockTuner, Tell, Transform, Tuner, find
from quant.plan import Plan, make_plan
from quant.recipe import load_recipe
from quant.resources import usable_device
from quant.samples import make_samples
from quant.train import processes
from quant.train.again import train_block
from quant.train.folder import overwrite
from quant.workspace import Workspace, partial_folder


def retrain(
    folder: Path,
    recipe: str,
    output: Path,
    sets: Iterable[str] = (),
    calib: str | None = None,
    device: torch.device | None = None,
    tell: Tell = lambda done, total, loss: None,
    listen: Listener = lambda done, total, block: None,
) -> Path:
    """Train what `quantize` wrote to `folder` by the trainings of `recipe`; writes `output`, and leaves `folder` as it is.

    sets: overrides of `recipe`. calib: text to train on, that of the folder otherwise. A killed run goes on when called again.
    A seed of `recipe` other than 0 draws other data. Raises ValueError (one line) where the recipe trains nothing, the folder
    is none of ours, or blocks shall be trained whose weights were folded.
    """
    device = device or torch.device("cpu")
    require_free(output)
    began, crew = time.monotonic(), processes.joined(device)
    if not (folder / "report.json").is_file() or not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} has no report.json and recipe.yaml; give the folder that quantize wrote")
    report, first, more = read_json(folder / "report.json"), load_recipe(str(folder / "recipe.yaml")), load_recipe(recipe, sets)
    added = tuple(entry for entry in more.passes if all(issubclass(find(name), BlockTuner | Tuner) for name in entry))
    if not added:
        raise ValueError(f"recipe {more.name} trains nothing; give one that does, such as blockwise-w2 or distill-w4a16")
    data = first.calibration if calib is None else first.calibration.model_copy(update={"source": calib})
    more = more.model_copy(update={"passes": added})
    passes = {"passes": first.passes + added, "calibration": data, "budget": more.budget, "seed": more.seed or first.seed}
    plan = make_plan(report["source"], first.model_copy(update=passes), device=device)
    samples, calibration = make_samples(plan, device)
    bytes_of = hashlib.sha256(repr(sorted((n, e.shape, e.start) for n, e in index(folder).items())).encode())
    for file in sorted(folder.glob("*.safetensors")):
        bytes_of.update(file.read_bytes())
    work = Workspace(output, plan.identity(f"{calibration} {bytes_of.hexdigest()}")) if crew.main else None
    final, steps = partial_folder(output) / "final", {}
    tuners = [step for step in more.build_passes() if isinstance(step, BlockTuner)]
    if work is not None:
        if tuners:
            train_blocks(plan, folder, tuners, samples, work, report, device, listen, began, bool(more.tuners()))
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(folder, final)
        made = Weights(work.folder, work.made())
        overwrite(final, ((name, made.read(name)) for name in made.names()))
        recent = report["blocks"][0]["trained"][-len(tuners) :] if tuners else []
        steps = {tuner.name(): entry["steps"] for tuner, entry in zip(tuners, recent, strict=True)}
    del samples
    crew.wait()
    tuned = train_all(plan, more.tuners(), final.parent, device, tell, time.monotonic() - began)
    if work is not None:
        steps |= {entry["pass"]: entry["steps"] for entry in tuned if "steps" in entry}
        written = {"passes": first.passes + more.with_steps(steps).passes, "budget": None}
        (final / "recipe.yaml").write_text(plan.recipe.model_copy(update=written).dump(), encoding="utf-8")
        if tuned:
            report["tuned"] = [*report.get("tuned", []), *tuned]
        report["totals"]["seconds"] += time.monotonic() - began
        (final / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (final / "README.md").write_text(model_card(plan, report, output.name), encoding="utf-8")
        work.publish(final, output)
    crew.wait()
    return output


def train_blocks(
    plan: Plan,
    folder: Path,
    tuners: list[BlockTuner],
    samples: list[Sample],
    work: Workspace,
    report: dict[str, Any],
    device: torch.device,
    listen: Listener,
    since: float,
    more: bool,
) -> None:
    """Train the blocks of `folder` one after another into `work`, and write to `report`.

    since: when the run began. more: whether training follows the blocks. Raises ValueError where a pass folded weights: the
    checkpoint's are not those that were packed.
    """
    folds = [step.name() for step in plan.recipe.build_passes() if isinstance(step, Transform)]
    if folds:
        raise ValueError(
            f"pass {folds[0]} of {folder} changed the weights that {tuners[0].name()} compares with; quantize anew"
        )
    stored, table = Weights(folder), plan.selection.table
    if table is not None:
        layer = plan.layer_on_disk(table.name)
        work.keep_table({f"{layer}.{key}": stored.read(f"{layer}.{key}") for key in table.fields()})
    before = {block["name"]: BlockReport.read(block) for block in report["blocks"]}

    def make(name: str, chains: dict[str, Chain]) -> tuple[BlockReport, Fields]:
        return train_block(name, chains, before[name], plan, stored, samples, tuners, device, work.folder, since, more)

    blocks = run_blocks(plan, samples, work, device, listen, list(tuners), make)
    report["blocks"] = [asdict(block) for block in blocks]


@click.command("train")
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--recipe", "recipe_name", default="distill-w4a16", show_default=True, help="Whose trainings to run.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--calib", metavar="SOURCE", help="Text or audio to train on; that which calibrated OUT by default.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, e.g. distill.steps=200.")
@click.option("--budget", help="Time to train, e.g. 10m or 1h: steps are chosen to fit.")
@click.option("--device", default="cpu", show_default=True, help="Torch device to train on.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    out: Path,
    recipe_name: str,
    output: Path,
    calib: str | None,
    overrides: tuple[str, ...],
    budget: str | None,
    device: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Train OUT, a folder that `quantize` wrote, against its float source and write the result to another folder."""
    from rich.console import Console
    from transformers.utils import logging

    from quant.progress import Reporter
    from quant.show import print_result

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    quiet = quiet or not processes.launched().main
    console: Any = Console(soft_wrap=True, highlight=False, markup=False)
    where = processes.own_device(usable_device(device))
    sets = [*overrides, *([] if budget is None else [f"budget={json.dumps(budget)}"])]
    with Reporter(console, quiet) as reporter:
        try:
            retrain(out, recipe_name, output, sets, calib, where, reporter.training, reporter.block)
        except KeyboardInterrupt:
            raise click.Abort("the last saved step is kept, the same command goes on from it") from None
    if not quiet:
        print_result(console, output)
