"""fp_channel: golden bytes, sizes, the meaning of the codes, the full range, what is refused."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.format import Codes
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.minifloat import EXPONENTS

VARIANTS = [(bits, group) for bits in (4, 8) for group in (-1, 16, 48)]


def weights(n: int = 6, k: int = 96) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(2)) * 0.05


def test_golden_bytes() -> None:
    w = torch.tensor([[6.0, -6, 0.5, 0, 3, -1.5, 2, 0.2], [0.6, -0.6, 0.05, 0, 0.3, -0.15, 0.2, 0.02]])
    packed = FpChannel().pack(FpChannel().nearest(w))
    assert packed["weight_packed"].tolist() == [[0xF7, 0x01, 0xB5, 0x04]] * 2  # even k in the low nibble
    assert packed["weight_scale"].flatten().tolist() == pytest.approx([1, 0.1])
    assert packed["weight_exponents"].tolist() == [2]


@pytest.mark.parametrize(("bits", "group"), VARIANTS)
def test_dequantize_is_the_formula(bits: int, group: int) -> None:
    fmt, (n, k) = FpChannel(bits=bits, group=group), (3, 96)
    for e in EXPONENTS[bits]:
        m, b = bits - 1 - e, max(1, 2 ** (e - 1) - 1)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(e))
        scale = (torch.rand(n, fmt.groups(k)) + 0.01).to(fmt.scale_dtype)
        given = fmt.dequantize(Codes(codes, {"weight_scale": scale, "weight_exponents": torch.tensor([e], dtype=torch.uint8)}))
        for i in range(n):
            for j in range(0, k, 7):
                code = int(codes[i, j])
                p, fraction = code >> m & 2**e - 1, code % 2**m / 2**m
                value = 2.0 ** (p - b) * (1 + fraction) if p else 2.0 ** (1 - b) * fraction
                step = float(scale[i, j // (k // scale.shape[1])])
                assert float(given[i, j]) == pytest.approx(step * value * (-1) ** (code >> bits - 1), rel=1e-6)


@pytest.mark.parametrize(("bits", "group", "size"), [(4, -1, 4 + 32 / 96), (8, -1, 8 + 32 / 96), (4, 48, 4 + 16 / 48)])
def test_bits_per_weight(bits: int, group: int, size: float) -> None:
    assert FpChannel(bits=bits, group=group).bits_per_weight(1 << 16, 96) == pytest.approx(size, abs=1e-5)


@pytest.mark.parametrize(("bits", "group"), VARIANTS)
def test_the_full_range_keeps_the_largest_weight(bits: int, group: int) -> None:
    fmt, w = FpChannel(bits=bits, group=group), weights()
    for e in EXPONENTS[bits]:
        back = fmt.dequantize(fmt.encode(w, fmt.range_step(w, e), e))
        grouped, given = (t.view(6, fmt.groups(96), -1) for t in (w, back))
        at = grouped.abs().argmax(-1, keepdim=True)
        kept, wanted = given.gather(-1, at), grouped.gather(-1, at)
        assert ((kept - wanted).abs() <= wanted.abs() * (1e-6 if group == -1 else 5e-4)).all(), e  # float16 scales


@pytest.mark.parametrize(("bits", "group"), VARIANTS)
def test_rounding_again_changes_nothing(bits: int, group: int) -> None:
    fmt = FpChannel(bits=bits, group=group)
    codes = fmt.nearest(weights())
    again = fmt.encode(fmt.dequantize(codes), codes.params["weight_scale"].float(), int(codes.params["weight_exponents"]))
    assert torch.equal(again.codes, codes.codes)


def test_what_no_writer_emits_is_refused() -> None:
    for bits, e in ((4, 0), (4, 4), (8, 6)):
        fmt = FpChannel(bits=bits)
        fields = fmt.pack(fmt.nearest(weights()))
        with pytest.raises(ValueError, match=rf"weight_exponents holds {e}; {bits} bits allow 1, 2, 3"):
            fmt.check(fields | {"weight_exponents": torch.tensor([e], dtype=torch.uint8)}, 6, 96)
    with pytest.raises(ValueError, match="no 5-bit codes; allowed: 4, 8"):
        FpChannel(bits=5)
    with pytest.raises(ValueError, match="group 0 is not allowed"):
        FpChannel(group=0)
    assert "not a whole number of bytes" in str(FpChannel().refuses(4, 9))
