"""Masked-diffusion models: masks are stratified and reproducible, weigh what they should, and are the same for both sides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import quant
from quant.cli import main
from quant.eval import masked as scoring
from quant.eval.divergence import cross_entropy
from quant.eval.loading import kind, load
from quant.masked import Masking, counts, masked_samples, masking, masking_for, positions
from quant.plan import make_plan
from quant.recipe import Calibration, available, load_recipe
from quant.samples import make_samples
from quant.stats import InputStats
from quant.text import documents, windows

CPU = torch.device("cpu")
NO_HEAD = "head=null"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model; not to be changed."""
    folder: Path = tiny.diffusion_folder(tmp_path_factory.mktemp("diffusion") / "float")
    return folder


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 300, (3, 40), generator=generator(1))


@pytest.mark.parametrize("draws", [1, 3, 16, 100])
@pytest.mark.parametrize("length", [2, 17, 512])
def test_each_stratum_of_mask_counts_is_drawn_once(draws: int, length: int) -> None:
    found = counts(draws, length, generator())
    assert found == counts(draws, length, generator())
    assert all(1 <= count <= length for count in found)
    for stratum, count in enumerate(sorted(found)):
        assert math.floor(stratum * length / draws) < count <= math.ceil((stratum + 1) * length / draws)
    for count in found:
        assert int(positions(length, count, generator()).sum()) == count


def test_calibration_masks_three_quarters_of_the_windows_and_weighs_the_rest_less() -> None:
    rows = torch.randint(0, 300, (16, 64), generator=generator(2))
    samples, line = masked_samples(rows, Masking(319), Calibration(visible_weight=0.25), 5, CPU)
    again, _ = masked_samples(rows, Masking(319), Calibration(visible_weight=0.25), 5, CPU)
    other, _ = masked_samples(rows, Masking(319), Calibration(visible_weight=0.25), 6, CPU)
    found = [sample.inputs["input_ids"][0] for sample in samples]
    assert all(torch.equal(a, b.inputs["input_ids"][0]) for a, b in zip(found, again, strict=True))
    assert not all(torch.equal(a, b.inputs["input_ids"][0]) for a, b in zip(found, other, strict=True))
    assert sum(bool((row == 319).any()) for row in found) == 12
    for sample, row, given in zip(samples, found, rows, strict=True):
        assert sample.predicted is not None
        assert torch.equal(sample.predicted, row == 319)
        assert torch.equal(row[row != 319], given[row != 319])
        assert torch.equal(sample.masks[64][0], torch.where(row == 319, 1.0, 0.25))
    assert "12 of them with" in line
    assert "token 319" in line


@pytest.mark.parametrize("drift", [False, True])
def test_statistics_are_weighted_sums(drift: bool) -> None:
    x, x_float = torch.randn(2, 30, 12), torch.randn(2, 30, 12)
    weights = torch.rand(2, 30)
    weights[0, :7] = 0.0
    x[0, :7], x_float[0, :7] = 1e9, 1e9
    stats = InputStats.empty(12, CPU, drift)
    stats.add(x, x_float if drift else None, weights)
    stats.finish()
    kept = weights > 0
    rows, w = x[kept].double(), weights[kept].double().unsqueeze(1)
    assert stats.tokens == 53
    assert torch.equal(stats.absmax, x[kept].abs().amax(0))
    assert float((stats.gram.double() - (w * rows).T @ rows).norm()) <= 1e-5 * float(stats.gram.double().norm())
    if drift:
        assert stats.drift is not None
        wanted = (x_float[kept].double() - rows).T @ (w * rows)
        assert float((stats.drift.double() - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_a_model_is_recognized_by_attention_to_both_sides_and_a_mask_token() -> None:
    assert masking({"is_causal": False, "mask_token_id": 7}) == Masking(7)
    for config in ({}, {"mask_token_id": 7}, {"is_causal": True, "mask_token_id": 7}, {"is_causal": False}):
        assert masking(config) is None
    both = {"is_causal": False}
    assert masking_for(both, Calibration(mask_token=5), 10) == (Masking(5), "")
    assert masking_for(both | {"mask_token_id": 7}, Calibration(mask_token=5), 10) == (Masking(5), "")
    assert masking_for({}, Calibration(), 10) == (None, "")
    assert masking_for({}, Calibration(mask_token="none"), 10) == (None, "")
    unmasked, note = masking_for(both, Calibration(), 10)
    assert unmasked is None
    assert "without masks" in note
    unmasked, note = masking_for(both | {"mask_token_id": 7}, Calibration(mask_token="none"), 10)
    assert unmasked is None
    assert "without masks" in note
    for config, wanted in ((both, 10), (both, -1), ({}, 5)):
        with pytest.raises(ValueError, match=r"mask.token"):
            masking_for(config, Calibration(mask_token=wanted), 10)


def test_the_model_of_a_folder_attends_to_both_sides_also_packed(toy: Path, tmp_path: Path, tiny: ModuleType) -> None:
    packed = quant.quantize(toy, "rtn", tmp_path / "packed", overrides=tiny.SMALL)
    ids = torch.randint(1, 300, (1, 20), generator=generator())
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 300
    with torch.inference_mode():
        assert not torch.equal(packed(input_ids=ids).logits[0, 0], packed(input_ids=changed).logits[0, 0])


@pytest.mark.parametrize("recipe", sorted(available()))
def test_every_recipe_goes_through_and_says_what_was_masked(
    recipe: str, toy: Path, tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [part for override in tiny.small(recipe) for part in ("--set", override)]
    done = main([str(toy), "--recipe", recipe, "-o", str(tmp_path / "out"), *sets])
    if recipe == "edgeqat-w4a4":
        assert done == 2
        assert "its attention is not causal" in capfd.readouterr().err
        return
    assert done == 0
    line = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]
    assert "6 of them with" in line
    assert f"token {tiny.MASK}" in line
    assert kind(tmp_path / "out") == "masked"
    ids = torch.randint(1, 300, (2, 32), generator=generator())
    result = scoring.evaluate(quant.load(tmp_path / "out", dtype=torch.float32, compile=False), ids, Masking(tiny.MASK))
    assert math.isfinite(result.bound)


def test_text_without_masks_is_said_before_and_after(
    toy: Path, tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [part for override in [*tiny.SMALL, "calibration.mask_token=none"] for part in ("--set", override)]
    assert main([str(toy), "--recipe", "rtn", "-o", str(tmp_path / "out"), *sets]) == 0
    assert "calibrated on text without masks" in capfd.readouterr().out
    assert "none masked" in json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]
    assert main([str(toy), "--recipe", "rtn", "--plan", *sets[:-2]]) == 0
    assert f"masked by token {tiny.MASK}" in " ".join(capfd.readouterr().out.split())


def test_the_recipe_may_name_the_mask_token(tiny: ModuleType, tmp_path: Path) -> None:
    source = tiny.diffusion_folder(tmp_path / "float", mask_token_id=None)
    with pytest.raises(ValueError, match="names no mask token"):
        kind(source)
    quant.quantize(source, "rtn", tmp_path / "out", overrides=[*tiny.SMALL, "calibration.mask_token=317"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mask_token_id"] == 317
    plan = make_plan(str(source), load_recipe("rtn", [*tiny.SMALL, "calibration.mask_token=317"]))
    samples, _ = make_samples(plan, CPU)
    assert any((sample.inputs["input_ids"] == 317).any() for sample in samples)


def test_the_embedding_of_the_mask_token_stays_exact(toy: Path, tiny: ModuleType, tmp_path: Path) -> None:
    source = tiny.diffusion_folder(tmp_path / "float", tied=True)
    sets = [override for override in tiny.SMALL if override != NO_HEAD]
    plan = make_plan(str(source), load_recipe("gptq", sets))
    assert plan.selection.head is None
    assert "mask token" in plan.note
    with pytest.raises(ValueError, match="mask token 319 must stay exact"):
        make_plan(str(source), load_recipe("gptq", [*sets, "head=8"]))
    untied = make_plan(str(toy), load_recipe("gptq", sets))
    assert untied.selection.head is not None
    assert untied.selection.head.table == "lm_head"


def test_the_bound_is_the_mean_of_masked_cross_entropies(tiny: ModuleType, ids: torch.Tensor) -> None:
    model = tiny.diffusion().float()
    result = scoring.evaluate(model, ids, Masking(tiny.MASK), seed=3)
    wanted = []
    with torch.inference_mode():
        for row, (drawn, _) in zip(ids, scoring.masks(3, 40, 3), strict=True):
            for where in drawn:
                logits = model(input_ids=row.masked_fill(where, tiny.MASK).unsqueeze(0)).logits[0]
                wanted.append(float(cross_entropy(logits[where], row[where]).mean()))
    assert len(wanted) == 3 * scoring.DRAWS
    assert result.bound == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert result.fidelity == {}
    assert result.reference_bound is None


def test_a_model_equals_itself_under_the_same_masks(tiny: ModuleType, ids: torch.Tensor) -> None:
    model, other = tiny.diffusion().float(), tiny.diffusion(seed=1).float()
    same = scoring.evaluate(model, ids, Masking(tiny.MASK), tiny.diffusion().float())
    assert same.difference == 0.0
    assert same.reference_bound == same.bound
    assert list(same.fidelity) == ["0.25", "0.5", "0.75", "0.95"]
    for share, one in same.fidelity.items():
        assert one.kl_max == 0.0
        assert one.top1 == 1.0
        assert one.tokens == 3 * round(float(share) * 40)
    apart = scoring.evaluate(model, ids, Masking(tiny.MASK), other)
    assert apart.bound == same.bound  # the reference changes no mask
    assert all(one.kl_mean > 0 for one in apart.fidelity.values())


def test_eval_reports_the_bound_in_place_of_perplexity(
    toy: Path, tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quant.quantize(toy, "rtn", tmp_path / "out", overrides=tiny.SMALL)
    args = ["eval", str(tmp_path / "out"), "--text", "manual", "--length", "64", "--limit", "2"]
    assert main([*args, "--json", str(tmp_path / "found.json")]) == 0
    out = capfd.readouterr().out
    assert "bound of -log p" in out
    assert "perplexity" not in out
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert found["text"] is None
    assert found["masked"]["mask_token"] == tiny.MASK
    assert set(found["masked"]["fidelity"]) == {"0.25", "0.5", "0.75", "0.95"}
    for verb in ("run", "bench"):
        given = ["a prompt"] if verb == "run" else []
        assert main([verb, str(tmp_path / "out"), *given]) == 2
        assert "does not write token after token" in capfd.readouterr().err
    assert main([*args, "--tasks", "arc_easy"]) == 2
    assert "--tasks does not apply" in capfd.readouterr().err


def test_a_bidirectional_model_without_a_mask_token_has_no_perplexity(
    tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.diffusion_folder(tmp_path / "float", mask_token_id=None)
    assert main(["eval", str(folder), "--text", "manual", "--length", "64", "--limit", "1"]) == 2
    assert "write mask_token_id into its config.json" in capfd.readouterr().err


def test_sensitivities_are_of_predictions_under_masks(toy: Path, tiny: ModuleType) -> None:
    """A budget of bits works, and is measured at masked positions only."""
    from quant.sensitivity import feelings

    plan = make_plan(str(toy), load_recipe("gptq", tiny.SMALL))
    samples, _ = make_samples(plan, CPU)
    seen = [one for block in feelings(plan, samples, 64, CPU, lambda done, total: None) for one in block.values()]
    assert len(seen) == len(plan.targets)
    assert all(one.grads.isfinite().all() and float(one.grads.norm()) > 0 for one in seen)


@pytest.fixture(scope="module")
def trained(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy after some seconds of training; not to be changed."""
    folder: Path = tiny.diffusion_folder(tmp_path_factory.mktemp("trained") / "float", steps=200)
    return folder


@pytest.mark.filterwarnings("ignore:calibrated on text without masks")
@pytest.mark.parametrize(("recipe", "more"), [("gptq", ["format.bits=3"]), ("dgq", [])])
def test_masked_calibration_is_closer_at_masked_positions(
    recipe: str, more: list[str], trained: Path, tiny: ModuleType, tmp_path: Path
) -> None:
    ids = windows(tiny.tokenizer(), documents("manual", "evaluation"), 64, 24, seed=1).tokens
    kl = {}
    for mask in ("none", "null"):
        sets = ["calibration.tokens=8192", "calibration.length=64", NO_HEAD, f"calibration.mask_token={mask}", *more]
        quant.quantize(trained, recipe, tmp_path / mask, calib="manual", overrides=sets)
        model = quant.load(tmp_path / mask, dtype=torch.float32, compile=False)
        found = scoring.evaluate(model, ids, Masking(tiny.MASK), load(trained, torch.float32, "cpu")).fidelity
        kl[mask] = [one.kl_mean for one in found.values()]
    assert sum(kl["null"]) < 0.9 * sum(kl["none"]), kl


def test_layers_of_one_weight_in_two_places_are_refused(tiny: ModuleType, tmp_path: Path) -> None:
    folder = tiny.block_diffusion_folder(tmp_path / "gemma")
    with pytest.raises(ValueError, match=r"^DiffusionGemmaForBlockDiffusion runs blocks twice with one set of weights"):
        make_plan(str(folder), load_recipe("rtn", [NO_HEAD]))
