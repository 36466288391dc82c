"""`pack` of the export tests, and an interpreter that has vLLM, where LOWBIT_VLLM names one (`make test-vllm`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
VLLM_PYTHON = os.environ.get("LOWBIT_VLLM", "")
Engines = Callable[..., dict[str, Any]]


def beside(path: Path) -> Any:
    """A file of the tests as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack = beside(HERE.parent / "export" / "conftest.py").pack


def environment(**more: str) -> dict[str, str]:
    """For an eager vLLM on the cores that this process may use, its ranks dealt to them in turn."""
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[rank % len(cores)]) for rank in range(int(more.pop("ranks", "1"))))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bound, "OMP_NUM_THREADS": "1"}
    offline = {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    return {**os.environ, **settings, **offline, **more}


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """engines(runs, **environment): what `vllm_worker.py` answers, in one process unless the environment says otherwise."""

    def answer(runs: dict[str, Any], **more: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engines")
        (folder / "request.json").write_text(json.dumps({"runs": runs, "out": str(folder / "answers.json")}))
        command = [VLLM_PYTHON, str(HERE / "vllm_worker.py"), str(folder / "request.json")]
        here = environment(**{"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | more)
        done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
        (folder / "log").write_text(done.stdout + done.stderr)
        assert (folder / "answers.json").exists(), done.stderr[-4000:]
        found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
        return found

    return answer
