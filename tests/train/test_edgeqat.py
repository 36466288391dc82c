"""EdgeQAT's training: a model against itself, no gradient for the teacher, nearer maps, plain distillation beside it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import quant
from quant.calibrate import Sample
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.train.attention import Guided, Watch
from quant.train.attention_losses import mean_cosine
from quant.train.distill import Course, Rates, divergence, gradient, optimizer_of
from quant.train.folder import Student, open_student
from quant.train.processes import Processes

FEW = {"steps": 8, "windows": 2, "held": 2, "scales": 0.002, "vectors": 0.001}


def sample(seed: int = 0) -> Sample:
    return Sample({"input_ids": torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(seed))})


def recipe(folder: Path, passes: list[dict[str, Any]], activation: Any = "none") -> str:
    scheme = {"format": {"name": "int_group", "bits": 3, "group": 32}, "activation": activation}
    file = folder / f"{len(list(folder.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump({"name": "t", "description": "t", **scheme, "passes": [{"rtn": None}, *passes]}))
    return str(file)


def test_a_watched_model_computes_the_same_and_shows_its_maps(tiny: ModuleType) -> None:
    model = tiny.llama().float()
    wanted = model(**sample().inputs).logits
    watch = Watch(model)
    assert torch.allclose(model(**sample().inputs).logits, wanted, atol=1e-4)
    assert watch.maps == []
    with watch.open():
        model(**sample().inputs)
        assert [q.shape for q in watch.queries] == [(1, 4, 48, 16)] * 3
        assert [k.shape for k in watch.keys] == [(1, 2, 48, 16)] * 3
        rows = torch.stack(watch.maps)
        assert torch.allclose(rows.sum(-1), torch.ones(3, 1, 4, 48))
        assert not bool(rows.triu(1).any())
    assert watch.maps == []


def test_a_model_against_itself_costs_nothing_and_the_teacher_gets_no_gradient(tiny: ModuleType) -> None:
    teacher, student = tiny.llama().float(), tiny.llama().float()
    loss = Guided(teacher, student, 0.0, 1.0, "cosine")
    assert 0 <= float(loss(teacher, student, sample()).detach()) < 2e-3  # bfloat16 under autocast, where there is any
    other = tiny.llama(seed=1).float()
    Guided(teacher, other, 0.5, 1.0, "cosine")(teacher, other, sample()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(bool(layer.self_attn.q_proj.weight.grad.any()) for layer in other.model.layers)


@cache
def packed(folder: Path, llama: Path, small: tuple[str, ...]) -> tuple[Path, Any]:
    """A folder quantized to nearest, 3 bits, and its plan."""
    file = recipe(folder, [{"token_bits": None}], {"name": "adaptive_token"})
    quant.quantize(str(llama), file, folder / "packed", overrides=small)
    return folder / "packed", make_plan(str(llama), load_recipe(file, small))


@pytest.mark.parametrize(("form", "nearer"), [("cosine", True), ("published", False)])
def test_training_on_the_distribution_loss_moves_maps(
    form: Any, nearer: bool, llama: Path, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tokens are rounded by their tags while it trains."""
    folder, plan = packed(tmp_path_factory.getbasetemp(), llama, tuple(tiny.SMALL))
    student: Student = open_student(folder, plan, torch.device("cpu"), None)
    teacher = tiny.llama().float().requires_grad_(False)
    loss = Guided(teacher, student.model, 0.0, 1.0, form)

    @torch.no_grad()
    def cosine() -> float:
        student.refresh()
        with loss.teacher.open(), loss.student.open():
            divergence(teacher, student.model, sample())
            return float(mean_cosine(loss.student.maps, loss.teacher.maps))

    def only_maps(teacher: Any, model: Any, given: Sample) -> torch.Tensor:
        return loss(teacher, model, given) - divergence(teacher, model, given)

    before = cosine()
    optimizer = optimizer_of(student, Rates(scales=0.01, vectors=0.003))
    course = Course(steps=5, windows=1, objective=only_maps)
    for step in range(5):
        gradient(teacher, student, [sample()], course, step, Processes())
        optimizer.step()
    tags = student.model.model.layers[1].mlp.down_proj.tags
    assert 0 < int(tags.value.sum()) < 48
    assert (cosine() > before) is nearer


def test_without_its_losses_it_is_plain_distillation_and_with_them_not(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    found = []
    for passes in (
        {"distill": FEW},
        {"edgeqat": {**FEW, "entropy": 0, "distribution": 0}},
        {"edgeqat": {**FEW, "entropy": 0}},
        {"edgeqat": {**FEW, "steps": 0}},
    ):
        out = tmp_path / f"out-{len(found)}"
        quant.quantize(str(llama), recipe(tmp_path, [passes]), out, overrides=tiny.SMALL)
        (tuned,) = json.loads((out / "report.json").read_text())["tuned"]
        found.append(((out / "model.safetensors").read_bytes(), tuned["held_out_kl"], tuned["pass"]))
    plain, bare, whole, still = found
    assert plain[:2] == bare[:2]
    assert whole[0] != plain[0]
    assert whole[1][1] < whole[1][0]
    assert still[1][0] == pytest.approx(still[1][1])  # nothing was trained
    assert [kind for _, _, kind in found] == ["distill", "edgeqat", "edgeqat", "edgeqat"]
