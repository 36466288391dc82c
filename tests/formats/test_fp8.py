"""fp8: torch's own E4M3, exact on its grid, half a step away from anything else, and no NaN on disk."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.activations.fp8_token import Fp8Token
from quant.kernels.format import Codes
from quant.kernels.formats.fp8 import E4M3, LARGEST, Fp8

FMT = Fp8()


def test_every_number_of_the_grid_is_kept() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].view(2, -1)  # which are NaN
    scale = torch.tensor([[0.25], [3.0]])
    weight = FMT.dequantize(Codes(codes, {"weight_scale": scale}))
    assert torch.equal(weight, codes.view(E4M3).float() * scale)
    again = FMT.nearest(weight)
    assert torch.equal(FMT.dequantize(again), weight)
    assert torch.equal(again.params["weight_scale"], scale)
    fields = FMT.pack(again)
    FMT.check(fields, *weight.shape)
    back = FMT.unpack(fields, *weight.shape)
    assert torch.equal(back.codes, again.codes)


def test_the_largest_weight_of_a_row_is_kept_and_others_are_half_a_step_away() -> None:
    weight = torch.randn(17, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 17).unsqueeze(1)
    weight[3] = 0
    found = FMT.dequantize(FMT.nearest(weight))
    top = weight.abs().amax(1)
    assert torch.allclose(found.abs().amax(1), top, rtol=1e-6)
    assert bool(((found - weight).abs() <= weight.abs() * 2**-4 + top.unsqueeze(1) / LARGEST * 2**-10 * 1.001).all())
    assert bool((found[3] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_is_rounded_by_itself(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 5).unsqueeze(1)).to(dtype)
    x[4] = 0
    rule = Fp8Token()
    found = rule.quantize(x, {})
    assert torch.equal(found[2:3], rule.quantize(x[2:3], {})), "whatever other tokens are there"
    assert float((found - x.float()).norm() / x.float().norm()) < 0.03
    assert torch.equal(rule.quantize(8 * x.float(), {}), 8 * rule.quantize(x.float(), {}))
