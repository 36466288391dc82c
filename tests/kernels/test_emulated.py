"""The ways of the C++ kernels for VBMI, BF16 and AMX where a machine lacks these: `emulate.h` makes them of AVX-512."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from quant.kernels.cpu import build, library

HERE = Path(__file__).resolve().parent
EMULATED = {"-mavx512vbmi", "-mamx-tile", "-mamx-int8", "-mamx-bf16"}
BF16 = {"-mavx512bf16": "-DEMULATED_BF16"}


def has_avx512() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and library.available() and "avx512" in library.supported(library.load())


@pytest.mark.skipif(not has_avx512(), reason="the emulation takes AVX-512 and a compiler")
def test_every_way_of_x86_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1", "-include", str(HERE / "emulate.h")))
    plain = {
        name: tuple(BF16.get(flag, flag) for flag in flags if flag not in EMULATED) for name, flags in build.X86_SOURCES.items()
    }
    monkeypatch.setattr(build, "X86_SOURCES", plain)
    build.build(tmp_path)
    assert library.supported(library.open_library(tmp_path)) == list(library.ISAS)
    files = [str(HERE / name) for name in ("test_cpu.py", "test_attention.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    command += ["-k", "instruction_set and not forced or float64 or int8_cache"]
    given = os.environ | {
        "EMULATED": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, cwd=HERE.parents[1], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
