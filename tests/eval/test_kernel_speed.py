"""What the kernel benchmark is told, without its timings."""

import pytest
from click.testing import CliRunner

from quant.eval import kernel_speed
from quant.kernels.cpu import library


def test_the_group_divides_k():
    assert [kernel_speed.group_of(k) for k in (4096, 576, 96)] == [128, 64, 32]
    result = CliRunner().invoke(kernel_speed.main, ["--k", "100"])
    assert result.exit_code == 2
    assert "k 100 is not a multiple of 32" in result.output


def test_an_instruction_set_is_chosen_by_name_and_given_back(monkeypatch):
    try:
        library.load()
    except library.Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.delenv("LOWBIT_CPU_ISA", raising=False)
    best = kernel_speed.use_isa(None)
    assert best in library.ISAS
    assert kernel_speed.use_isa("portable") == "portable"
    monkeypatch.setenv("LOWBIT_CPU_ISA", "portable")
    assert kernel_speed.use_isa(None) == "portable"
    monkeypatch.delenv("LOWBIT_CPU_ISA")
    assert kernel_speed.use_isa(None) == best
    assert CliRunner().invoke(kernel_speed.main, ["--isa", "mmx"]).exit_code == 2
