"""Small floats: the tables of LLM-FP4 and of other libraries, and what rounding to them must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.minifloat import EXPONENTS, Minifloat, constant_table, constants, round_to, value_table

KINDS = [Minifloat(e, bits - 1 - e) for bits, exponents in EXPONENTS.items() for e in exponents]
every = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"e{kind.exponent}m{kind.mantissa}")
TABLES = {
    1: [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75],
    2: [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    3: [0, 0.25, 0.5, 1, 2, 4, 8, 16],
}


def around(kind: Minifloat, count: int = 20000) -> Tensor:
    """Numbers of every size on both sides of the largest value, every value, and every point half-way between two."""
    values = torch.cat((-kind.magnitudes.flip(0), kind.magnitudes))
    generator = torch.Generator().manual_seed(kind.exponent)
    x = torch.randn(count, generator=generator) * torch.randn(count, generator=generator).exp() * kind.largest / 4
    return torch.cat((x, values, (values[1:] + values[:-1]) / 2))


@pytest.mark.parametrize("exponent", TABLES)
def test_four_bit_tables(exponent: int) -> None:
    kind = Minifloat(exponent, 3 - exponent)
    values = kind.decode(torch.arange(16, dtype=torch.uint8))
    assert values[:8].tolist() == TABLES[exponent]
    assert values[8:].tolist() == [-v for v in TABLES[exponent]]
    assert values[8].signbit()


@pytest.mark.parametrize(("exponent", "dtype"), [(4, torch.float8_e4m3fn), (5, torch.float8_e5m2)])
def test_eight_bit_tables_are_those_of_torch(exponent: int, dtype: torch.dtype) -> None:
    """But for the codes that torch's dtypes give to infinity and NaN, which are ordinary numbers here."""
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(dtype).float()
    values = Minifloat(exponent, 7 - exponent).decode(codes)
    assert torch.equal(values[wanted.isfinite()], wanted[wanted.isfinite()])
    assert values.isfinite().all()


@every
def test_codes_are_in_order_and_survive(kind: Minifloat) -> None:
    codes = torch.arange(1 << kind.exponent + kind.mantissa + 1, dtype=torch.uint8)
    values = kind.decode(codes)
    assert (kind.magnitudes.diff() > 0).all()
    assert kind.magnitudes[-1] == kind.largest
    assert torch.equal(kind.encode(values), codes)


@every
def test_rounding_is_to_the_nearest_odd_monotone_and_idempotent(kind: Minifloat) -> None:
    x = around(kind).sort().values
    given, values = kind.round(x), torch.cat((-kind.magnitudes.flip(0), kind.magnitudes)).double()
    gap = torch.stack([(part.double().unsqueeze(1) - values).abs().amin(1) for part in x.split(512)[:-1]]).flatten()
    lost = (x.double() - given.double()).abs()[: len(gap)]
    inside = x.abs()[: len(gap)] <= kind.largest
    assert torch.equal(lost[inside], gap[inside])
    assert (given[x > kind.largest] == kind.largest).all()
    assert torch.equal(kind.round(-x), -given)
    assert (given.diff() >= 0).all()
    assert torch.equal(kind.round(given), given)


def test_ties() -> None:
    """To the even code, and between powers of two upwards: x / v = 1.5 is rounded to 2."""
    e2m1, e3m0 = Minifloat(2, 1), Minifloat(3, 0)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert e3m0.round(torch.tensor([0.125, 0.75, 1.5, 3, 6, 12])).tolist() == [0, 1, 2, 4, 8, 16]


@every
def test_rounding_is_the_formula_of_the_paper(kind: Minifloat) -> None:
    """Eq. 8 and 9: E = max(1, floor(log2 |x| + b)), v = 2^(E - m - b), v * round(x / v)."""
    x = around(kind).double().clamp(-kind.largest, kind.largest)
    binade = torch.frexp(x.abs()).exponent - 1 + kind.bias  # floor(log2 |x|) + b, exact
    v = torch.exp2(binade.clamp_min(1).double() - kind.mantissa - kind.bias)
    assert torch.equal(kind.round(x.float()).double(), v * (x / v).round())


@every
@pytest.mark.parametrize("shift", [-7, 1, 12])
def test_a_bias_is_a_scale(kind: Minifloat, shift: int) -> None:
    """Q with bias b is 2^(b0 - b) Q0(x 2^(b - b0)): scaling by a power of two moves the grid and nothing else."""
    x = around(kind)
    grid = torch.cat((-kind.magnitudes.flip(0), kind.magnitudes)).double() * 2.0**-shift
    given = (kind.round(x * 2.0**shift) * 2.0**-shift).double()
    part = slice(0, 2000)
    inside = x[part].abs() <= grid.max()
    gap = (x[part].double().unsqueeze(1) - grid).abs().amin(1)
    assert torch.equal((x[part].double() - given[part]).abs()[inside], gap[inside])


@every
def test_tables_say_the_same_as_the_kinds(kind: Minifloat) -> None:
    bits, x = kind.exponent + kind.mantissa + 1, around(kind)
    row = constant_table(bits)[kind.exponent]
    assert row.tolist() == list(constants(kind))
    assert torch.equal(round_to(x, *row), kind.round(x))
    assert torch.equal(value_table(bits)[kind.exponent], kind.decode(torch.arange(1 << bits)))
    assert kind.round(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("exponent", TABLES)
def test_shifted_values_are_exact_in_fp8(exponent: int) -> None:
    """2^-n value, n up to 2^e - 1: what an fp8 or bfloat16 multiplication must hold."""
    kind = Minifloat(exponent, 3 - exponent)
    for n in range(kind.reach + 1):
        shifted = kind.magnitudes * 2.0**-n
        assert torch.equal(shifted.to(torch.float8_e4m3fn).float(), shifted)
        assert torch.equal(shifted.bfloat16().float(), shifted)
