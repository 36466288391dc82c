"""The shape of the project: imports go one way, the links and the folders are what packaging and transformers expect."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "quant", "eval")
FILES = sorted(
    path
    for folder in FOLDERS
    for top, _, names in os.walk(ROOT / folder)  # does not follow the links inside quant/
    for path in (Path(top) / name for name in names)
    if path.suffix == ".py"
)


def name_of(path: Path) -> str:
    """Relative path, for test ids."""
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, as an absolute name; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which differs between kernels/ and quant/kernels/"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_files_were_found() -> None:
    names = {name_of(path) for path in FILES}
    assert {"quant/cli.py", "quant/passes/dgq.py", "kernels/formats/int4_dual.py", "eval/perplexity.py"} <= names
    assert not any(name.startswith(("quant/kernels/", "quant/eval/")) for name in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    """kernels < quant < eval; and the tops are never imported under their folder names, which would load them twice."""
    layer = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        assert not inside(module, "kernels"), module
        assert not inside(module, "eval"), module
        assert not inside(module, "tests"), module
        if layer == "kernels" and inside(module, "quant"):
            assert module == "quant" or inside(module, "quant.kernels"), f"a kernel must not know {module}"
        if layer == "quant":
            assert not inside(module, "quant.eval"), f"the compiler must not know {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:  # an empty __init__.py has nothing to say
        assert ast.get_docstring(tree)


def test_verbs_are_the_only_way_from_the_command_to_the_evaluation() -> None:
    from quant.cli import VERBS

    assert {"eval", "bench", "inspect"} <= set(VERBS)
    for target in VERBS.values():
        module, _, name = target.partition(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert name in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", ["kernels", "eval", "recipes"])
def test_links(name: str) -> None:
    link = ROOT / "quant" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", ["kernels", "eval", "recipes", "tests"])
def test_no_regular_package_beside_quant(name: str) -> None:
    """`kernels/__init__.py` would shadow Hugging Face's package of that name for everyone who works in the checkout."""
    assert not (ROOT / name / "__init__.py").exists()


def test_nothing_speaks_of_the_machine_it_was_made_on() -> None:
    told = [name_of(path) for path in FILES if "/work/" in path.read_text() or "../shared" in path.read_text()]
    assert told == []


def test_transformers_works_in_the_checkout_and_each_layer_alone() -> None:
    """One interpreter in the repository root: a foreign import, then the kernels, which pull in nothing above them."""
    code = """
import sys
import transformers.models.llama
import transformers.modeling_utils
import quant.kernels.dispatch
quant.kernels.dispatch.load_all()
above = [name for name in sys.modules if name.startswith("quant.")]
above = [name for name in above if not name.startswith(("quant.kernels", "quant.serve"))]
print(sorted(above))
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # the serving adapter registers itself as transformers is there already; it needs these
    allowed = {
        "quant.checkpoint",
        "quant.embedding",
        "quant.experts",
        "quant.grid",
        "quant.linear",
        "quant.models",
        "quant.naming",
        "quant.stacks",
        "quant.targets",
        "quant.recipe",
        "quant.rounding",
        "quant.search",
        "quant.siblings",
        "quant.stats",
        "quant.train",
        "quant.train.pace",
    }
    found = ast.literal_eval(done.stdout)
    assert {name for name in found if not name.startswith("quant.passes")} <= allowed
