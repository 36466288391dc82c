"""`quantize`: the command. The first argument is a verb or a model; anything that is no verb is a model."""

from __future__ import annotations

import errno
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

VERBS = {
    "eval": "quant.eval.evaluate:command",
    "compare": "quant.eval.compare:command",
    "bench": "quant.eval.speed:command",
    "run": "quant.eval.run:command",
    "inspect": "quant.show:command",
    "compile": "quant.deploy:command",
    "export": "quant.export.command:command",
    "push": "quant.hub:command",
    "train": "quant.retrain:command",
}
NO_MODEL = "no model given; give a folder, a hub id or demo:smollm2-135m, or use --list or --help"


class Verbs(click.Group):
    """Verbs are imported when they are used; everything else goes to the main job."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "MODEL":
            return job
        module, _, name = VERBS[cmd_name].partition(":")
        found: click.Command = getattr(importlib.import_module(module), name)
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            raise ValueError(NO_MODEL)
        if args[0] in ("--help", "-h"):
            args = ["MODEL", "--help"]
        elif args[0] not in VERBS:
            args = ["MODEL", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line for it
            raise click.Abort from None


EPILOG = "Verbs: " + ", ".join(f"quantize {verb}" for verb in VERBS) + "; each has its own --help."


@click.command("quantize", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--recipe", "recipe_name", default="dgq", show_default=True, help="A recipe's name, a .yaml file, or auto.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; MODEL-RECIPE by default.")
@click.option(
    "--calib", metavar="SOURCE", help="wikipedia, manual (default: both), wikitext2, c4, a text file, or a folder of audio."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key, e.g. format.group=128.")
@click.option("--budget", help="Time for a recipe that trains, e.g. 10m, 1h or 8h: steps are chosen to fit.")
@click.option("--bits", type=float, help="Stored bits per weight to spend, e.g. 3.5: layers get formats by sensitivity.")
@click.option("--device", default="cpu", show_default=True, help="Torch device for the arithmetic of a block.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default otherwise.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would happen; write nothing.")
@click.option("--list", "only_list", is_flag=True, help="Recipes and demo models.")
@click.option("--push-to", metavar="REPO", help="Publish the result on the Hugging Face Hub; see quantize push.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def job(
    model: str | None,
    recipe_name: str,
    output: Path | None,
    calib: str | None,
    overrides: tuple[str, ...],
    budget: str | None,
    bits: float | None,
    device: str,
    threads: int | None,
    only_plan: bool,
    only_list: bool,
    push_to: str | None,
    quiet: bool,
) -> None:
    """Quantize MODEL (a folder, a hub id, or demo:NAME) and write a folder that loads where you serve."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if only_list:
        list_all(console)
        return
    if model is None:
        raise ValueError(NO_MODEL)
    from quant.recipe import load_recipe
    from quant.train import processes

    quiet = quiet or not processes.launched().main
    sets = [*overrides, *([f"calibration.source={json.dumps(calib)}"] if calib else [])]
    sets += [] if budget is None else [f"budget={json.dumps(budget)}"]
    words = [model.removeprefix("demo:").rstrip("/").rpartition("/")[2]]
    words += ["auto" if recipe_name == "auto" else load_recipe(recipe_name, sets).name]
    words += [] if bits is None else [f"{bits:g}bits"]
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from transformers.utils import logging

    from quant import hub
    from quant.api import compile_folder, find_recipe, require_free
    from quant.checkpoint import safe_name
    from quant.plan import make_plan
    from quant.resources import usable_device

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # the run has a bar of its own
    target = output or Path(safe_name("-".join(words)))
    say: Callable[[str], None] = (lambda line: None) if quiet else (lambda line: console.print(line))
    measures = recipe_name == "auto" or bits is not None
    where = processes.own_device(usable_device(device, here=measures or not only_plan))
    if not only_plan:
        require_free(target)
        if push_to is not None:
            hub.require_access(push_to)
    recipe = find_recipe(model, recipe_name, bits, sets, where, say)
    plan = make_plan(model, recipe, say, where)
    if plan.note:
        say(plan.note)
    if only_plan:
        from quant.show import print_plan

        print_plan(console, plan, device, target)
        return
    from quant.progress import Reporter

    with Reporter(console, quiet) as reporter:
        try:
            compile_folder(plan, target, where, reporter.block, reporter.training)
        except KeyboardInterrupt:
            raise click.Abort("finished blocks are kept, the same command goes on where it stopped") from None
    if not quiet:
        from quant.show import print_result

        print_result(console, target)
    if push_to is not None and processes.launched().main:
        say(hub.push(target, push_to, say=say))


def list_all(console: Any) -> None:
    """Recipes and demo models, one line each."""
    from quant.demo import DEMOS
    from quant.recipe import available

    recipes = {**available(), "auto": "The recipe or mix that measures best within --bits, tried on a few blocks of the model"}
    for title, rows in (("recipes", recipes), ("demo models", {f"demo:{n}": d.description for n, d in DEMOS.items()})):
        console.print(title, style="bold")
        for name, text in rows.items():
            console.print(f"  {name:24} {text}")


# what the file system may refuse without a fault of this program
USERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
main_group = Verbs(name="quantize", add_help_option=False)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 the user can fix it (one line on stderr), 130 interrupted; a bug is a traceback and 1."""
    try:
        main_group.main(args=None if args is None else list(args), prog_name="quantize", standalone_mode=False)
    except click.ClickException as error:
        # click's own messages may list choices over several lines
        print(f"quantize: {' '.join(error.format_message().split())}; see --help", file=sys.stderr)
        return 2
    except ValueError as error:
        if not error.args or "\n" in str(error):
            raise
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in USERS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"quantize: {error.strerror}{where}; free space or give another -o, then run the same command again",
            file=sys.stderr,
        )
        return 2
    except (KeyboardInterrupt, click.Abort) as error:
        print("; ".join(["quantize: stopped", *map(str, error.args)]), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
