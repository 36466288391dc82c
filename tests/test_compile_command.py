"""`quantize compile`: from a folder that quantize wrote to a bundle that its layers find. No GPU takes part."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")

import quant
from quant import deploy
from quant.cli import main
from quant.eval import gpu_speed
from quant.kernels import dispatch
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.gpu import bundle, deployed, smoke
from quant.kernels.gpu.clock import taking_turns
from quant.kernels.gpu.layers import layer_of
from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.plan import PLANS
from quant.kernels.gpu.tiles import ARCHITECTURES
from quant.kernels.reference import Reference
from quant.linear import PackedLinear


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed Llama of our own, in which a bundle may be written."""
    copy = tmp_path_factory.mktemp("compile") / "out"
    shutil.copytree(packed("dgq"), copy)
    return copy


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    """What one `quantize compile` printed."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(["compile", str(folder), "--target", "sm_90"]) == 0
    return text.getvalue()


def test_every_layer_that_a_gpu_kernel_takes_finds_its_programs(folder, output):
    """The layers of the loaded model, as their kernels would describe them on the device, are in the launch table."""
    found = bundle.read(folder / bundle.FOLDER, 90)
    served, refused = 0, 0
    for module in quant.load(folder, dtype=torch.bfloat16, compile=False).modules():
        if not isinstance(module, PackedLinear):
            continue
        spec = MatmulSpec(
            n=module.out_features, k=module.in_features, format=module.format, activation=module.activation, device="cuda"
        )
        layer = layer_of(spec, torch.bfloat16, None if module.bias is None else torch.bfloat16)
        if isinstance(layer, str):
            refused += 1
            continue
        served += 1
        for m in (1, 16, 17, 64, 65, 5000):
            plan = bundle.plan_for(found, layer, m)
            assert plan is not None
            assert all(step.program in found.programs for step in plan.steps)
    assert served > 0
    assert f"{refused} layers have no GPU program" in output  # 96 channels in groups of 48


def test_the_table_counts_what_is_in_the_folder(folder, output):
    manifest = json.loads((folder / bundle.FOLDER / bundle.MANIFEST).read_text())
    part = manifest["targets"]["sm_90"]
    files = list((folder / bundle.FOLDER / "sm_90").glob("*.cubin"))
    row = next(line.split() for line in output.splitlines() if line.split()[:1] == ["sm_90"])
    shapes, launches, programs, size = (int(cell.replace(",", "")) for cell in row[1:5])
    assert size == sum(path.stat().st_size for path in files)
    assert {path.stem for path in files} == {p["digest"] for p in part["programs"]}
    assert programs == len(part["programs"]) < launches  # programs are shared between shapes and buckets
    assert shapes == len(part["launches"])
    assert all(len(entry["plans"]) == len(PLANS) for entry in part["launches"])
    assert "nothing was run or timed" in output


def test_load_offers_the_bundle_only_when_told_to(folder, output, monkeypatch):
    monkeypatch.setattr(deployed, "OFFERED", [])
    monkeypatch.delenv("LOWBIT_BUNDLE", raising=False)
    quant.load(folder, compile=False)
    assert not deployed.OFFERED
    monkeypatch.setenv("LOWBIT_BUNDLE", "use")
    quant.load(folder, compile=False)
    assert [folder / bundle.FOLDER] == deployed.OFFERED


def test_a_bundle_in_place_is_replaced_as_a_whole(folder, output, tmp_path):
    copy = tmp_path / bundle.FOLDER
    shutil.copytree(folder / bundle.FOLDER, copy)
    bundle.write(copy, {})
    assert [path.name for path in copy.iterdir()] == [bundle.MANIFEST]
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["OUT"], "no --target given"),
        (["OUT", "--target", "sm_75"], "unknown target 'sm_75'; known: sm_80, sm_89, sm_90, sm_100, gfx942"),
        (["OUT", "--target", ","], "no target given"),
        (["OUT", "--target", "sm_90", "--dtype", "int8"], "unknown dtype 'int8'; known: float16, bfloat16, float32"),
        (["--target", "sm_90"], "no folder given"),
        (["nowhere", "--target", "sm_90"], "nowhere is not a folder"),
        (["--report", "--target", "h100"], "unknown target 'h100'"),
    ],
)
def test_mistakes_get_one_line(folder, capsys, arguments, line):
    assert main(["compile", *[str(folder) if a == "OUT" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_float_folder_is_refused(llama, capsys):
    assert main(["compile", str(llama), "--target", "sm_90"]) == 2
    assert "was not written by quantize" in capsys.readouterr().err


def test_the_interpreter_cannot_compile(folder, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["compile", str(folder), "--target", "sm_90"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_amd_is_a_compile_check(folder, capsys):
    """The plain twin of one layer; nothing is written."""
    shapes, dtype = deploy.shapes_of(folder)
    layers, _ = deploy.gpu_layers(shapes, [dtype])
    before = sorted(folder.rglob("*"))
    deploy.check_amd(Console(), layers[:1])
    assert "a compile check only" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before


def test_the_report_prints_the_shipped_counts(capsys):
    assert main(["compile", "--report", "--target", "sm_80"]) == 0
    text = capsys.readouterr().out
    assert "no timings" in text
    assert "alu_per_weight" in text.replace("…", "") or "spills" in text


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_smoke_test_reaches_every_policy(arch):
    """Every case that bundles hold has launches on every architecture, and together they use every weight policy."""
    held = [case for case in smoke.cases() if smoke.bundled(case)]
    layers = [layer_of(case.spec("cuda"), torch.bfloat16, torch.bfloat16) for case in held]
    assert {layer.policy for layer in layers} == set(POLICIES)
    assert len(bundle.programs_of(bundle.launches(layers, arch))) > len(POLICIES)


class Doubled(dispatch.Kernel):
    """A kernel that is right but for a factor, or that leaves its output unwritten."""

    name, factor = "doubled", 2.0

    def refuses(self, spec):
        return None

    def prepare(self, fields, spec):
        return Reference().prepare(fields, spec)

    def restore(self, prepared, spec):
        raise NotImplementedError

    def matmul(self, x, prepared, bias, spec):
        y = Reference().matmul(x, prepared, bias, spec)
        return y * self.factor if self.factor else torch.empty_like(y)


@pytest.mark.parametrize("factor", [1.0, 1.01, 0.0])
def test_the_smoke_test_tells_right_from_wrong(monkeypatch, capsys, factor):
    """Its harness on the CPU with a kernel that is right, 1 % off, or writes nothing."""
    kernel = Doubled()
    kernel.factor = factor
    monkeypatch.setattr(smoke, "choose", lambda spec: (kernel, {}))
    monkeypatch.setattr(smoke, "SHAPES", ((33, 96, 32),))
    cases = list(smoke.cases())
    count = len(cases)
    assert smoke.run_all("cpu", cases, (torch.bfloat16, torch.float32), "cpu") == (0 if factor == 1.0 else 2 * count)
    assert capsys.readouterr().out.count("WRONG") == (0 if factor == 1.0 else 2 * count)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("module", ["quant.kernels.gpu.smoke", "quant.eval.gpu_speed"])
def test_without_a_gpu_nothing_is_claimed(module):
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no" in done.stderr
    assert done.stdout == ""


def test_the_rows_of_the_benchmark():
    """All but the clock, with the CPU kernels: which calls take part, the bytes they read, the rates that follow."""
    try:
        found = gpu_speed.candidates(96, 128, "cpu", 0)
    except ValueError as error:
        pytest.skip(str(error))
    assert list(found) == [
        *("torch bf16", "A8W4", "W8A8", "W8A16", "W4A16", "W3A16", "W2A16", "nvfp4A16", "mxfp4A16", "FP4A16"),
    ]
    x = torch.randn(2, 128).bfloat16()
    assert all(one.call(x)().shape == (2, 96) for one in found.values())
    timed = taking_turns({name: lambda: 1.0 for name in found}) | {"A8W4": 0.5}
    rows = {row["format"]: row for row in gpu_speed.rows_of(2, 96, 128, timed, found)}
    assert rows["A8W4"]["speed_vs_bf16"] == 2.0
    assert rows["torch bf16"]["tops"] == pytest.approx(2e-6 * 2 * 96 * 128)
    assert rows["torch bf16"]["weight_gb_s"] == pytest.approx(2 * 96 * 128 / 1e3)
