"""`quantize compare`: recipes on one model, on equal terms: the same calibration rules, windows and float reference for all.

Each result is a file named after a digest of everything that decides it (recipe, model, calibration data, evaluation data,
versions), written when its recipe is done. So a killed comparison goes on, inside a recipe at the last finished block, and
a finished one prints at once. Packed models are deleted when they have been measured, unless they are to be kept. A folder
that is packed already, by a longer chain of commands say, is measured as it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from quant.checkpoint import safe_name
from quant.compile import Listener
from quant.eval import drawing, loading
from quant.eval.judge import Judge, Measured, SpeechJudge, TextJudge
from quant.eval.perplexity import Progress
from quant.eval.report import identity_of, require_writable
from quant.plan import Plan, make_plan
from quant.recipe import Recipe, load_recipe
from quant.resources import usable_device
from quant.samples import data_identity
from quant.wheels import cache_folder, sha256

OPEN, CLOSED = "[{(", "]})"
NAMED = " = "  # after the name under which an entry is shown


@dataclass(frozen=True, kw_only=True)
class Made:
    """One packed model: stored bits per weight of its packed linears, bytes of its weight files, seconds to make it."""

    bits_per_weight: float
    weight_bytes: int
    quantize_seconds: float


@dataclass(frozen=True)
class Cost:
    """What a recipe is paid with: of(made), named on an axis whose scale is "linear" or "log"."""

    title: str
    scale: str
    of: Callable[[Made], float]


COSTS = {
    "bits": Cost("stored bits per weight of the packed linears", "linear", lambda made: made.bits_per_weight),
    "minutes": Cost("minutes to make it", "log", lambda made: made.quantize_seconds / 60),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe as it was typed; failed: in one line, why it has no numbers. cached: nothing was computed for it."""

    recipe: str
    made: Made | None = None
    measured: Measured | None = None
    failed: str | None = None
    cached: bool = False


def split_outside(text: str, at: str) -> list[str]:
    """`text` cut at each character `at` that stands in no bracket, stripped; empty parts are dropped."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSED)
        if character == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def read_lines(path: Path) -> list[str]:
    """ValueError for a file that is not there or no text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipes names the file {path}, which cannot be read ({error}); give @FILE or a list") from error


def read_entries(text: str, common: Sequence[str] = ()) -> dict[str, Recipe | Path]:
    """Recipes of a list such as `rtn,W3 = gptq:format.bits=3:format.group=128`, by entry, or by the name before " = " that an
    entry may have. An entry that is a folder with a report.json is a packed model. common: overrides of all recipes.

    `@FILE` stands for the lines of a file that do not begin with #. Raises ValueError in one line for a file that cannot be
    read, an unknown recipe or key, an entry given twice, and an empty list.
    """
    if text.startswith("@"):
        text = ",".join(line for line in read_lines(Path(text[1:])) if not line.startswith("#"))
    found: dict[str, Recipe | Path] = {}
    for entry in split_outside(text, ","):
        shown, named, recipe = entry.partition(NAMED)
        name, *overrides = split_outside(recipe if named else entry, ":")
        if shown in found:
            raise ValueError(f"--recipes names {shown} twice; give each recipe once")
        packed = (Path(name) / "report.json").is_file()
        if packed and overrides:
            raise ValueError(f"--recipes gives overrides to {name}, which is packed already; give them to a recipe")
        found[shown] = Path(name) if packed else load_recipe(name, [*common, *overrides])
    if not found:
        raise ValueError("--recipes is empty; give recipes with commas between, for instance rtn,gptq:format.bits=3,dgq")
    return found


@dataclass(frozen=True)
class Bench:
    """Where and with what recipes are compared. keep: folder for the packed models, None deletes them."""

    given: str
    judge: Judge
    cache: Path
    device: str = "cpu"
    keep: Path | None = None
    fresh: bool = False
    say: Callable[[str], None] = lambda line: None

    def row(self, entry: str, recipe: Recipe | Path, listen: Listener, progress: Progress) -> Row:
        """One recipe made and measured, or read from the cache; a recipe that this model refuses is a row that says why."""
        try:
            if isinstance(recipe, Path):
                return self._packed(entry, recipe, progress)
            plan = make_plan(self.given, recipe, self.say, usable_device(self.device))
            key = identity_of([plan.identity(data_identity(plan)), self.judge.identity])
            result = self.cache / f"{key}.json"
            if result.is_file() and not self.fresh and (self.keep is None or self.kept(entry).exists()):
                return known(entry, result)
            return self._run(entry, plan, key, listen, progress)
        except (ValueError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return Row(recipe=entry, failed=reason)

    def _run(self, entry: str, plan: Plan, key: str, listen: Listener, progress: Progress) -> Row:
        from quant.api import compile_folder

        folder = self.cache / key
        if self.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            compile_folder(plan, folder, usable_device(self.device), listen)
        row = self._measured(entry, folder, key, plan.recipe.model_dump(mode="json"), progress)
        if self.keep is None:
            shutil.rmtree(folder)
        else:
            self.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, self.kept(entry))
        return row

    def _packed(self, entry: str, folder: Path, progress: Progress) -> Row:
        source = loading.source(folder)
        if source is None or not same_model(source, self.given):
            raise ValueError(f"{folder} was made of {source}, and {self.given} is compared; give folders made of it")
        key = identity_of([[sha256(path) for path in sorted(folder.glob("*.safetensors"))], self.judge.identity])
        result = self.cache / f"{key}.json"
        if result.is_file() and not self.fresh:
            return known(entry, result)
        return self._measured(entry, folder, key, str(folder), progress)

    def _measured(self, entry: str, folder: Path, key: str, recipe: Any, progress: Progress) -> Row:
        made, measured = read_made(folder), self.judge.measure(folder, progress)
        temporary = self.cache / f"{key}.tmp"
        facts = {"recipe": recipe, "made": asdict(made), "measured": asdict(measured)}
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.cache / f"{key}.json")
        return Row(recipe=entry, made=made, measured=measured)

    def kept(self, entry: str) -> Path:
        """Where the packed model of an entry is kept."""
        assert self.keep is not None
        return self.keep / safe_name(entry)


def known(entry: str, result: Path) -> Row:
    """The row of a result that was written before."""
    found = loading.read_json(result)
    return Row(recipe=entry, made=Made(**found["made"]), measured=Measured(**found["measured"]), cached=True)


def same_model(one: str, other: str) -> bool:
    """Whether two names as users give them, of folders or not, mean one model."""
    return one == other or Path(one).resolve() == Path(other).resolve()


def read_made(folder: Path) -> Made:
    """Size and time of a finished run, from its report."""
    report = loading.read_json(folder / "report.json")
    totals, blocks = report["totals"], sum(block["seconds"] for block in report["blocks"])
    return Made(
        bits_per_weight=totals["packed_bits_per_weight"],
        weight_bytes=totals["weight_files_bytes"],
        quantize_seconds=max(totals["seconds"], blocks),  # of a resumed run `seconds` counts only the last part
    )


@click.command("compare")
@click.argument("model")
@click.option(
    "--recipes",
    required=True,
    metavar="A,B:KEY=VALUE,...",
    help="Recipes, each with its overrides after colons, and folders packed already; NAME = before either if you like; "
    "@FILE: one a line.",
)
@click.option("--calib", metavar="SOURCE", help="Calibration data of all recipes; as in the main job.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every recipe.")
@click.option("--text", help="Text to score: a text or jsonl file, or a data set; default: the built-in evaluation text.")
@click.option("--audio", help="Folder or jsonl of clips with transcripts, for speech models.")
@click.option("--length", type=int, default=2048, show_default=True, help="Window length in tokens.")
@click.option("--limit", type=int, help="Use so many windows or clips.")
@click.option("--language", default="en", show_default=True, help="Language code of the clips.")
@click.option("--dtype", type=click.Choice([*loading.DTYPES]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Torch device to quantize and to evaluate on.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep the packed models in this folder.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw the cost against KL and perplexity ratio, as PNG.")
@click.option(
    "--cost", type=click.Choice([*COSTS]), default="bits", show_default=True, help="What --figure draws from left to right."
)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Also write the table here.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write all numbers here.")
@click.option("--fresh", is_flag=True, help="Measure everything again.")
@click.option("--quiet", is_flag=True, help="No progress, only the table.")
def command(
    model: str,
    recipes: str,
    calib: str | None,
    overrides: tuple[str, ...],
    text: str | None,
    audio: str | None,
    length: int,
    limit: int | None,
    language: str,
    dtype: str,
    device: str,
    keep: Path | None,
    figure: Path | None,
    cost: str,
    csv_path: Path | None,
    json_path: Path | None,
    fresh: bool,
    quiet: bool,
) -> None:
    """Recipes side by side on MODEL: size, perplexity, KL divergence, agreement; word errors for speech."""
    from quant.eval import comparison
    from quant.eval.evaluate import read_windows, require_data
    from quant.models import model_class, resolve

    loading.quiet()
    sets = [*overrides, *([f"calibration.source={json.dumps(calib)}"] if calib else [])]
    entries = read_entries(recipes, sets)
    require_writable(figure, csv_path, json_path)
    if figure is not None:
        drawing.require_matplotlib("--figure")
    usable_device(device)
    source = resolve(model, lambda line: click.echo(line, err=True))
    kind = require_data(source, text, audio, limit)
    loading.require_next_token(source)
    judge: Judge
    if kind == "speech":
        assert audio is not None
        judge = SpeechJudge(source, audio, limit, language, dtype, device)
    else:
        corpus, windows, _ = read_windows(source, model_class(source)[0], text, length, limit)
        judge = TextJudge(source, corpus, windows, dtype, device)
    cache = cache_folder() / "compare"
    cache.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    bench = Bench(model, judge, cache, device, keep, fresh, (lambda line: None) if quiet else console.print)
    rows = run_all(bench, entries, console, quiet)
    comparison.show(model, judge.about, rows)
    if csv_path is not None:
        comparison.write_csv(rows, csv_path)
    if json_path is not None:
        comparison.write_json(model, judge.about, rows, json_path)
    if figure is not None:
        comparison.draw(model, judge.about, rows, figure, COSTS[cost])
    if all(row.failed for row in rows):
        raise ValueError(f"no recipe could be measured; the first says: {rows[0].failed}")


def run_all(bench: Bench, entries: dict[str, Recipe | Path], console: Console, quiet: bool) -> list[Row]:
    """The row of every entry, one after another, with progress on `console`."""
    from quant.progress import Reporter

    rows: list[Row] = []
    for at, (entry, recipe) in enumerate(entries.items(), 1):
        with Reporter(console, quiet) as reporter:
            row = bench.row(entry, recipe, reporter.block, reporter.evaluation)
        rows.append(row)
        state = row.failed or ("known already" if row.cached else "measured")
        bench.say(f"[{at}/{len(entries)}] {entry}: {state}")
    return rows
