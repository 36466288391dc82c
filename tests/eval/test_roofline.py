"""The share of the roofline from rows whose bound is known, and the figure."""

import json

import pytest
from click.testing import CliRunner

from quant.eval import roofline


def row(kernel, m, ms, weight_bytes):
    n = k = 1000
    made = {"threads": 1, "m": m, "n": n, "k": k, "kernel": kernel, "ms": ms, "weight_gb_s": weight_bytes / ms * 1e-6}
    return made if kernel == "stream" else made | {"tops": 2e-9 * m * n * k / ms}


def test_the_nearer_roof_counts():
    # stream 10 GB/s; a million weights of one byte and 4000 bytes of tokens need 0.1004 ms, 1000 tokens 2 ms at 1 TOPS
    rows = [row("stream", 1, 1.0, 10**7), row("stream", 1000, 1.0, 10**7)]
    rows += [row("W8A8", 1, 0.2008, 10**6), row("W8A8", 1000, 4.0, 10**6), row("A8W4", 1, 0.2008, 10**6 // 2)]
    found, peaks = roofline.shares(rows, {"int8": 1.0, "bf16": 0.5})
    assert peaks == {"int8": 1.0, "bf16": 0.5}
    assert found["W8A8"] == pytest.approx({1: 0.5, 1000: 0.5})
    assert found["A8W4"][1] == pytest.approx(0.504 / 2.008)
    assert "stream" not in found


def test_no_kernel_is_above_the_roof_of_arithmetic():
    rows = [row("stream", 1000, 1.0, 10**9), row("W8A8", 1000, 1.0, 10**6), row("torch int8", 1000, 4.0, 10**6)]
    found, peaks = roofline.shares(rows, {"int8": 1.0, "bf16": 0.5})
    assert peaks["int8"] == pytest.approx(2.0)  # the kernel's own
    assert found["W8A8"][1000] == pytest.approx(1.0)
    assert found["torch int8"][1000] == pytest.approx(0.25)


@pytest.mark.parametrize("operands", ["int8", "bf16"])
def test_peak_is_a_speed(operands, monkeypatch):
    monkeypatch.setattr(roofline, "SIDES", (64,))
    assert 0 < roofline.gemm_tops(operands, 1) < 1000


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(name, m, 1.0, 10**6) for name in ("stream", "W8A8", "W4A16", "torch bf16") for m in (1, 4)]
    measured = tmp_path / "rows.json"
    measured.write_text(json.dumps({"rows": rows, "gemm": {"int8": 1.0, "bf16": 0.5}, "machine": "some CPU"}))
    out = tmp_path / "figure.png"
    assert CliRunner().invoke(roofline.main, [str(out), "--from", str(measured)]).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    refused = CliRunner().invoke(roofline.main, [str(tmp_path / "figure.pdf")])
    assert refused.exit_code == 2
    assert "ends in .png" in refused.output
