"""A run that is killed goes on where it stopped and ends with the bytes of a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from quant.cli import main

FINAL = ("model.safetensors", "config.json", "recipe.yaml")
LAYERS = 6
STEP = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests themselves run in the background
from quant import workspace
from quant.cli import main

save = workspace.Workspace._save
def slow(self, tensors, name):  # so that a signal can hit any stage, also between two files of one block
    time.sleep(0.05)
    save(self, tensors, name)
    time.sleep(0.05)
workspace.Workspace._save = slow
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks."""
    folder: Path = tiny.llama_folder(tmp_path_factory.mktemp("resume") / "float", layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model: Path, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a run that was left alone."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(command(model, out, tiny)) == 0
    return {name: (out / name).read_bytes() for name in FINAL}


def command(model: Path, out: Path, tiny: ModuleType, recipe: str = "dgq") -> list[str]:
    sets = [part for override in tiny.SMALL for part in ("--set", override)]
    return [str(model), "--recipe", recipe, "-o", str(out), *sets]


def start(args: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own, ready to begin."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", STEP, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finished_blocks(out: Path) -> int:
    path = out.with_name(f"{out.name}.partial") / "progress.json"
    return len(json.loads(path.read_text())["reports"]) if path.exists() else 0


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `reached`, or the process ends, or five minutes are over."""
    deadline = time.monotonic() + 300
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reached()


def test_killed_three_times_it_ends_with_the_same_bytes(
    model: Path, tiny: ModuleType, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out, draw = tmp_path / "out", random.Random(5)
    for blocks in (1, 3, 4):
        process = start(command(model, out, tiny))
        wait_for(lambda: finished_blocks(out) >= blocks, process)  # noqa: B023
        time.sleep(draw.uniform(0, 0.4))  # a block takes about that long
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
    resumed = finished_blocks(out)
    assert 4 <= resumed <= LAYERS
    assert main(command(model, out, tiny)) == 0
    assert {name: (out / name).read_bytes() for name in FINAL} == undisturbed
    assert json.loads((out / "report.json").read_text())["totals"]["blocks_resumed"] == resumed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_keeps_finished_blocks_and_another_recipe_is_refused(
    model: Path, tiny: ModuleType, tmp_path: Path, undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = start(command(model, out, tiny))
    wait_for(lambda: finished_blocks(out) >= 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert len(said.splitlines()) == 1, said
    assert "finished blocks are kept" in said
    assert not out.exists()
    kept = finished_blocks(out)
    assert kept >= 2

    partial = tmp_path / "out.partial"
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    for other in (command(model, out, tiny, "qoq"), [*command(model, out, tiny), "--set", "seed=1"]):
        capfd.readouterr()
        assert main(other) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert "out.partial holds an unfinished run with another recipe" in line
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before

    # what a kill can leave of files that were being written
    (partial / f"block-{kept:05d}.safetensors").write_bytes(b"half")
    (partial / f"chain-{kept}-float.safetensors.tmp").write_bytes(b"half")
    (partial / "progress.tmp").write_bytes(b"{")
    (partial / "final").mkdir()
    (partial / "final" / "model.safetensors").write_bytes(b"half")
    assert main(command(model, out, tiny)) == 0
    assert {name: (out / name).read_bytes() for name in FINAL} == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_speech_goes_on_in_any_stack(
    tiny: ModuleType, clips: Path, packed_speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every single block of encoder and decoder, in turn."""
    from quant import workspace

    model, out = tiny.whisper_folder(tmp_path / "float"), tmp_path / "out"
    commit = workspace.Workspace.commit

    def once(self: workspace.Workspace, *args: object) -> None:
        commit(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace.Workspace, "commit", once)
    args = [str(model), "--recipe", "dgq", "--set", "head=null", "--calib", str(clips), "-o", str(out)]
    assert [main(args) for _ in range(4)] == [130] * 4
    assert main(args) == 0
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (packed_speech / name).read_bytes()


def test_a_second_run_into_the_same_folder_is_refused(
    model: Path, tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = start(command(model, out, tiny))
    try:
        wait_for(lambda: finished_blocks(out) >= 1, first)
        assert main(command(model, out, tiny)) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0
        assert "another run is writing" in said
    finally:
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert (out / "model.safetensors").exists()
