"""int4_dual: golden bytes, two-step dequantization, and no weight whatsoever that leaves int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.format import Codes
from quant.kernels.formats.int4_dual import Int4Dual, factor_steps, largest_step


def all_codes(params: dict[str, Tensor]) -> Tensor:
    """What each group stands for under codes 0 .. 15, in wide integers: [N, K // G, 16]."""
    s2, o = params["group_scale"].long(), params["group_offset"].long()
    return s2.unsqueeze(-1) * torch.arange(16) + o.unsqueeze(-1)


def test_golden_bytes() -> None:
    fmt = Int4Dual(group=4)
    codes = torch.tensor([[1, 2, 3, 4, 0, 15, 8, 7]], dtype=torch.uint8)
    params = fmt.params(torch.tensor([0.5]), torch.tensor([[16.0, 1.0]]), torch.tensor([[8.0, 0.0]]))
    packed = fmt.pack(Codes(codes, params))
    assert packed["weight_packed"].tolist() == [[0x21, 0x43, 0xF0, 0x78]]
    assert packed["group_scale"].tolist() == [[16, 1]]
    assert packed["group_offset"].tolist() == [[-128, 0]]
    assert packed["row_scale"].numpy().tobytes() == bytes([0, 0, 0, 0x3F])
    assert fmt.integers(Codes(codes, params)).tolist() == [[-112, -96, -80, -64, 0, 15, 8, 7]]
    assert fmt.dequantize(Codes(codes, params)).tolist() == [[-56, -48, -40, -32, 0, 7.5, 4, 3.5]]


@pytest.mark.parametrize(("group", "k"), [(64, 576), (96, 576), (128, 4096)])
def test_bits_per_weight(group: int, k: int) -> None:
    assert Int4Dual(group=group).bits_per_weight(12, k) == pytest.approx(4 + 16 / group + 32 / k)


def test_two_step_dequantization_is_the_formula() -> None:
    """int8((u * s2 + o) mod 256) == (u - z) * s2, then times row_scale, for every legal (s2, z) and all 16 codes."""
    pairs = [(s, z) for z in range(16) for s in range(1, 18) if (15 - z) * s <= 127 and z * s <= 128]
    s2, zero = (torch.tensor(column, dtype=torch.float32).unsqueeze(1) for column in zip(*pairs, strict=True))
    fmt, row_scale = Int4Dual(group=16), torch.rand(len(pairs)) + 0.5
    codes = Codes(torch.arange(16, dtype=torch.uint8).expand(len(pairs), 16).contiguous(), fmt.params(row_scale, s2, zero))
    exact = (torch.arange(16) - zero.long()) * s2.long()
    assert torch.equal(fmt.integers(codes).long(), exact)
    wrapped = (codes.codes.long() * s2.long() + (-zero.long() * s2.long()) % 256) % 256
    assert torch.equal(wrapped.to(torch.uint8).view(torch.int8).long(), exact)
    assert torch.allclose(fmt.dequantize(codes).double(), exact * row_scale.double().unsqueeze(1), rtol=1e-7)


def test_largest_step_is_the_largest() -> None:
    zero = torch.arange(16.0)
    for z, s in zip(range(16), largest_step(zero).int().tolist(), strict=True):
        assert (15 - z) * s <= 127
        assert z * s <= 128
        assert (15 - z) * (s + 1) > 127 or z * (s + 1) > 128


def adversarial() -> dict[str, Tensor]:
    """Weights [8, 128] that have broken dual-grained encoders elsewhere."""
    noise = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    mixed = noise.clone()
    mixed[:, :32] += 40
    mixed[:, 32:64] -= 40
    return {
        "far above zero": 100 + noise * 0.01,
        "far below zero": -100 + noise * 0.01,
        "one-sided groups of both signs": mixed,
        "constant": torch.full((8, 128), 3.7),
        "groups a million apart": noise * torch.tensor([1e-3, 1, 1e3, 1e-3]).repeat_interleave(32),
        "huge": noise * 1e30,
        "denormal": noise * 1e-41,
        "one spike per row": torch.zeros(8, 128).index_fill_(1, torch.tensor([77]), -5.0),
        "all zero": torch.zeros(8, 128),
        "full int8 swing": torch.where(noise > 0, 119.0, -119.0),
    }


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("kind", adversarial())
def test_all_sixteen_codes_of_every_group_stay_in_int8(kind: str, group: int) -> None:
    fmt, w = Int4Dual(group=group), adversarial()[kind]
    codes = fmt.nearest(w)
    fmt.check(fmt.pack(codes), *w.shape)
    reach = all_codes(dict(codes.params))
    assert reach.min() >= -128
    assert reach.max() <= 127
    assert (codes.params["group_scale"] >= 1).all()
    assert (codes.params["row_scale"] > 0).all()
    back = fmt.dequantize(codes)
    assert back.isfinite().all()
    row_scale = codes.params["row_scale"].double().view(8, 1, 1)
    ends = reach[..., :1] * row_scale, reach[..., 15:] * row_scale
    grouped = w.double().view(8, -1, group)
    half = codes.params["group_scale"].double().unsqueeze(-1) * row_scale * (0.5 + 1e-5) + 2e-45  # and a denormal's rounding
    error = (back.double().view(8, -1, group) - grouped.clamp(*ends)).abs()
    assert (error <= half).all()


def test_the_error_is_that_of_four_bits() -> None:
    """A tenth of a normal weight; a grid that wasted a bit would lose two tenths."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2)) * 0.02
    fmt = Int4Dual(group=64)
    assert float((fmt.dequantize(fmt.nearest(w)) - w).norm() / w.norm()) < 0.115
    small = w * 1e-4  # the row scale is float32: small weights lose no more than large ones
    assert float((fmt.dequantize(fmt.nearest(small)) - small).norm() / small.norm()) < 0.115


def test_factor_steps_leaves_groups_narrower_than_the_widest_their_share() -> None:
    step, zero = torch.tensor([[16.0, 8.0, 1.0, 0.0]]), torch.full((1, 4), 8.0)
    row_scale, s2 = factor_steps(step, zero)
    assert row_scale.tolist() == [1.0]
    assert s2.tolist() == [[16.0, 8.0, 1.0, 1.0]]
    finer, s2 = factor_steps(step, zero, ratio=0.5)
    assert finer.tolist() == [0.5]
    assert s2.tolist() == [[16.0, 16.0, 2.0, 1.0]]  # the widest is held where no code can overflow


def test_codes_that_could_leave_int8_are_refused() -> None:
    fmt = Int4Dual(group=16)
    good = fmt.pack(fmt.nearest(torch.randn(3, 32)))
    scale, offset = good["group_scale"].clone(), good["group_offset"].clone()
    scale[1, 1], offset[1, 1] = 9, -7  # 15 * 9 - 7 = 128
    with pytest.raises(ValueError, match=r"group_scale and group_offset of row 1 reach 128"):
        fmt.check(good | {"group_scale": scale, "group_offset": offset}, 3, 32)
    offset[1, 1] = -8
    fmt.check(good | {"group_scale": scale, "group_offset": offset}, 3, 32)


def test_shapes_that_do_not_fit_are_refused() -> None:
    assert Int4Dual(group=64).refuses(8, 100) == "group 64 does not divide K = 100"
    for group in (0, -1, 3):
        with pytest.raises(ValueError, match=f"group {group}"):
            Int4Dual(group=group)
