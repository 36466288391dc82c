"""Compiled graphs on disk: made once per kind of model and machine, found again by a hash of everything they depend on.

A graph holds no weights: checkpoints of the same shapes and formats share it. It is machine code, so it lies in the user's
own cache folder (LOWBIT_CACHE, else ~/.cache/lowbit) and is never read from a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels.cpu.build import FOLDER, LIBRARY
from quant.runtime import shims
from quant.runtime.linears import constants

compilations = 0  # graphs compiled by this process

Say = Callable[[str], None]


def folder() -> Path:
    """Where compiled graphs are kept; made if needed, readable by its owner only."""
    chosen = os.environ.get("LOWBIT_CACHE")
    path = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


@cache
def environment() -> dict[str, str]:
    """What compiled code depends on besides the model: versions, processor, our own sources."""
    import transformers

    sources = hashlib.sha256()
    package, kernels = Path(__file__).parent, FOLDER.parent
    for path in (*sorted(package.glob("*.py")), package / shims.HEADER, *sorted(kernels.glob("*.py")), FOLDER / LIBRARY):
        sources.update(path.read_bytes())
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": processor(),
        "sources": sources.hexdigest(),
    }


def processor() -> str:
    """The instruction sets of this machine."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line for line in info.read_text().splitlines() if line.startswith(("flags", "Features")))
        return platform.machine() + next(lines, "").partition(":")[2]
    return platform.machine() + platform.processor() + torch.backends.cpu.get_cpu_capability()


def key(module: nn.Module, about: dict[str, Any]) -> str:
    """Hash of the module's structure with every layer's format, of `about`, and of the environment."""
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in constants(module)]
    text = json.dumps([str(module), shapes, about, environment()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Graph:
    """One compiled graph with the tensors of a model: `graph([tensor, ...])` -> tensors. The tensors stay the model's."""

    def __init__(self, path: Path, module: nn.Module) -> None:
        shims.publish()
        # not through aoti_load_package, which compiles test programs to compare processors: the file's name says that already
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        held = dict(constants(module))
        self._held = {name: held[name] for name in self._loader.get_constant_fqns()}  # the graph keeps bare pointers
        self._loader.load_constants(self._held, False, True, True)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self._loader.run(inputs)
        return outputs


def get(
    name: str, module: nn.Module, about: dict[str, Any], inputs: Sequence[Any], dynamic: Any, say: Say | None
) -> Graph | None:
    """The graph of `module(*inputs)`, from the cache or, when `say` is given, compiled and cached.

    name: part of the file's name. about: what fixes the graph besides the module, for the key. dynamic: as `dynamic_shapes`
    of torch.export. None where it is not cached and `say` is None.
    """
    path = folder() / f"{name}-{key(module, about | {'name': name})}.pt2"
    if not path.exists():
        if say is None:
            return None
        start = time.perf_counter()
        compile_to(path, module, inputs, dynamic)
        say(f"compiled the {name} in {time.perf_counter() - start:.0f} s, kept in {path}")
    return Graph(path, module)


def compile_to(path: Path, module: nn.Module, inputs: Sequence[Any], dynamic: Any) -> None:
    """Export, compile, and put the result into place in one step."""
    global compilations
    from torch._inductor import aoti_compile_and_package

    options = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.custom_ops_to_c_shims": shims.table(),
        "cpp.dynamic_threads": True,  # one artifact for any number of threads
        "emulate_precision_casts": True,  # round to bfloat16 where eager layers do, so that both choose the same tokens
    }
    compilations += 1
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytrees
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=dynamic, strict=False)
        made = aoti_compile_and_package(program, package_path=str(Path(scratch) / "graph.pt2"), inductor_configs=options)
        os.replace(made, path)
