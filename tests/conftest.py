"""Fixtures shared by the tests: tiny models and finished runs, made once per session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

# Read when torch is imported. The tensors here are tiny: waking a second thread costs more than its share of the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """`tiny.py` beside this file."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def llama(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a float Llama; not to be changed."""
    folder: Path = tiny.llama_folder(tmp_path_factory.mktemp("llama") / "float")
    return folder


@pytest.fixture(scope="session")
def packed(tiny: ModuleType, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """packed(recipe, tied=False): the folder that a run on the tiny Llama wrote; not to be changed."""
    import quant

    made: dict[tuple[str, bool], Path] = {}

    def folder(recipe: str, tied: bool = False) -> Path:
        if (recipe, tied) not in made:
            root = tmp_path_factory.mktemp("packed")
            source = tiny.llama_folder(root / "float", tied=True) if tied else llama
            quant.quantize(source, recipe, root / recipe, overrides=tiny.SMALL)
            made[recipe, tied] = root / recipe
        return made[recipe, tied]

    return folder


@pytest.fixture(scope="session")
def clips(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three clips with transcripts; not to be changed."""
    folder: Path = tiny.clips_folder(tmp_path_factory.mktemp("speech") / "clips")
    return folder


@pytest.fixture(scope="session")
def packed_speech(tiny: ModuleType, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper packed by dgq; not to be changed."""
    import quant

    root = tmp_path_factory.mktemp("whisper")
    quant.quantize(tiny.whisper_folder(root / "float"), "dgq", root / "packed", calib=str(clips), overrides=["head=null"])
    return root / "packed"
