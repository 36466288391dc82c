"""Deployment bundles: compiled programs and their launch table, for a GPU that need not be here and a runtime without Triton.

    FOLDER/manifest.json      versions, digest of the kernel sources; per target its programs and its launch table
    FOLDER/sm_90/*.cubin      machine code, each file named by the SHA-256 of its bytes

A program's row names its symbol, shared memory, threads and the arguments in the order of the machine code. The launch table
gives, for each layer shape and number of tokens, the steps (program, grid rule, argument bindings) and the scratch between
them. A bundle is used as a whole or refused with the reason; nothing in it is trusted before its digest was checked.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.kernels.gpu.plan import LARGE_M, PLANS, Layer, plan, plan_bucket, plan_with
from quant.kernels.gpu.program import Plan, Program, Scratch, Step
from quant.kernels.gpu.tiles import ARCHITECTURES, read_table, tile_of

FOLDER = "lowbit-bundle"
MANIFEST = "manifest.json"
VERSION = 2
SCRATCH_POINTERS = 2  # Triton appends two pointers to every signature; our programs leave both unused
CODES = {"i32": "i", "i64": "q"}  # struct codes; everything else is a pointer
PROGRAMS_PER_JOB = 8  # fewer are not worth the start of a process
Launches = dict[Layer, dict[int | None, Plan]]  # layer -> most tokens of a bucket -> steps
Listener = Callable[[str, int, int], None]  # target, programs done, programs in all


class Refused(ValueError):
    """Why a bundle is not used, in one line."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One program as machine code."""

    program: Program
    symbol: str
    arguments: tuple[tuple[str, str], ...]  # (name, Triton type), in the order of the machine code's parameters
    shared_bytes: int
    threads: int
    digest: str  # SHA-256 of the file, which also names it
    size_bytes: int
    code: bytes = dataclasses.field(default=b"", repr=False)

    @functools.cached_property
    def packing(self) -> str:
        """`struct` format of the parameter buffer, natural alignment."""
        return "".join(CODES.get(kind, "P") for _, kind in self.arguments) + "P" * SCRATCH_POINTERS

    def offsets(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every parameter in the buffer."""
        sizes = [struct.calcsize(code) for code in self.packing]
        return [(struct.calcsize(self.packing[: i + 1]) - size, size) for i, size in enumerate(sizes)]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """One target of a bundle, checked."""

    folder: Path
    target: str
    programs: dict[Program, Compiled]
    launches: Launches


def sources_digest() -> str:
    """Digest of every file that decides programs, launches or layouts."""
    folder = Path(__file__).parent
    files = [*sorted((folder / "jit").glob("*.py")), *sorted(folder.glob("sm_*.json"))]
    files += [folder / f"{name}.py" for name in ("layout", "model", "plan", "program", "tiles", "bundle")]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def arch_of(target: str) -> int:
    """90 for "sm_90". Raises ValueError for a target without a table."""
    found = re.fullmatch(r"sm_(\d+)", target)
    if found is None or int(found[1]) not in ARCHITECTURES:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}")
    return int(found[1])


def launches(layers: Iterable[Layer], arch: int) -> Launches:
    """The steps of every layer for every bucket of tokens, as chosen for the product in the architecture's table."""
    from quant.kernels.gpu.model import DEVICES

    processors = DEVICES[arch].processors
    return {layer: {most: plan(layer, most or LARGE_M, arch, processors) for most in PLANS} for layer in layers}


def twin_plans(layers: Iterable[Layer]) -> Iterator[Plan]:
    """The plain twin of each layer for few tokens, for a compile check on AMD: the first tile of sm_80, no split."""
    for layer in layers:
        yield plan_with(layer, tile_of(read_table(80)["tiles"][layer.variant.key][0]), 1, "hip")


def programs_of(table: Launches) -> list[Program]:
    """The distinct programs, in order of first use."""
    return list(dict.fromkeys(step.program for plans in table.values() for p in plans.values() for step in p.steps))


def compile_one(program: Program, arch: int) -> Compiled:
    """Compile for sm_`arch` and check that the parameter buffer is what the machine code reads."""
    from quant.kernels.gpu.aot import compile_program
    from quant.kernels.gpu.cubin import parameters
    from quant.kernels.gpu.program import function

    built = compile_program(program, arch)
    types = dict(program.signature)
    made = Compiled(
        program=program,
        symbol=built.name,
        arguments=tuple((name, types[name]) for name in function(program.name).arg_names if name in types),
        shared_bytes=built.shared_bytes,
        threads=32 * built.warps,
        digest=hashlib.sha256(built.code).hexdigest(),
        size_bytes=len(built.code),
        code=built.code,
    )
    expected = parameters(built.code, built.name)
    assert made.offsets() == expected, f"{built.name}: packed at {made.offsets()}, the cubin reads {expected}"
    return made


def compile_all(programs: list[Program], arch: int) -> Iterator[Compiled]:
    """`compile_one` of each, in order; many programs are compiled by several processes."""
    jobs = min(os.cpu_count() or 1, len(programs) // PROGRAMS_PER_JOB)
    if jobs < 2:
        yield from (compile_one(program, arch) for program in programs)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(functools.partial(compile_one, arch=arch), programs)


def write(folder: Path, tables: Mapping[str, Launches], listen: Listener = lambda target, done, total: None) -> dict[str, Any]:
    """Compile what `tables` (target -> launches) need, write it to `folder` and return the manifest.

    An older bundle there is replaced at the end, anything else is refused (ValueError). Raises RuntimeError when a program
    does not compile.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is no bundle; give another -o or remove it")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    targets = {}
    partial.mkdir(parents=True)
    try:
        for target, table in tables.items():
            (partial / target).mkdir()
            began = time.monotonic()
            wanted = programs_of(table)
            made = []
            for compiled in compile_all(wanted, arch_of(target)):
                made.append(compiled)
                (partial / target / f"{made[-1].digest}.cubin").write_bytes(made[-1].code)
                listen(target, len(made), len(wanted))
            targets[target] = {
                "compile_seconds": round(time.monotonic() - began, 3),
                "programs": [program_row(compiled) for compiled in made],
                "launches": [
                    {"layer": asdict(layer), "plans": [plan_row(most, p, wanted) for most, p in plans.items()]}
                    for layer, plans in table.items()
                ],
            }
        manifest = {
            "version": VERSION,
            "lowbit": installed("lowbit"),
            "triton": installed("triton"),
            "sources": sources_digest(),
            "targets": targets,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def program_row(made: Compiled) -> dict[str, Any]:
    return {name: value for name, value in asdict(made).items() if name != "code"}


def plan_row(most: int | None, steps: Plan, programs: list[Program]) -> dict[str, Any]:
    rows = [asdict(step) | {"program": programs.index(step.program)} for step in steps.steps]
    return {"up_to_tokens": most, "scratch": [asdict(s) for s in steps.scratch], "steps": rows, "dense": steps.dense}


def tuples(value: Any) -> Any:
    """JSON lists as tuples, all the way down."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def from_row(cls: Any, row: Mapping[str, Any]) -> Any:
    """A dataclass from exactly its own fields."""
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(row) - fields:
        raise KeyError(f"{min(unknown)} in a {cls.__name__}")
    return cls(**{name: tuples(value) for name, value in row.items()})


def read_compiled(row: Mapping[str, Any], folder: Path) -> Compiled:
    program = from_row(Program, row["program"])
    if not re.fullmatch("[0-9a-f]{64}", row["digest"]):
        raise Refused(f"{row['digest']!r} is no digest; the manifest is damaged")
    path = folder / f"{row['digest']}.cubin"
    if not path.is_file():
        raise Refused(f"{path} is missing")
    code = path.read_bytes()
    if hashlib.sha256(code).hexdigest() != row["digest"]:
        raise Refused(f"{path} is damaged: its SHA-256 is not its name")
    made: Compiled = from_row(Compiled, {**row, "program": program, "code": code})
    if set(made.arguments) != set(program.signature):
        raise Refused(f"the arguments of {made.symbol} are not those of its program; the manifest is damaged")
    return made


def read_launches(rows: list[dict[str, Any]], programs: list[Program]) -> Launches:
    table: Launches = {}
    for row in rows:
        plans: dict[int | None, Plan] = {}
        for entry in row["plans"]:
            steps = tuple(from_row(Step, {**step, "program": programs[step["program"]]}) for step in entry["steps"])
            scratch = tuple(from_row(Scratch, s) for s in entry["scratch"])
            plans[entry["up_to_tokens"]] = Plan(steps=steps, scratch=scratch, dense=bool(entry["dense"]))
        if set(plans) != set(PLANS):
            raise KeyError(f"plans for up to {list(plans)} tokens")
        table[from_row(Layer, row["layer"])] = plans
    return table


def read(folder: Path, arch: int) -> Bundle:
    """The part of a bundle for a device of compute capability `arch` (90 for 9.0). Raises Refused with the reason."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_origin(manifest)
        target = f"sm_{arch}"
        if target not in manifest["targets"]:
            raise Refused(f"it holds {', '.join(manifest['targets'])}; this device is {target}")
        part = manifest["targets"][target]
        made = [read_compiled(row, folder / target) for row in part["programs"]]
        table = read_launches(part["launches"], [compiled.program for compiled in made])
    except OSError as error:
        raise Refused(f"{error.filename} cannot be read: {error.strerror}") from error
    except Refused:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Refused(f"its manifest is damaged ({type(error).__name__}: {error})") from error
    return Bundle(folder=folder, target=target, programs={c.program: c for c in made}, launches=table)


def check_origin(manifest: Mapping[str, Any]) -> None:
    """Raise Refused unless the bundle was made by this version from these sources."""
    if manifest["version"] != VERSION:
        raise Refused(f"bundle version {manifest['version']!r} is unknown; this lowbit reads version {VERSION}")
    if manifest["lowbit"] != (lowbit := installed("lowbit")):
        raise Refused(f"made by lowbit {manifest['lowbit']}, this is {lowbit}")
    if (triton := installed("triton")) not in (None, manifest["triton"]):
        raise Refused(f"made with triton {manifest['triton']}, triton {triton} is installed")
    if manifest["sources"] != sources_digest():
        raise Refused("made from other kernel sources than those installed")


def plan_for(bundle: Bundle, layer: Layer, m: int) -> Plan | None:
    """The steps for `m` tokens, or None where the bundle was not made for such a layer."""
    plans = bundle.launches.get(layer)
    return None if plans is None else plans[plan_bucket(m)]
