"""Deployment bundles without a GPU: what is packed is what the machine code reads, a full load and launch through a stand-in
for the driver, and every refusal."""

import contextlib
import ctypes
import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")

from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.none import Unquantized
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.cpu.build import BuildError, compiler
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu import a8w4, bundle, deployed, launch
from quant.kernels.gpu.aot import compile_program
from quant.kernels.gpu.cubin import parameters
from quant.kernels.gpu.driver import CudaError, Driver
from quant.kernels.gpu.layers import layer_of
from quant.kernels.gpu.plan import PLANS, Layer, plan_with
from quant.kernels.gpu.program import run
from quant.kernels.gpu.tiles import Tile

N, K, GROUP = 130, 576, 96
LAYER = a8w4.layer_of(N, K, GROUP, torch.bfloat16, torch.empty(N, dtype=torch.bfloat16))
SMALL = Tile(max_m=16, bm=16, bn=32, warps=1, stages=2, swap=False, on_sum=False)
PLAN = plan_with(LAYER, SMALL, 2)  # quantize, gemm in two parts of K, combine
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three programs for sm_80; not to be changed."""
    folder = tmp_path_factory.mktemp("out") / bundle.FOLDER
    bundle.write(folder, {"sm_80": {LAYER: dict.fromkeys(PLANS, PLAN)}})
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same bundle, to be damaged."""
    for path in [p for p in made.rglob("*") if p.is_file()]:
        target = tmp_path / bundle.FOLDER / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / bundle.FOLDER


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stand-in for libcuda.so, compiled."""
    try:
        command = compiler()
    except BuildError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("fake") / "libcuda.so"
    subprocess.run([*command, "-shared", "-fPIC", "-o", str(path), str(HERE / "libcuda.cpp")], check=True)
    return str(path)


@pytest.fixture
def cuda(library: str) -> Driver:
    found = Driver(library)
    found.cuda.calls.restype = ctypes.c_char_p
    found.cuda.fail_next(b"")
    found.cuda.forget()
    return found


def calls(cuda: Driver) -> list[str]:
    return cuda.cuda.calls().decode().splitlines()


def test_the_bundle_reads_back_what_was_planned(made):
    found = bundle.read(made, 80)
    assert found.launches == {LAYER: dict.fromkeys(PLANS, PLAN)}
    assert list(found.programs) == [step.program for step in PLAN.steps]
    for m in (1, 16, 17, 64, 65, 4096):
        assert bundle.plan_for(found, LAYER, m) == PLAN
    assert bundle.plan_for(found, replace(LAYER, n=N + 1), 1) is None


def test_parameters_are_packed_where_the_machine_code_reads_them(made):
    """Offsets and sizes against the cubin, read by our own reader and by NVIDIA's; names against the compiler's own IR."""
    from triton import knobs

    for compiled in bundle.read(made, 80).programs.values():
        path = made / "sm_80" / f"{compiled.digest}.cubin"
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-elf", str(path)], capture_output=True, text=True, check=True
        ).stdout
        rows = re.findall(r"Ordinal : (\S+)\s+Offset\s+: (\S+)\s+Size\s+: (\S+)", text)
        theirs = [(int(offset, 16), int(size, 16)) for _, offset, size in sorted(rows, key=lambda row: int(row[0], 16))]
        assert len(theirs) == len(compiled.arguments) + bundle.SCRATCH_POINTERS
        assert compiled.offsets() == theirs == parameters(compiled.code, compiled.symbol)


def test_arguments_are_in_the_order_of_the_compiler():
    """Two pointers in the wrong order would have the right sizes, so names are compared with the compiler's IR."""
    step = PLAN.steps[1]
    made = bundle.compile_one(step.program, 80)
    head = next(line for line in compile_program(step.program, 80).ttgir.splitlines() if "tt.func public" in line)
    names = re.findall(r"%(\w+): (?:!tt\.ptr<)?(\w+)", head)
    assert [name for name, _ in made.arguments] == [name for name, _ in names]
    kinds = {"*i8": "i8", "*u8": "i8", "*i32": "i32", "*fp32": "f32", "*bf16": "bf16", "i32": "i32", "*i16": "i16"}
    assert [kinds[kind] for _, kind in made.arguments] == [kind for _, kind in names]
    assert [name for name, _ in made.arguments] != [name for name, _ in step.program.signature]


def test_a_load_and_a_launch_through_the_driver(made, cuda, monkeypatch):
    """Every call, grid, block, byte of shared memory and argument of a whole plan."""
    device = deployed.Deployed(0, cuda)
    device.add(bundle.read(made, 80))
    log = calls(cuda)
    assert log[:3] == ["cuDeviceGet 0", "cuDevicePrimaryCtxRetain 70", "cuCtxSetCurrent 0x7000000000000000"]
    assert [line.split()[-1] for line in log if line.startswith("cuModuleGetFunction")] == ["quantize_rows", "gemm", "combine"]
    assert log.count("cuModuleLoadData ELF") == 3
    assert not any(line.startswith("cuFuncSetAttribute") for line in log)  # all below 48 KB

    monkeypatch.setattr(deployed, "current_stream", lambda index: 0xABC)
    m = 17
    tensors = {
        "x": torch.zeros(m, K, dtype=torch.bfloat16),
        "y": torch.zeros(m, N, dtype=torch.int16),
        "weight": torch.zeros(1000, 32, dtype=torch.uint8),
        "words": torch.zeros(1000, dtype=torch.int32),
        "row_scale": torch.zeros(N),
        "bias": torch.zeros(N, dtype=torch.bfloat16),
    }
    launched = []

    def recorded(step, values, m):
        launched.append((step, dict(values)))
        device.launch(step, values, m)

    cuda.cuda.forget()
    run(PLAN, tensors, m, recorded)
    log = [line for line in calls(cuda) if not line.startswith("cuCtxSetCurrent")]
    assert len(log) == 2 * len(PLAN.steps) == 6
    grids = [(m, 1, 1), (2, 5, 2), (5, 1, 1)]  # rows; 16 x 32 tiles in two parts; 4 x 256 tiles
    for (step, values), head, body, grid in zip(launched, log[::2], log[1::2], grids, strict=True):
        compiled = device.loaded[step.program][0]
        expected = (*grid, compiled.threads, 1, 1, compiled.shared_bytes)
        assert head == f"cuLaunchKernel 0x7200000000000000 {' '.join(map(str, expected))} 0xabc"
        assert compiled.threads == 32 * step.program.warps
        given = bytes.fromhex(body)
        offsets = parameters(compiled.code, compiled.symbol)
        assert len(given) == sum(offsets[-1])
        for (name, kind), (at, size) in zip(compiled.arguments, offsets, strict=False):
            number = int.from_bytes(given[at : at + size], "little", signed=True)
            value = values[name]
            assert number == (value if isinstance(value, int) else value.data_ptr()), (name, kind)
        assert given[offsets[-2][0] :] == bytes(16)  # Triton's two scratch pointers
    gemm = launched[1][1]
    assert gemm["M"] == m
    assert gemm["y_ptr"] is launched[2][1]["part_ptr"]
    assert gemm["x_ptr"] is launched[0][1]["q_ptr"]


def test_a_view_that_is_not_aligned_is_copied(made, cuda, monkeypatch):
    """The programs were compiled for 16-byte loads; Triton would have compiled another one."""
    device = deployed.Deployed(0, cuda)
    device.add(bundle.read(made, 80))
    monkeypatch.setattr(deployed, "current_stream", lambda index: 0)
    memory = torch.zeros(K + 1, dtype=torch.bfloat16)
    values = {"x_ptr": memory[1:], "q_ptr": torch.zeros(K), "scale_ptr": torch.zeros(4), "K": K, "K_PAD": K}
    assert values["x_ptr"].data_ptr() % 16
    device.launch(PLAN.steps[0], values, 1)
    compiled = device.loaded[PLAN.steps[0].program][0]
    packed = struct.unpack(compiled.packing, bytes.fromhex(calls(cuda)[-1]))
    given = dict(zip([name for name, _ in compiled.arguments], packed, strict=False))
    assert given["x_ptr"] % 16 == 0
    assert given["x_ptr"] != values["x_ptr"].data_ptr()
    assert given["q_ptr"] == values["q_ptr"].data_ptr()


def test_shared_memory_above_48_kilobytes_is_asked_for(cuda):
    cuda.load(b"\x7fELF", "gemm", 48 * 1024, 1)
    assert not any(line.startswith("cuFuncSetAttribute") for line in calls(cuda))
    cuda.load(b"\x7fELF", "gemm", 48 * 1024 + 1, 1)
    assert "cuFuncSetAttribute 0x7200000000000000 8 49153" in calls(cuda)


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain"])
def test_a_failing_call_is_named_with_the_message_of_the_driver(made, cuda, name):
    cuda.cuda.fail_next(name.encode())
    device = deployed.Deployed(0, cuda)
    with pytest.raises(CudaError, match=f"{name} failed: CUDA_ERROR_UNKNOWN: unknown error"):
        device.add(bundle.read(made, 80))
    assert device.bundles == []


def test_no_driver_is_an_error_with_its_name():
    with pytest.raises(CudaError, match=r"no-such-libcuda\.so cannot be loaded"):
        Driver("no-such-libcuda.so")


def edit(folder: Path, change) -> None:
    path = folder / bundle.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def first_cubin(folder: Path) -> Path:
    return min((folder / "sm_80").glob("*.cubin"))


def flip(folder: Path) -> None:
    """One bit in the middle of a cubin."""
    code = bytearray(first_cubin(folder).read_bytes())
    code[len(code) // 2] ^= 1
    first_cubin(folder).write_bytes(code)


def program(manifest: dict) -> dict:
    return manifest["targets"]["sm_80"]["programs"][1]


DAMAGE = {
    "this device is sm_90": (90, lambda f: None),
    "made from other kernel sources": (80, lambda f: edit(f, lambda m: m.update(sources="0" * 64))),
    "made by lowbit 9.9": (80, lambda f: edit(f, lambda m: m.update(lowbit="9.9"))),
    "made with triton 1.0": (80, lambda f: edit(f, lambda m: m.update(triton="1.0"))),
    "bundle version 1 is unknown": (80, lambda f: edit(f, lambda m: m.update(version=1))),
    "damaged: its SHA-256": (80, flip),
    "is missing": (80, lambda f: first_cubin(f).unlink()),
    "cannot be read": (80, lambda f: (f / bundle.MANIFEST).unlink()),
    "manifest is damaged .JSONDecodeError": (80, lambda f: (f / bundle.MANIFEST).write_text("{")),
    "manifest is damaged .KeyError: 'targets'": (80, lambda f: edit(f, lambda m: m.pop("targets"))),
    "manifest is damaged .KeyError: 'plans": (80, lambda f: edit(f, lambda m: launch_rows(m)[0]["plans"].pop())),
    "is no digest": (80, lambda f: edit(f, lambda m: program(m).update(digest="../../x"))),
    "arguments of gemm are not those": (80, lambda f: edit(f, lambda m: program(m)["arguments"].pop())),
}


def launch_rows(manifest: dict) -> list:
    return manifest["targets"]["sm_80"]["launches"]


@pytest.mark.parametrize("reason", DAMAGE)
def test_stale_foreign_or_damaged_bundles_are_refused_with_the_reason(copied, reason):
    arch, damage = DAMAGE[reason]
    damage(copied)
    with pytest.raises(bundle.Refused, match=reason) as caught:
        bundle.read(copied, arch)
    assert "\n" not in str(caught.value)


def test_the_digest_follows_the_sources(made, monkeypatch):
    """A changed kernel source makes every bundle stale."""
    before = bundle.sources_digest()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b"#" if self.name == "unpack.py" else b""))
    assert bundle.sources_digest() != before
    with pytest.raises(bundle.Refused, match="other kernel sources"):
        bundle.read(made, 80)


def test_an_unrelated_folder_is_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="is no bundle"):
        bundle.write(tmp_path / "photos", {})


@pytest.fixture
def device(monkeypatch, cuda):
    """A CUDA device 0 of compute capability 8.0 as far as `deployed` and `launch` ask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(deployed, "current_stream", lambda index: 0)
    monkeypatch.setattr(deployed, "driver", lambda: cuda)
    monkeypatch.setattr(deployed, "OFFERED", [])
    monkeypatch.setattr(deployed, "DEVICES", {})


def test_offered_bundles_are_used_or_refused_in_one_line(device, made, copied, capsys, monkeypatch):
    deployed.offer(made.parent)
    found = deployed.on(0)
    assert found is not None
    assert found is deployed.on(0)
    assert found.plan(LAYER, 3) == PLAN
    assert capsys.readouterr().err == f"lowbit: 3 programs of {made} run on sm_80; Triton compiles none of them\n"
    flip(copied)
    deployed.offer(copied.parent)
    found = deployed.on(0)
    assert [b.folder for b in found.bundles] == [made]
    _, line = capsys.readouterr().err.splitlines()
    assert f"{copied} is refused" in line
    assert "SHA-256" in line
    assert "Triton compiles" in line
    other = replace(LAYER, x="float16")
    assert found.plan(other, 3) is None
    assert found.plan(other, 3) is None
    assert capsys.readouterr().err.count("Triton compiles it now") == 1
    monkeypatch.setattr(deployed, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="compile again with --dtype float32"):
        found.plan(replace(LAYER, x="float32"), 3)


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on CUDA device 0."""

    is_cuda = True

    def get_device(self) -> int:
        return 0


def test_the_operators_launch_from_the_bundle(device, made, cuda, monkeypatch):
    """`launch.matmul`, which all operators call, takes the bundle's plan and the driver, and Triton only without them."""
    tensors = {name: torch.zeros(4096) for name in ("weight", "words", "row_scale")}
    x, bias = torch.zeros(17, K, dtype=torch.bfloat16).as_subclass(OnDevice), torch.zeros(N, dtype=torch.bfloat16)
    with_triton: list[str] = []
    monkeypatch.setattr(launch, "jit", lambda step, values, m: with_triton.append(step.program.name))
    monkeypatch.setattr(launch, "plan", lambda *args: PLAN)
    monkeypatch.setattr(launch, "device_facts", lambda index: (80, 108))
    launch.matmul(LAYER, x, bias, tensors)
    assert with_triton == ["quantize", "gemm", "combine"]
    deployed.offer(made.parent)
    y = launch.matmul(LAYER, x, bias, tensors)
    assert y.shape == (17, N)
    assert len(with_triton) == 3
    assert sum(line.startswith("cuLaunchKernel") for line in calls(cuda)) == 3
    launch.matmul(replace(LAYER, divisor=True), x, bias, tensors)
    assert len(with_triton) == 6


def test_a_bundle_stands_in_for_triton(device, made, monkeypatch):
    spec = MatmulSpec(n=N, k=K, format=Int4Dual(group=GROUP), activation=Int8Token(), device="cuda")
    monkeypatch.setattr(deployed, "has_triton", lambda: False)
    assert launch.device_refuses(spec) == "triton is not installed and no deployment bundle fits this GPU"
    deployed.offer(made.parent)
    assert launch.device_refuses(spec) is None
    assert a8w4.GpuA8W4().refuses(spec) is None


WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch
from pathlib import Path
from quant.kernels.gpu import deployed
from quant.kernels.gpu.driver import Driver
from quant.kernels.gpu.plan import Layer
from quant.kernels.gpu.program import run
torch.cuda.get_device_capability = lambda index: (8, 0)
deployed.driver = lambda: Driver(sys.argv[2])
deployed.current_stream = lambda index: 0
deployed.offer(Path(sys.argv[1]))
layer = eval(sys.argv[3])
found = deployed.on(0)
m = 5
tensors = {"x": torch.zeros(m, layer.k, dtype=torch.bfloat16), "y": torch.zeros(m, layer.n, dtype=torch.int16)}
tensors |= {name: torch.zeros(4096) for name in ("weight", "words", "row_scale", "bias")}
run(found.plan(layer, m), tensors, m, found.launch)
print(len(found.loaded))
"""


def test_triton_is_not_needed_at_run_time(made, library):
    """Loading and launching in a process that cannot import triton."""
    command = [sys.executable, "-c", WITHOUT_TRITON, str(made.parent), library, repr(LAYER)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"


def test_a_layer_is_found_for_every_kernel_without_a_gpu():
    def found(fmt, activation) -> Layer | str:
        spec = MatmulSpec(n=96, k=192, format=fmt, activation=activation, device="cuda")
        return layer_of(spec, torch.float16, torch.float16)

    assert found(Int4Dual(group=64), Int8Token()) == a8w4.layer_of(96, 192, 64, torch.float16, torch.empty(0).half())
    assert found(IntGroup(bits=8, group=-1, symmetric=True), Int8Token()).policy == "bytes8"
    assert found(IntGroup(bits=3, group=64, symmetric=False), Unquantized()).policy == "int3"
    assert found(Fp4Block(kind="nvfp4"), NvFp4()).groups == 2
    assert found(Fp4Block(kind="mxfp4"), Unquantized()).x == "float16"
    assert found(Fp4Block(kind="mxfp4"), MxFp4()).x == "float32", "float16 has not the range of these tokens"
    reason = found(IntGroup(bits=4, group=64, symmetric=True), Int8Token())
    assert isinstance(reason, str)
    assert "gpu_wna16 takes float tokens" in reason
