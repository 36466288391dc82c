"""Training by two processes under `accelerate launch` is training by one, up to the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from quant.train.processes import Processes

COMMAND = "import sys; from quant.cli import main; sys.exit(main())"


def run(start: list[str], model: Path, recipe: Path, out: Path, sets: list[str]) -> str:
    script = out.parent / "quantize.py"
    script.write_text(COMMAND)
    args = [str(script), str(model), "--recipe", str(recipe), "-o", str(out), *(f"--set={each}" for each in sets)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([*start, *args], env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_two_processes_train_as_one(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    options = {"steps": 6, "windows": 2, "held": 2, "scales": 0.01, "codes": 0.03, "tau": 0.05, "save_every": 4}
    text = {"name": "t", "description": "t", "format": {"name": "int_group", "bits": 3, "group": 32}, "activation": "none"}
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(text | {"passes": [{"rtn": None}, {"pv_tuning": options}]}))
    run([sys.executable], llama, file, tmp_path / "one", tiny.SMALL)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--main_process_port=0"]
    said = run(launch, llama, file, tmp_path / "two", tiny.SMALL)
    assert said.count("[6/6] step 6") == 1  # one of them speaks
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["tuned"][0] for name in ("one", "two"))
    assert two["looks"] == pytest.approx(one["looks"], rel=1e-3)
    assert two["codes_changed"] == pytest.approx(one["codes_changed"], rel=0.02)
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        if name.endswith("weight_packed"):
            assert float((value == found[1][name]).float().mean()) > 0.99, name
        else:
            assert torch.allclose(value.float(), found[1][name].float(), rtol=2e-2, atol=1e-4), name


def test_the_work_is_shared_without_a_rest() -> None:
    parts = [Processes(rank, 3).part(range(8)) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(8))
