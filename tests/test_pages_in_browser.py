"""Both pages in headless Chromium, where there is one: they render whole without a network."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from quant.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH; install one to open the pages in a browser")
@pytest.mark.parametrize("verb", ["inspect", "eval"])
def test_a_browser_shows_the_page(verb: str, packed: Callable[..., Path], tmp_path: Path) -> None:
    if verb == "eval":
        pytest.importorskip("matplotlib")
    folder, page = packed("dgq"), tmp_path / "page.html"
    options = {"inspect": [], "eval": ["--length", "64", "--limit", "2", "--samples", "1"]}
    assert main([verb, str(folder), *options[verb], "--html", str(page)]) == 0
    # what the browser made of it: the layout has put a script in, which the page does not have
    probe = (
        "<script>document.title = [...document.querySelectorAll('table, svg')].every(e => e.getBoundingClientRect().width > 50)"
    )
    page.write_text(page.read_text().replace("</body>", f"{probe}</script></body>"))
    command = [
        CHROMIUM,
        *(f"--{flag}" for flag in FLAGS),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout  # type: ignore[arg-type]
    assert "<title>true</title>" in shown
    assert shown.count("<table") == page.read_text().count("<table") > 1
