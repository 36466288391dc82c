"""int_static: codes inside their range, the integer epilogue, a fit that clips, and damaged tensors named."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.activation import from_config
from quant.kernels.activations.int_static import IntStatic, grid, on_grid, search_ends


@pytest.mark.parametrize("zeros", ["layer", "channel"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_product_is_an_integer_product_with_a_constant_per_output(bits: int, zeros: str) -> None:
    """sum (q - z) w == sum q w - c_n in integers, c_n independent of the tokens."""
    generator = torch.Generator().manual_seed(bits)
    rule = IntStatic(bits=bits, zeros=zeros)
    x, w = torch.randn(50, 24, generator=generator) + 0.4, torch.randint(-8, 8, (5, 24), generator=generator)
    fields = rule.stored(
        torch.tensor(0.11), torch.randint(0, 2**bits, (24 if zeros == "channel" else 1,), generator=generator), 24
    )
    rule.check(fields, 5, 24)
    zero = fields["input_zero"].long()
    codes = (torch.round(x / 0.11) + zero).clamp(0, 2**bits - 1).long()
    constant = w @ zero.expand(24)
    assert torch.equal((codes - zero) @ w.T, codes @ w.T - constant)
    wanted = 0.11 * ((codes - zero) @ w.T).double()
    got = rule.quantize(x, fields).double() @ w.T.double()
    assert float((got - wanted).norm() / wanted.norm()) < 1e-6


def test_the_fit_is_no_worse_than_the_full_range_and_clips_outliers() -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) + 1
    x[3, 5] = 60
    rule = IntStatic(bits=4)
    fitted = rule.quantize(x, rule.fit(x, x.abs().amax(0)))
    whole = on_grid(x, *grid(x.amin(), x.amax(), 16), 16)
    assert (fitted - x).norm() < 0.5 * (whole - x).norm()
    assert float(rule.quantize(x, rule.fit(x, x))[3, 5]) < 30
    for flat in (torch.zeros(4, 8), torch.full((4, 8), 3.0), torch.full((4, 8), -2.0)):
        fields = rule.fit(flat, flat)
        rule.check(fields, 3, 8)
        assert rule.quantize(flat, fields).isfinite().all()


def test_the_search_keeps_the_ends_it_starts_from_where_nothing_is_better() -> None:
    low, high = torch.tensor(-2.0), torch.tensor(3.0)
    assert search_ends(low, high, lambda a, b: (a - low) ** 2 + (b - high) ** 2) == (low, high)
    got = search_ends(low, high, lambda a, b: (a + 1) ** 2 + (b - 0.3) ** 2)
    assert [float(end) for end in got] == pytest.approx([-1.0, 0.3])


def test_config_and_refusals() -> None:
    for rule in (IntStatic(bits=4), IntStatic(bits=6, zeros="channel", rotate=32), IntStatic()):
        assert from_config(rule.config()) == rule
    assert IntStatic(bits=4, zeros="channel").fields(48)["input_zero"].shape == (48,)
    for wrong, told in (({"bits": 5}, "4, 6, 8"), ({"zeros": "token"}, "layer, channel"), ({"bit": 4}, "bits")):
        with pytest.raises(ValueError, match=told):
            from_config({"name": "int_static", **wrong})
    rule, fields = IntStatic(bits=4), IntStatic(bits=4).fit(torch.randn(9, 16), torch.ones(16))
    for name, value, told in (
        ("input_scale", torch.tensor([-1.0]), "positive"),
        ("input_scale", torch.tensor([torch.nan]), "NaN"),
        ("input_zero", torch.tensor([3]), "int32"),
    ):
        with pytest.raises(ValueError, match=told):
            rule.check({**fields, name: value}, 4, 16)
