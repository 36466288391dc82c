"""Every GPU kernel against float64, on the GPU that is present: `python -m quant.kernels.gpu.smoke [FORMAT ...]`.

Off by default: nothing calls it. First the programs are compiled by Triton as they are needed, by several processes at once,
then the same layers run from a deployment bundle made on the spot, through the CUDA driver. One line per kernel, dtype and way;
the exit status is 1 if any result is off or two runs differ, 2 where nothing can be tested.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quant.kernels.activation import Activation, from_config
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.dispatch import MatmulSpec, choose
from quant.kernels.format import Format
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu import bundle, deployed
from quant.kernels.gpu.layers import layer_of
from quant.kernels.gpu.plan import Layer
from quant.kernels.gpu.tiles import ARCHITECTURES
from quant.kernels.gpu.warm import processes

SHAPES = ((130, 576, 96), (1024, 4096, 128), (200, 640, 32))  # N, K, group: tails, a large layer, the smallest blocks
TOKENS = (1, 16, 17, 64, 65, 200, 400)  # the last has a dense weight
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}  # relative norm, as in the tests of the kernels


@dataclass(frozen=True, kw_only=True)
class Case:
    """One packed linear [n, k] and its activation rule."""

    n: int
    k: int
    format: Format
    activation: Activation

    def spec(self, device: str) -> MatmulSpec:
        return MatmulSpec(n=self.n, k=self.k, format=self.format, activation=self.activation, device=device)


def cases() -> Iterator[Case]:
    """Every kernel, bit width and blocking."""
    for n, k, group in SHAPES:
        yield Case(n=n, k=k, format=Int4Dual(group=group), activation=Int8Token())
        yield Case(n=n, k=k, format=IntGroup(bits=8, group=-1, symmetric=True), activation=Int8Token())
        for kind in ("mxfp4", "nvfp4"):
            for activation in (Unquantized(), from_config(kind)):
                yield Case(n=n, k=k, format=Fp4Block(kind=kind), activation=activation)
        for channels in (FpChannel(group=group), FpChannel(), FpChannel(bits=8)):
            yield Case(n=n, k=k, format=channels, activation=Unquantized())
        for bits in (2, 3, 4, 8):
            for length in (group, -1):
                fmt = IntGroup(bits=bits, group=length, symmetric=length == -1)
                yield Case(n=n, k=k, format=fmt, activation=Unquantized())
        for length in (group, -1):
            yield Case(n=n, k=k, format=BinaryDual(group=length), activation=Unquantized())
        for books, length in ((1, 4), (2, 8)):
            yield Case(n=n, k=k, format=Codebook(books=books, group=length), activation=Unquantized())


def bundled(case: Case) -> bool:
    """Whether bundles hold its programs."""
    return not isinstance(case.format, BinaryDual | Codebook)


@dataclass(frozen=True, kw_only=True)
class Result:
    """error: the worst relative norm over the token counts; repeats: whether two runs gave the same bits."""

    kernel: str
    error: float
    repeats: bool


def check(case: Case, dtype: torch.dtype, device: str) -> Result:
    """Run one layer with every number of tokens and compare with float64. Outputs are poisoned before they are written."""
    generator = torch.Generator().manual_seed(case.n + case.k)
    codes = case.format.nearest(torch.randn(case.n, case.k, generator=generator))
    bias = torch.randn(case.n, generator=generator).to(dtype)
    spec = case.spec(torch.device(device).type)
    kernel, refusals = choose(spec)
    if spec.device == "cuda" and kernel.name == "reference":
        print("no GPU kernel:", "; ".join(f"{name} {reason}" for name, reason in refusals.items()))
        return Result(kernel=kernel.name, error=float("inf"), repeats=False)
    sample = torch.randn(1024, case.k, generator=generator)
    inputs = case.activation.fit(sample, sample.abs().amax(0))
    prepared = kernel.prepare({name: t.to(device) for name, t in (case.format.pack(codes) | inputs).items()}, spec)
    weight = case.format.dequantize(codes).double()
    error, repeats = 0.0, True
    torch.use_deterministic_algorithms(True)  # torch then fills fresh memory with NaN
    try:
        for m in TOKENS:
            x = torch.randn(m, case.k, generator=generator).to(dtype)
            first, second = (kernel.matmul(x.to(device), prepared, bias.to(device), spec) for _ in range(2))
            wanted = case.activation.quantize(x, inputs).double() @ weight.t() + bias.double()
            off = float((first.double().cpu() - wanted).norm() / wanted.norm())
            error = max(error, off if off == off else float("inf"))
            repeats = repeats and torch.equal(first, second)
    finally:
        torch.use_deterministic_algorithms(False)
    return Result(kernel=kernel.name, error=error, repeats=repeats)


def line(way: str, case: Case, dtype: torch.dtype, result: Result) -> tuple[bool, str]:
    """Whether the result is right, and the line to print."""
    good = result.error <= LIMITS[dtype] and result.repeats
    what = f"{case.format} {case.activation} [{case.n}, {case.k}] {str(dtype).removeprefix('torch.')}"
    repeats = "repeats" if result.repeats else "does not repeat"
    verdict = "ok" if good else "WRONG"
    return good, f"{verdict:5} {way}: {result.kernel} {what}: error {result.error:.1e} of {LIMITS[dtype]:.0e}, {repeats}"


def checked(task: tuple[str, Case, torch.dtype, str]) -> tuple[bool, str]:
    """One case; whatever it raises is its result."""
    way, case, dtype, device = task
    try:
        return line(way, case, dtype, check(case, dtype, device))
    except Exception as error:  # every other case shall still be tested
        reason = next((text for text in reversed(str(error).splitlines()) if text.strip()), "")
        return (
            False,
            f"WRONG {way}: {case.format} {case.activation} [{case.n}, {case.k}] {dtype}: {type(error).__name__}: {reason}",
        )


def run_all(way: str, wanted: Iterable[Case], dtypes: tuple[torch.dtype, ...], device: str, jobs: int = 1) -> int:
    """Check and print every wanted case; returns how many failed. A case that no GPU kernel takes has failed.

    jobs: processes, which compile at the same time.
    """
    tasks = [(way, case, dtype, device) for dtype, case in itertools.product(dtypes, wanted)]
    failed = 0
    with contextlib.ExitStack() as stack:
        results: Iterable[tuple[bool, str]] = map(checked, tasks)
        if jobs > 1:
            results = stack.enter_context(multiprocessing.get_context("spawn").Pool(jobs)).imap(checked, tasks)
        for good, text in results:
            failed += not good
            print(text, flush=True)
    return failed


def run_bundle(arch: int, wanted: Iterable[Case], dtype: torch.dtype) -> int:
    """The cases again from a bundle for this GPU; returns how many failed."""
    held = [case for case in wanted if bundled(case)]
    layers: list[Layer] = []
    for case in held:
        layer = layer_of(case.spec("cuda"), dtype, dtype)
        assert isinstance(layer, Layer), layer
        layers.append(layer)
    if not layers:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bundle.write(Path(folder) / bundle.FOLDER, {f"sm_{arch}": bundle.launches(layers, arch)})
        deployed.offer(Path(folder))
        device = deployed.on(torch.cuda.current_device())
        if device is None or device.bundles[-1].folder.parent != Path(folder):
            return 1  # refused, with the reason on the error stream
        return run_all("bundle", held, (dtype,), "cuda")


def main(names: Sequence[str] = ()) -> int:
    """names: of formats; none stand for all."""
    if not torch.cuda.is_available() or torch.version.hip:
        print("torch sees no NVIDIA GPU; nothing was tested", file=sys.stderr)
        return 2
    if not deployed.has_triton():
        print("triton is not installed and must compile the programs to test; pip install triton", file=sys.stderr)
        return 2
    arch = int("{}{}".format(*torch.cuda.get_device_capability()))
    print(f"{torch.cuda.get_device_name()}, sm_{arch}, torch {torch.__version__}, triton {bundle.installed('triton')}")
    wanted = [case for case in cases() if not names or case.format.name in names]
    failed = run_all("triton", wanted, DTYPES, "cuda", processes())
    if arch in ARCHITECTURES:
        failed += run_bundle(arch, wanted, torch.bfloat16)
    else:
        print(f"bundle: not tested, bundles are made for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")
    print(f"all {len(wanted)} cases are right" if not failed else f"{failed} results are WRONG; please report this output")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
