"""int_group: golden bytes, sizes by hand, meaning of the codes, error of round-to-nearest."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.format import Codes
from quant.kernels.formats.int_group import BITS, IntGroup, pack_bits, unpack_bits


@pytest.mark.parametrize(
    ("bits", "codes", "stream"),
    [
        (2, [3, 0, 1, 2, 0, 0, 0, 1], [0b10_01_00_11, 0b01_00_00_00]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),  # 0o07654321: codes 2 and 5 straddle bytes
        (3, [0, 0, 7, 0, 0, 4, 0, 0], [0xC0, 0x01, 0x02]),
        (4, [1, 2, 15, 0], [0x21, 0x0F]),
        (6, [1, 2, 62, 0], [0x81, 0xE0, 0x03]),  # 0o00760201
        (8, [0, 255, 7, 128], [0, 255, 7, 128]),
    ],
)
def test_golden_bytes(bits: int, codes: list[int], stream: list[int]) -> None:
    rows = torch.tensor([codes, codes[::-1]], dtype=torch.uint8)
    packed = pack_bits(rows, bits)
    assert packed[0].tolist() == stream
    assert torch.equal(unpack_bits(packed, bits, len(codes)), rows)


@pytest.mark.parametrize("bits", BITS)
def test_all_codes_survive(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 240), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    codes[0, : 2**bits if bits < 8 else 240] = torch.arange(min(2**bits, 240), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, 240), codes)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"bits": 4, "group": 64, "symmetric": False}, 4 + (16 + 8) / 64),
        ({"bits": 3, "group": 96, "symmetric": True}, 3 + 16 / 96),
        ({"bits": 6, "group": 64, "symmetric": False}, 6 + (16 + 8) / 64),
        ({"bits": 2, "group": 16, "symmetric": False}, 2 + (16 + 8) / 16),
        ({"bits": 8, "group": -1, "symmetric": True}, 8 + 32 / 192),
        ({"bits": 8, "group": -1, "symmetric": False}, 8 + (32 + 8) / 192),
    ],
)
def test_bits_per_weight(options: dict[str, int], bits: float) -> None:
    assert IntGroup(**options).bits_per_weight(10, 192) == pytest.approx(bits)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 48, -1])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize_is_the_formula(bits: int, group: int, symmetric: bool) -> None:
    """w[n, k] = scale[n, k // G] * (code[n, k] - zero), element by element in float64."""
    fmt, (n, k) = IntGroup(bits=bits, group=group, symmetric=symmetric), (3, 96)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    groups = 1 if group == -1 else k // group
    scale = (torch.rand(n, groups, generator=generator) + 0.01).to(torch.float32 if group == -1 else torch.float16)
    zero = torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    params = {"weight_scale": scale} if symmetric else {"weight_scale": scale, "weight_zero": zero}
    back = fmt.dequantize(Codes(codes, params))
    assert back.dtype == torch.float32
    for row in range(n):
        for col in range(k):
            at = col * groups // k
            offset = 2 ** (bits - 1) if symmetric else int(zero[row, at])
            wanted = float(scale[row, at]) * (int(codes[row, col]) - offset)
            assert float(back[row, col]) == pytest.approx(wanted, rel=1e-6), (row, col)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 96, -1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_nearest_is_within_half_a_step(bits: int, group: int, symmetric: bool, shift: float) -> None:
    """Beyond it only by what rounding the scale to its stored dtype takes off the range."""
    fmt = IntGroup(bits=bits, group=group, symmetric=symmetric)
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(bits)) + shift
    codes = fmt.nearest(w)
    step = codes.params["weight_scale"].double().repeat_interleave(96 // fmt.groups(96), 1)
    lost_by_dtype = 2**bits * torch.finfo(fmt.scale_dtype).eps
    assert ((fmt.dequantize(codes).double() - w).abs() <= step * (0.5 + lost_by_dtype)).all()
    span = w.view(6, fmt.groups(96), -1)
    wide = 2 * span.abs().amax(-1) if symmetric else span.amax(-1).clamp_min(0) - span.amin(-1).clamp_max(0)
    levels = 2**bits - 2 if symmetric else 2**bits - 1
    assert torch.allclose(codes.params["weight_scale"].float(), wide / levels, rtol=1e-3)  # no wider than it must be


def test_a_zero_beyond_the_codes_is_refused() -> None:
    for bits in (2, 3, 4):
        fmt = IntGroup(bits=bits, group=16)
        good = fmt.pack(fmt.nearest(torch.randn(2, 32)))
        with pytest.raises(ValueError, match=f"weight_zero holds {2**bits}; {bits} bits allow 0 to {2**bits - 1}"):
            fmt.check(good | {"weight_zero": torch.full((2, 2), 2**bits, dtype=torch.uint8)}, 2, 32)


@pytest.mark.parametrize(
    ("options", "message"), [({"bits": 5}, "5-bit"), ({"group": 0}, "group 0"), ({"group": -2}, "group -2")]
)
def test_impossible_parameters_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IntGroup(**options)


def test_a_row_that_is_no_whole_number_of_bytes_is_refused() -> None:
    assert "whole number of bytes" in str(IntGroup(bits=3, group=-1).refuses(4, 20))
    assert IntGroup(bits=4, group=-1).refuses(4, 20) is None
