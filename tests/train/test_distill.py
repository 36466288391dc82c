"""Distillation gets closer to the teacher on text it did not train on, goes on after a kill, and changes no shape or name."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import quant
from quant.calibrate import Sample
from quant.models import index, read_header
from quant.passes.distill import Pass
from quant.train.distill import deviation_weights, divergence
from quant.train.schedule import share_of_rate

OPTIONS = {"steps": 12, "windows": 2, "held": 2, "scales": 0.01, "vectors": 0.003, "save_every": 4}
CODES = OPTIONS | {"codes": 0.1, "tau": 0.05, "looks": 4}


def recipe(folder: Path, kind: str, options: dict[str, object] | None, tuner: str = "distill") -> str:
    shipped = {
        "w3a16": ({"name": "int_group", "bits": 3, "group": 32}, "none", "rtn"),
        "w4a8": ({"name": "int4_dual", "group": 32}, {"name": "int8_token", "rotate": 32}, "dgq"),
        "nvfp4": ({"name": "fp4_block"}, "none", "fp4"),
    }
    fmt, activation, quantizer = shipped[kind]
    passes = [{quantizer: None}, *([] if options is None else [{tuner: options}])]
    text = yaml.safe_dump({"name": kind, "description": kind, "format": fmt, "activation": activation, "passes": passes})
    file = folder / f"{kind}-{tuner}-{options is not None}.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("tuner", ["distill", "pv_tuning"])
@pytest.mark.parametrize("kind", ["w3a16", "w4a8", "nvfp4"])
def test_it_gets_closer_and_keeps_the_layout(kind: str, tuner: str, llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    for options in (None, CODES if tuner == "pv_tuning" else OPTIONS):
        file = recipe(tmp_path, kind, options, tuner)
        quant.quantize(str(llama), file, tmp_path / str(options is None), overrides=tiny.SMALL)
    plain, trained = index(tmp_path / "True"), index(tmp_path / "False")
    assert {n: e[1:] for n, e in plain.items()} == {n: e[1:] for n, e in trained.items()}
    report = json.loads((tmp_path / "False" / "report.json").read_text())
    (tuned,) = report["tuned"]
    before, after = tuned["held_out_kl"]
    assert [before, after] == [tuned["looks"][0], min(tuned["looks"])]
    if kind == "w3a16":  # at 4 bits a random model has next to nothing to gain
        assert after < 0.9 * before
    assert (tuned["codes_changed"] > 0) == (tuner == "pv_tuning")
    assert tuned["steps_skipped"] == 0


def test_no_steps_change_no_byte(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    for given in (None, OPTIONS | {"steps": 0}):
        file = recipe(tmp_path, "w3a16", given)
        quant.quantize(str(llama), file, tmp_path / str(given is None), overrides=tiny.SMALL)
    plain, trained = (tmp_path / str(kind) / "model.safetensors" for kind in (True, False))
    assert plain.read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("options", [CODES | {"codes": 5.0, "tau": 1.0, "looks": 6}, CODES | {"scales": 3.0, "looks": 6}])
def test_a_harmful_rate_ends_where_it_began(options: dict[str, object], llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    for given in (None, options):
        file = recipe(tmp_path, "w3a16", given, "pv_tuning")
        quant.quantize(str(llama), file, tmp_path / str(given is None), overrides=tiny.SMALL)
    (tuned,) = json.loads((tmp_path / "False" / "report.json").read_text())["tuned"]
    assert tuned["steps_taken"] == 4  # two looks without a new best
    assert min(tuned["looks"][1:]) > tuned["looks"][0]
    plain, trained = (tmp_path / str(kind) / "model.safetensors" for kind in (True, False))
    assert plain.read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("tuner", ["distill", "pv_tuning"])
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    tuner: str, llama: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(tmp_path, "w3a16", CODES if tuner == "pv_tuning" else OPTIONS, tuner)
    quant.quantize(str(llama), file, tmp_path / "whole", overrides=tiny.SMALL)
    tune = Pass.tune

    def killed(self: Pass, *args: object) -> object:
        def stop(done: int, total: int, loss: float) -> None:
            if done == 6:
                raise KeyboardInterrupt

        return tune(self, *args[:4], stop, args[5])

    monkeypatch.setattr(Pass, "tune", killed)
    with pytest.raises(KeyboardInterrupt):
        quant.quantize(str(llama), file, tmp_path / "out", overrides=tiny.SMALL)
    (state,) = (tmp_path / "out.partial").glob("tuned-0/step-*.safetensors")
    assert state.name == "step-4.safetensors"
    assert any(name.startswith("memory.") for name in read_header(state))
    monkeypatch.setattr(Pass, "tune", tune)
    quant.quantize(str(llama), file, tmp_path / "out", overrides=tiny.SMALL)
    whole, out = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()


def test_a_model_does_not_differ_from_itself(tiny: ModuleType) -> None:
    teacher, student = tiny.llama(), tiny.llama().float()
    sample = Sample({"input_ids": torch.arange(48).view(1, -1)})
    alone, other = divergence(teacher, student, sample), divergence(teacher, tiny.llama(seed=1).float(), sample)
    assert 0 <= float(alone.detach()) < 1e-3  # bfloat16 against bfloat16 under autocast
    assert float(other.detach()) > 100 * float(alone.detach())


def test_deviation_weights_have_mean_one_and_follow_the_entropy() -> None:
    wanted = torch.log_softmax(torch.randn(3, 7, 50) * torch.linspace(0, 8, 7).view(1, 7, 1), -1)
    weights = torch.rand(3, 7)
    entropy = -(wanted.exp() * wanted).sum(-1)
    for lam, gamma in ((0.5, 1.0), (1.0, 2.0), (0.3, 0.5)):
        omega = deviation_weights(wanted, weights, lam, gamma)
        assert float((omega * weights).sum() / weights.sum()) == pytest.approx(1, abs=1e-5)
        assert torch.equal(omega.flatten().argsort(), entropy.flatten().argsort())
        assert float(omega.min()) >= 1 - lam
    sure = torch.log(torch.eye(4).unsqueeze(0).clamp_min(1e-45))  # one-hot: no entropy, no NaN
    assert torch.allclose(deviation_weights(sure, torch.ones(1, 4), 1.0, 1.0), torch.ones(1, 4))


def test_deviation_without_lam_or_gamma_is_plain_distillation(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a student that equals its teacher gets no gradient, whatever the weights."""
    teacher, student = tiny.llama().float(), tiny.llama(seed=1).float()
    sample = Sample({"input_ids": torch.randint(0, 320, (1, 48), generator=torch.Generator().manual_seed(1))})
    losses = {}
    for lam, gamma in ((0.0, 1.0), (0.7, 0.0), (0.7, 1.0)):
        student.zero_grad()
        loss = divergence(teacher, student, sample, lam, gamma)
        loss.backward()
        losses[lam, gamma] = float(loss.detach()), student.model.layers[0].mlp.up_proj.weight.grad.clone()
    plain, flat, aware = losses.values()
    assert flat[0] == plain[0]
    assert torch.equal(flat[1], plain[1])
    assert aware[0] != plain[0]
    assert not torch.equal(aware[1], plain[1])
    monkeypatch.setattr("quant.train.distill.compute_dtype", lambda device: torch.float32)  # both alike
    student.zero_grad()
    divergence(student, student, sample, 0.7, 1.0).backward()
    assert float(student.model.layers[0].mlp.up_proj.weight.grad.abs().max()) < 1e-5 * float(aware[1].abs().max())


def test_rates_rise_and_fall_to_nothing() -> None:
    shares = [share_of_rate(step, 100) for step in range(100)]
    assert max(shares) == shares[4]
    assert shares[:5] == sorted(shares[:5])
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[-1] < 1e-3


def test_too_little_text_is_one_line(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.SENTENCE * 20)
    sets = [*tiny.SMALL, f"calibration.source={tmp_path / 'text.txt'}"]
    with pytest.raises(ValueError, match="distill keeps 50 samples to measure on"):
        quant.quantize(str(llama), recipe(tmp_path, "w3a16", {"held": 50}), tmp_path / "out", overrides=sets)


def test_a_speech_model_is_trained_on_its_clips(clips: Path, tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.whisper_folder(tmp_path / "float")
    options = {"steps": 6, "windows": 1, "held": 1, "scales": 0.01}
    out = tmp_path / "out"
    quant.quantize(str(model), recipe(tmp_path, "w3a16", options), out, calib=str(clips), overrides=["head=null"])
    (tuned,) = json.loads((out / "report.json").read_text())["tuned"]
    assert tuned["steps"] == 6
    assert all(0 < kl < 10 for kl in tuned["held_out_kl"])
    assert "before training" in (out / "README.md").read_text()
