"""The predicted loss is the loss that a small error of a layer really causes, in every kind of layer and of model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from quant.calibrate import catch
from quant.plan import Plan, make_plan
from quant.recipe import load_recipe
from quant.resources import compute_dtype
from quant.samples import make_samples
from quant.sensitivity import Feeling, feelings

CPU = torch.device("cpu")


def felt(plan: Plan) -> dict[str, Feeling]:
    found: dict[str, Feeling] = {}
    for block in feelings(plan, make_samples(plan, CPU)[0], 10_000, CPU, lambda done, total: None):
        found |= block
    return found


@pytest.fixture(scope="module")
def plan(llama: Path, tiny: ModuleType) -> Plan:
    sets = ["calibration.tokens=4096", "calibration.length=64", "calibration.source=manual"]
    return make_plan(str(llama), load_recipe("gptq", sets))


@torch.no_grad()
@pytest.mark.parametrize("quiet", [False, True], ids=["anywhere", "where inputs are weak"])
def test_it_predicts_the_divergence_of_a_small_error(quiet: bool, plan: Plan, llama: Path) -> None:
    """Quantizers that know the inputs leave errors of the second sort."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids = torch.cat([sample.inputs["input_ids"] for sample in make_samples(plan, CPU)[0]])
    reference = torch.log_softmax(model(ids).logits, -1)
    draw = torch.Generator().manual_seed(0)
    predicted, true = [], []
    found = felt(plan)
    assert found.keys() == plan.targets.keys()
    for name, feeling in found.items():
        weight = model.get_submodule(name).weight
        kept = weight.clone()
        # rows of very different size, so that a wrong weighting of rows shows
        error = torch.randn(kept.shape, generator=draw) * torch.rand(len(kept), 1, generator=draw) ** 4 * 8
        if quiet:
            energy, axes = torch.linalg.eigh(feeling.gram)
            error = error @ (axes * (energy + 0.01 * energy.mean()).rsqrt()) @ axes.T
        error *= 0.02 * kept.norm() / error.norm()
        weight += error
        got = torch.log_softmax(model(ids).logits, -1)
        weight.copy_(kept)
        true.append(float((reference.exp() * (reference - got)).sum(-1).mean()))
        predicted.append(feeling.divergence(error))
    ratio = np.log(np.array(predicted) / np.array(true))
    assert np.abs(ratio).max() < np.log(2)  # tokens taken one by one would put v_proj 5 times too low
    assert abs(ratio.mean()) < np.log(1.2)
    assert np.corrcoef(np.log(predicted), np.log(true))[0, 1] > 0.9


def test_the_gram_matrix_is_that_of_the_inputs(plan: Plan, llama: Path) -> None:
    """Of the first block's attention: the norm's output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=compute_dtype(torch.device("cpu"))).eval()
    samples = make_samples(plan, CPU)[0]
    with torch.no_grad():
        chain = catch(model, plan.stacks, 0, samples, [])
        rows = torch.cat([model.model.layers[0].input_layernorm(hidden)[0] for hidden in chain.hidden]).float()
    wanted = rows.T @ rows / len(rows)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        gram = felt(plan)[f"model.layers.0.self_attn.{leaf}"].gram
        assert (gram - wanted).norm() / wanted.norm() < 1e-3


def test_an_encoder_is_felt_through_the_decoder(tiny: ModuleType, clips: Path, tmp_path: Path) -> None:
    source = tiny.whisper_folder(tmp_path / "whisper")
    plan = make_plan(str(source), load_recipe("gptq", [f"calibration.source={clips}"]))
    found = felt(plan)
    assert found.keys() == plan.targets.keys()
    for name, feeling in found.items():
        assert feeling.grads.isfinite().all(), name
        assert float(feeling.grads.norm()) > 0, name
