"""fp4_block: golden bytes of compressed-tensors 0.20, the number tables, rounding, scale rules, exact invariances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from quant.kernels.format import Codes
from quant.kernels.formats.fp4_block import (
    Fp4Block,
    e8m0_value,
    even_exponent,
    power_divisor,
)
from quant.kernels.minifloat import E2M1

KINDS = ("mxfp4", "nvfp4")
FIRST = [0.5, -6.0, 1.75, 0.25, -0.2, 5.0, 3.5, 2.5, 0.0, -1.25, 0.75, -0.75, 4.9, -3.4, 6.0, -0.0]
SECOND = [0.01, -0.02, 0.03, 0.05, -0.1, 0.07, 0.09, -0.06] * 2
WEIGHT = torch.tensor([FIRST + SECOND, [1.74 * i / 32 - 0.9 for i in range(32)]])
# What compressed-tensors 0.20.0 makes of WEIGHT: calculate_qparams and compress, with `tensor_group` 16 and `group` 32.
NVFP4 = ("f1046846a0a2d607a1546fe7a1546fe7", "ffffeeeeddccbb9a0821435455667677")
NVFP4_SCALE = [[126, 79], [104, 103]]  # bytes; the divisor is 448
MXFP4 = ("f1046846a0a2d6078000088080000880", "deddddccbcabaa990811223243445455")
MXFP4_SCALE = [[127], [125]]


def normal(n: int = 64, k: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_bytes_are_those_of_compressed_tensors() -> None:
    for kind, rows, scale in (("nvfp4", NVFP4, NVFP4_SCALE), ("mxfp4", MXFP4, MXFP4_SCALE)):
        fmt = Fp4Block(kind=kind)
        packed = fmt.pack(fmt.nearest(WEIGHT))
        assert [bytes(row).hex() for row in packed["weight_packed"].tolist()] == list(rows)
        assert packed["weight_scale"].view(torch.uint8).tolist() == scale
    assert "weight_global_scale" not in packed
    fmt = Fp4Block(kind="nvfp4")
    packed = fmt.pack(fmt.nearest(WEIGHT))
    assert packed["weight_global_scale"].numpy().tobytes() == bytes([0, 0, 0xE0, 0x43])  # 448.0
    assert packed["weight_scale"].dtype == torch.float8_e4m3fn


def test_the_sixteen_values_and_their_nibbles() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = E2M1.decode(codes)
    by_bits = []
    for sign, exponent, mantissa in itertools.product((1, -1), range(4), (0, 1)):
        by_bits.append(sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)))
    assert values.tolist() == by_bits
    assert values[8].signbit()
    assert torch.equal(E2M1.encode(values), codes)
    params = {"weight_scale": torch.full((1, 1), 127, dtype=torch.uint8)}
    packed = Fp4Block(kind="mxfp4").pack(Codes(torch.tensor([[1, 15] + [0] * 30], dtype=torch.uint8), params))
    assert packed["weight_packed"][0, 0] == 0xF1  # even column in the low nibble


def test_rounding_is_to_the_nearest_and_ties_go_to_the_even_code() -> None:
    x = torch.cat((torch.linspace(-8, 8, 6401), torch.tensor([1e-30, -1e-30, 1e30, -1e30, 0.0])))
    given = E2M1.round(x)
    table = E2M1.magnitudes.double()
    gap = (x.abs().double().unsqueeze(1) - table).abs()
    assert torch.equal((x - given).abs().double()[x.abs() <= 6], gap.amin(1)[x.abs() <= 6])
    assert (given.abs()[x.abs() > 6] == 6).all()
    assert torch.equal(given.signbit(), x.signbit())
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert E2M1.round(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_powers_of_two_are_exact() -> None:
    u = torch.arange(255, dtype=torch.uint8)
    assert e8m0_value(u).tolist() == [math.ldexp(1, e - 127) for e in range(255)]


def test_the_even_rule_puts_the_largest_weight_between_three_and_a_half_and_seven() -> None:
    absmax = torch.rand(4000, generator=torch.Generator().manual_seed(1)).mul_(60).sub_(30).exp_()
    inside = absmax.double() / 2.0 ** even_exponent(absmax).double()
    assert 3.5 <= inside.min() < 3.6
    assert 6.9 < inside.max() < 7
    assert even_exponent(torch.tensor([1.74, 1.75, 6.99, 7.0, 0.0])).tolist() == [-2, -1, 0, 1, 0]


@pytest.mark.parametrize(("kind", "bits"), [("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_bits_per_weight(kind: str, bits: float) -> None:
    assert Fp4Block(kind=kind).bits_per_weight(64, 512) == pytest.approx(bits, abs=1e-3 if kind == "nvfp4" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_a_decoded_weight_under_its_own_scales_changes_nothing(kind: str) -> None:
    fmt = Fp4Block(kind=kind)
    codes = fmt.nearest(normal())
    again = fmt.encode(fmt.dequantize(codes), codes.params)
    assert torch.equal(E2M1.decode(again.codes), E2M1.decode(codes.codes))  # -0 may have become 0


@pytest.mark.parametrize("power", [-9, 1, 20])
def test_a_power_of_two_moves_the_scales_and_no_code(power: int) -> None:
    w, factor = normal(), 2.0**power
    plain, moved = (Fp4Block(kind="mxfp4").nearest(t) for t in (w, w * factor))
    assert torch.equal(plain.codes, moved.codes)
    assert torch.equal(plain.params["weight_scale"].int() + power, moved.params["weight_scale"].int())
    plain, moved = (Fp4Block(kind="nvfp4").nearest(t) for t in (w, w * factor))
    assert torch.equal(plain.codes, moved.codes)
    assert torch.equal(plain.params["weight_scale"].float(), moved.params["weight_scale"].float())
    assert torch.equal(plain.params["weight_global_scale"] / factor, moved.params["weight_global_scale"])


@pytest.mark.parametrize(("kind", "error"), [("mxfp4", 0.118), ("nvfp4", 0.097)])
def test_the_error_is_that_of_the_format(kind: str, error: float) -> None:
    """On normal weights of every size; a nibble in the wrong place would lose several times as much."""
    fmt = Fp4Block(kind=kind)
    for octave in range(-12, 12, 3):
        w = normal(seed=octave + 20) * 1.3 * 2.0**octave
        assert float((fmt.dequantize(fmt.nearest(w)) - w).norm() / w.norm()) < error


def test_scales_stay_where_every_reader_is_exact() -> None:
    w = normal()
    w[0] *= 1e-8
    w[1] = 0
    scale = Fp4Block(kind="nvfp4").nearest(w).params["weight_scale"].float()
    assert scale.min() == 2**-6
    assert scale.max() == 448


def test_the_power_of_two_divisor_leaves_room_for_four_over_six() -> None:
    for absmax in (1e-3, 0.7, 6.0, 6.0001, 11.9, 1e4):
        divisor = float(power_divisor(torch.tensor(absmax)))
        assert math.frexp(divisor)[0] == 0.5
        assert 128 < divisor * absmax / 6 <= 256
    assert power_divisor(torch.tensor(0.0)).tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_k_that_the_block_does_not_divide_is_refused_and_never_refitted(kind: str) -> None:
    fmt = Fp4Block(kind=kind)
    assert str(fmt.refuses(8, 40)) == f"{kind} has blocks of {fmt.group} along K, which do not divide K = 40"
    assert "group" not in fmt.config()


def test_what_no_writer_emits_is_refused() -> None:
    w = normal(4, 64)
    for kind, field, value, message in (
        ("mxfp4", "weight_scale", 255, "weight_scale holds 255, the NaN of E8M0"),
        ("nvfp4", "weight_scale", -1.0, "weight_scale holds a negative number"),
        ("nvfp4", "weight_global_scale", 0.0, "weight_global_scale is 0; it divides"),
        ("nvfp4", "weight_scale", float("nan"), "weight_scale holds a NaN"),
    ):
        fmt = Fp4Block(kind=kind)
        fields = fmt.pack(fmt.nearest(w))
        damaged = fields[field].clone()
        damaged[0] = value
        with pytest.raises(ValueError, match=message):
            fmt.check(fields | {field: damaged}, 4, 64)
    with pytest.raises(ValueError, match="no kind 'nf4'; allowed: mxfp4, nvfp4"):
        Fp4Block(kind="nf4")
