"""`quantize --recipe auto --bits B`: the recipe that measures best within B stored bits per weight, tried on this model.

Candidates are the shipped recipes whose own format fits B and takes more than FEWEST of it, and, for those that multiply
unrounded activations by int_group weights, a mix of formats of at most B bits (quant/budget.py). Recipes that train take hours
to try, and are left out: what is chosen can be trained afterwards. Each is run for real, on little calibration data, on a few
blocks spread over the depth while the others stay in float, and the KL divergence of the whole model is measured on a
few windows or clips. Few blocks are a different part of what each candidate loses in all, so

    KL of the whole = KL measured / share,    share = predicted loss of the tried blocks / predicted loss of all

with predictions of quant/sensitivity.py for the candidate's formats, or for 4-bit groups of 64 where it has others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from quant import text
from quant.api import compile_folder
from quant.budget import within
from quant.eval import loading
from quant.eval.judge import Judge, SpeechJudge, TextJudge
from quant.eval.report import identity_of
from quant.kernels.format import Format, fit_group
from quant.kernels.formats.int_group import IntGroup
from quant.losses import Losses, free_families, predicted
from quant.models import resolve
from quant.plan import Plan, make_plan
from quant.recipe import Recipe, available, load_recipe
from quant.samples import data_identity, preprocessor
from quant.targets import families
from quant.wheels import cache_folder

FEWEST = 2 / 3  # no recipe makes up for a third of the bits
BLOCKS = 3  # of each stack that a trial quantizes
CALIBRATION = {"tokens": 8192, "clips": 8}  # of a trial
WINDOWS, CLIPS = 4, 6  # that a trial is measured on; windows as long as the calibration's

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One candidate: what it is called, its recipe, stored bits per weight, measured and extrapolated KL in nats per token."""

    name: str
    recipe: Recipe
    bits: float
    kl: float
    whole: float


def choose(given: str, bits: float | None, sets: Sequence[str], device: torch.device, say: Say) -> Recipe:
    """The recipe of the best candidate for the model `given`. sets: overrides of every candidate's recipe.

    `say` gets every trial and the reason of the choice. Raises ValueError (one line) where nothing fits into `bits`.
    """
    if bits is None:
        raise ValueError("recipe auto needs a budget; give --bits, for instance --bits 4.5")
    loading.require_next_token(resolve(given))
    plans = candidates(given, bits, sets, device, say)
    if not plans:
        raise ValueError(f"no recipe packs this model in {bits:g} bits per weight; give more --bits")
    losses = predicted([make_plan(given, load_recipe("gptq", sets))], device, say)[0]
    judge = small_judge(next(iter(plans.values())), device)
    say(f"trying {len(plans)} candidates on {BLOCKS} blocks of each stack; {judge.about}")
    trials: list[Trial] = []
    for name, plan in plans.items():
        try:
            kl = tried(plan, judge, device)
        except (ValueError, RuntimeError) as error:
            say(f"  {name}: {' '.join(str(error).split())}")
            continue
        found = Trial(name, plan.recipe, plan.bits_per_weight(), kl, kl / share(plan, losses))
        say(f"  {name}: {found.bits:.3f} bits, KL {found.kl:.5f} in the tried blocks, about {found.whole:.4f} in all")
        trials.append(found)
    if not trials:
        raise ValueError("every candidate failed; run one of them by name to see its error")
    best = min(trials, key=lambda trial: trial.whole)
    say(f"chosen: {best.name}, the least KL of {len(trials)} within {bits:g} bits")
    return best.recipe


def candidates(given: str, bits: float, sets: Sequence[str], device: torch.device, say: Say) -> dict[str, Plan]:
    """Plans by name: shipped recipes that fit into `bits`, and mixes of those that can be mixed."""
    fitting: dict[str, Plan] = {}
    mixable: dict[str, Plan] = {}
    trained = []
    for name in available():
        try:
            recipe = load_recipe(name, sets)
            if recipe.trains():
                trained.append(name)
                continue
            plan = make_plan(given, recipe)
        except ValueError as error:
            say(f"  {name} cannot be tried: {error}")
            continue
        if FEWEST * bits < plan.bits_per_weight() <= bits:
            fitting[name] = plan
        exact = all(target.activation.name == "none" for target in plan.targets.values())
        if exact and isinstance(recipe.base_format(), IntGroup) and free_families(plan):
            mixable[name] = plan
    if trained:
        say(f"not tried, since they train: {', '.join(trained)}")
    return fitting | mixes(mixable, bits, device, say)


def mixes(plans: dict[str, Plan], bits: float, device: torch.device, say: Say) -> dict[str, Plan]:
    """The plans with formats mixed to at most `bits`, by name; those that cannot be are told."""
    found = {}
    predicted(list(plans.values()), device, say)  # all in one backward pass; `within` then reads the cache
    for name, plan in plans.items():
        wanted = replace(plan, recipe=plan.recipe.model_copy(update={"bits": bits}))
        try:
            found[f"{name}:bits={bits:g}"] = within(wanted, device, lambda line, name=name: say(f"  {name}: {line}"))  # type: ignore[misc]
        except ValueError as error:
            say(f"  {name}:bits={bits:g} cannot be tried: {error}")
    return found


def tried_blocks(plan: Plan) -> tuple[str, ...]:
    """BLOCKS of each stack, evenly spread, by name with a dot behind."""
    spread = []
    for stack in plan.stacks:
        count = min(BLOCKS, len(stack.blocks))
        spread += [stack.blocks[(2 * i + 1) * len(stack.blocks) // (2 * count)] for i in range(count)]
    return tuple(f"{name}." for name in spread)


def tried(plan: Plan, judge: Judge, device: torch.device) -> float:
    """Mean KL, nats per token, of the model with a few blocks quantized; kept in the cache."""
    blocks = tried_blocks(plan)
    few = plan.recipe.model_copy(update={"calibration": plan.recipe.calibration.model_copy(update=CALIBRATION)})
    targets = {name: target for name, target in plan.targets.items() if name.startswith(blocks)}
    trial = replace(plan, recipe=few, selection=replace(plan.selection, targets=targets))
    key = identity_of([trial.identity(data_identity(trial)), list(blocks), judge.identity])
    cache = cache_folder() / "auto"
    file = cache / f"{key}.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache / key
        if not folder.exists():
            compile_folder(trial, folder, device)
        kl = judge.measure(folder, lambda done, total: None).kl_mean
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"kl_mean": kl}), encoding="utf-8")
        os.replace(temporary, file)
        shutil.rmtree(folder)
    return float(json.loads(file.read_text(encoding="utf-8"))["kl_mean"])


def share(plan: Plan, losses: Losses) -> float:
    """How much of what the plan is predicted to lose lies in the tried blocks."""
    blocks = tried_blocks(plan)
    inside = total = 0.0
    for family in families(plan.targets):
        known = losses.get(family[0].name)
        if known is not None:
            loss = known[closest(family[0].format, family[0].k, known)]
            total += loss
            inside += loss * family[0].name.startswith(blocks)
    return inside / total if total else 1.0


def closest(fmt: Format, k: int, known: dict[Format, float]) -> Format:
    """`fmt` where its loss is known, else 4-bit groups of 64 or what is known of them."""
    if fmt in known:
        return fmt
    return next(f for f in known if isinstance(f, IntGroup) and f.bits == 4 and f.group == fit_group(64, k))


def small_judge(plan: Plan, device: torch.device) -> Judge:
    """A few windows of the calibration text that no recipe is calibrated on, or a few of the calibration clips."""
    source, wanted = resolve(plan.given), plan.recipe.calibration
    if plan.speech:
        assert wanted.source is not None
        return SpeechJudge(source, wanted.source, CLIPS, "en", "float32", str(device))
    corpus = text.documents(wanted.source, "calibration")
    found = text.windows(preprocessor(plan, "AutoTokenizer"), corpus, wanted.length, None, plan.recipe.seed)
    return TextJudge(source, corpus.name, found.tokens[-WINDOWS:], "float32", str(device))
