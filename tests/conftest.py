"""Fixtures shared by the tests: tiny models and finished runs, made once per session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from html.parser import HTMLParser
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
            quant.quantize(source, recipe, root / recipe, overrides=tiny.small(recipe))
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


class Page(HTMLParser):
    """A page's text, whole and by kind of element; AssertionError where elements are not closed or anything is from outside."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.parts: dict[str, str] = {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe", "img", "image", "object", "embed", "base"}, tag
        for name, value in attrs:
            fetched = name.rpartition(":")[2] in {"src", "href", "srcset", "action", "data", "poster"}
            assert not fetched or str(value).startswith("#"), (tag, name, value)
            assert "url(" not in str(value).replace("url(#", ""), (tag, name, value)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        elif self.open:
            self.text += data
            self.parts[self.open[-1]] = self.parts.get(self.open[-1], "") + data


@pytest.fixture
def read_page() -> Callable[[Path], Page]:
    """The checked `Page` of a file."""
    return lambda path: Page(path.read_text(encoding="utf-8"))
