"""Compiles the C++ kernels into one shared library beside their sources: `python kernels/cpu/build.py`.

Called by setup.py, where neither torch nor this package is importable, so it uses the standard library only. Each
source is compiled with its own instruction set flags and the code that runs is chosen on the user's machine, so a
library built anywhere serves every processor of that architecture. OpenMP symbols are left undefined on purpose: they
are found in the libgomp that torch has already made global, so both always share one thread pool, whatever that
library's file is called in a given torch build.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = "_lowbit_cpu.so"
REASON = "_lowbit_cpu.txt"  # why there is no library, read by the loader
FOLDER = Path(__file__).resolve().parent / "csrc"  # below the wrappers: a walk over their modules must not meet a .so
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall")

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
SOURCES: dict[str, tuple[str, ...]] = {"lowbit.cpp": (), "portable.cpp": (), "attention_portable.cpp": ()}
SOURCES |= {"pointwise_portable.cpp": (), "nearest_portable.cpp": (), "rounding_portable.cpp": ()}
BF16 = (*AVX512, "-mavx512bf16")
AMX = (*BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
X86_SOURCES = {"avx2.cpp": AVX2, "avx512.cpp": AVX512, "avx512float.cpp": AVX512, "avx512bf16.cpp": BF16, "amx.cpp": AMX}
X86_SOURCES["avx512vbmi.cpp"] = (*AVX512, "-mavx512vbmi")
X86_SOURCES["attention_avx2.cpp"] = AVX2
X86_SOURCES |= {"pointwise_avx2.cpp": AVX2, "pointwise_avx512.cpp": AVX512}
X86_SOURCES |= {"nearest_avx2.cpp": AVX2, "nearest_avx512.cpp": AVX512}
X86_SOURCES |= {"rounding_avx2.cpp": AVX2, "rounding_avx512.cpp": AVX512}
QUIET = "-Wno-maybe-uninitialized"  # GCC 12 blames its own header
X86_SOURCES |= {"attention_avx512bf16.cpp": (*BF16, QUIET), "attention_amx.cpp": (*AMX, QUIET)}


class BuildError(Exception):
    """The library cannot be built here; the text is one line."""


def compiler() -> list[str]:
    """The C++ compiler and its own arguments: $CXX, else the first of c++, g++, clang++. Raises BuildError."""
    for candidate in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        words = shlex.split(candidate)
        if shutil.which(words[0]):
            return words
    raise BuildError(f"{os.environ.get('CXX') or 'none of c++, g++, clang++'} was not found")


def execute(command: list[str]) -> None:
    """Run one compiler command; BuildError with its first error line when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise BuildError(f"{shlex.join(command[:1])} failed: {lines[0].strip()}")


def build(out: Path) -> Path:
    """Compile into `out`/_lowbit_cpu.so and return its path. Raises BuildError."""
    if sys.platform != "linux":
        raise BuildError(f"the C++ kernels are built on Linux only, this is {sys.platform}")
    cxx = compiler()
    sources = SOURCES | (X86_SOURCES if platform.machine() in ("x86_64", "AMD64") else {})
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{name}.o") for name in sources]
        commands = [
            [*cxx, *FLAGS, "-fopenmp", *extra, "-c", str(FOLDER / name), "-o", target]
            for (name, extra), target in zip(sources.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(execute, commands))
        built = Path(folder) / LIBRARY
        execute([*cxx, "-shared", "-Wl,-z,undefs", *objects, "-o", str(built)])
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, partial := out / f"{LIBRARY}.{os.getpid()}")
        partial.replace(out / LIBRARY)  # never write into a library that a running process has mapped
    (out / REASON).unlink(missing_ok=True)
    return out / LIBRARY


def build_or_explain(out: Path) -> str | None:
    """Build into `out`; where that is impossible leave a file saying why, and return the reason."""
    try:
        build(out)
    except BuildError as error:
        out.mkdir(parents=True, exist_ok=True)
        (out / LIBRARY).unlink(missing_ok=True)
        (out / REASON).write_text(f"{error}\n")
        return str(error)
    return None


if __name__ == "__main__":
    if (why := build_or_explain(FOLDER)) is not None:
        sys.exit(f"built without a C++ compiler: {why}")
    print(FOLDER / LIBRARY)
