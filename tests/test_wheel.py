"""The wheel: it holds everything, and what is installed from it works outside the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def call(*args: object, cwd: Path, timeout: int = 600) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name the checkout
    command = [str(arg) for arg in args]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout so that no build folder is left in it."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools, which builds the wheel")
    place = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    if not any(listed):
        pytest.skip("needs a git checkout")
    for name in filter(None, listed):
        target = place / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", place]
    call(*build, cwd=place / "source")
    (made,) = place.glob("lowbit-*.whl")
    return made


def test_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    tracked = [path.relative_to(ROOT) for folder in ("quant", "kernels", "eval") for path in (ROOT / folder).rglob("*.py")]
    tracked = [
        path for path in tracked if path.parts[:2] not in (("quant", "kernels"), ("quant", "eval"), ("quant", "recipes"))
    ]
    for path in tracked:
        inside = path if path.parts[0] == "quant" else Path("quant") / path
        assert str(inside) in names, f"{path} is not in the wheel"
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"quant/recipes/{recipe.name}" in names
    for table in (ROOT / "kernels" / "gpu").rglob("*.json"):
        assert f"quant/kernels/gpu/{table.name}" in names
    for page in (ROOT / "quant" / "pages").iterdir():
        assert f"quant/pages/{page.name}" in names
    assert "quant/py.typed" in names
    assert any(name.startswith("quant/kernels/cpu/csrc/") and name.endswith(".cpp") for name in names)
    if shutil.which("g++") or shutil.which("c++"):
        assert "quant/kernels/cpu/csrc/_lowbit_cpu.so" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"quant"}  # no top-level kernels, eval or tests
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert "any" not in wheel.name.split("-")[4]  # it holds a library of this platform


def test_installed_it_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel, cwd=tmp_path)
    # the dependencies are those of the running interpreter
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    listed = call(tmp_path / "venv" / "bin" / "quantize", "--list", cwd=tmp_path)
    assert all(recipe.stem in listed for recipe in (ROOT / "recipes").glob("*.yaml"))
    code = """
import quant, torch
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.dispatch import MatmulSpec, choose, load_all
from quant.kernels.formats.int4_dual import Int4Dual
from quant.linear import PackedLinear
from quant.recipe import available, load_recipe
import quant.eval.perplexity

assert len(load_all()) > 3
for name in available():
    load_recipe(name)
fmt = Int4Dual(group=32)
fields = fmt.pack(fmt.nearest(torch.randn(32, 64)))
layer = PackedLinear.from_fields(fields, fmt, Int8Token(), 32, 64, None)
x = torch.randn(3, 64)
error = (layer(x) - x @ layer.weight.T).norm() / (x @ layer.weight.T).norm()
assert error < 0.02, error
print(layer.kernel.name)
print(quant.__file__)
"""
    kernel, file = call(python, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert not Path(file).is_relative_to(ROOT)
    if shutil.which("g++") or shutil.which("c++"):
        assert kernel != "reference"  # the library that came in the wheel was found
