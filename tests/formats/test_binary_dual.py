"""binary_dual: golden bytes, sizes, the look-up table and FDB's rounding rule, orientation, what is refused."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.format import Codes
from quant.kernels.formats.binary_dual import BinaryDual, levels

GROUPS = (16, 48, -1)


def weights(n: int = 6, k: int = 96) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(2)) * 0.05


def test_golden_bytes() -> None:
    """One 64-bit word of 32 columns of each plane; bit i of a half is column 32 c + i; columns past K are 0."""
    codes = torch.zeros(1, 40, dtype=torch.uint8)
    codes[0, [0, 9, 39]] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    scale = torch.tensor([[[0.5, -0.25]]])
    packed = BinaryDual(group=-1).pack(Codes(codes, {"weight_scale": scale}))
    assert packed["weight_packed"].tolist() == [[1, 0, 0, 0, 0, 2, 0, 0] + [0x80, 0, 0, 0] * 2]
    assert packed["weight_packed"].view(torch.int32).tolist() == [[1 << 0, 1 << 9, 1 << 7, 1 << 7]]
    assert packed["weight_scale"].tolist() == [[[0.5, -0.25]]]


@pytest.mark.parametrize("group", GROUPS)
def test_a_weight_is_a_look_up_and_a_sum_of_planes(group: int) -> None:
    fmt, (n, k) = BinaryDual(group=group), (3, 96)
    codes = torch.randint(0, 4, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale = torch.randn(n, fmt.groups(k), 2, generator=torch.Generator().manual_seed(3)).to(fmt.scale_dtype)
    given = fmt.dequantize(Codes(codes, {"weight_scale": scale}))
    for i in range(n):
        for j in range(k):
            a1, a2 = scale[i, j * fmt.groups(k) // k].tolist()
            code = int(codes[i, j])
            assert float(given[i, j]) == pytest.approx([0, a1, a2, a1 + a2][code], abs=1e-6)
            assert float(given[i, j]) == pytest.approx(a1 * (code & 1) + a2 * (code >> 1), abs=1e-6)


@pytest.mark.parametrize(("group", "size"), [(64, 2.5), (96, 2 + 32 / 96), (128, 2.25), (-1, 2 + 64 / 768)])
def test_bits_per_weight(group: int, size: float) -> None:
    assert BinaryDual(group=group).bits_per_weight(10, 768) == pytest.approx(size)


def test_columns_of_padding_are_counted() -> None:
    assert BinaryDual(group=16).stored_bytes(10, 48) == 10 * (2 * 8 + 3 * 4)


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_steps_are_a_clipped_uniform_grid(sign: int) -> None:
    """a1 = 2 s, a2 = -s: s * clip(round(w / s), -1, 2); the mirror image with both signs turned."""
    w, s = weights(), 0.03
    params = {"weight_scale": torch.tensor([2 * s, -s]).mul(sign).expand(6, 1, 2)}
    fmt = BinaryDual(group=-1)
    given = fmt.dequantize(Codes(fmt.project(w, params), params))
    assert torch.allclose(given, sign * s * (sign * w / s).round().clamp(-1, 2), atol=1e-7)


def test_project_is_the_threshold_rule_of_the_paper() -> None:
    """B1 = H(w - (a1 + a2) / 2), B2 = H(-(w - a1 B1 - a2 / 2)), for a1 > -a2 > 0; and it is idempotent."""
    fmt, w = BinaryDual(group=16), weights()
    scale = torch.rand(6, 6, 2, generator=torch.Generator().manual_seed(4)) * 0.05
    scale = torch.stack((scale.sum(-1) + 0.001, -scale[..., 1] - 0.0005), -1)
    a1, a2 = (a.repeat_interleave(16, 1) for a in scale.unbind(-1))
    first = (w >= (a1 + a2) / 2).float()
    second = (w - a1 * first - a2 / 2 <= 0).float()
    codes = fmt.project(w, {"weight_scale": scale})
    assert torch.equal(codes, (first + 2 * second).to(torch.uint8))
    back = fmt.dequantize(Codes(codes, {"weight_scale": scale}))
    assert torch.equal(fmt.dequantize(Codes(fmt.project(back, {"weight_scale": scale}), {"weight_scale": scale})), back)
    distance = torch.stack([(w - level.repeat_interleave(16, 1)).abs() for level in levels(scale)])
    assert torch.allclose((back - w).abs(), distance.amin(0), atol=1e-7)


def test_swapped_planes_are_the_same_weight() -> None:
    codes = BinaryDual(group=16).nearest(weights())
    swapped = Codes(codes.codes >> 1 | (codes.codes & 1) << 1, {"weight_scale": codes.params["weight_scale"].flip(-1)})
    fmt = BinaryDual(group=16)
    assert torch.allclose(fmt.dequantize(swapped), fmt.dequantize(codes), atol=1e-8)


@pytest.mark.parametrize("group", GROUPS)
def test_the_full_range_keeps_the_largest_weight_whatever_its_sign(group: int) -> None:
    fmt, w = BinaryDual(group=group), weights()
    codes = fmt.nearest(w)
    scale = codes.params["weight_scale"].float()
    assert torch.equal(scale[..., 0], -2 * scale[..., 1])
    grouped, given = (t.view(6, fmt.groups(96), -1) for t in (w, fmt.dequantize(codes)))
    at = grouped.abs().argmax(-1, keepdim=True)
    assert torch.allclose(given.gather(-1, at), grouped.gather(-1, at), rtol=5e-4)
    assert bool((scale[..., 0] > 0).any())
    assert bool((scale[..., 0] < 0).any())


def test_shares_count_zero_bits() -> None:
    codes = Codes(torch.tensor([[0, 0, 1, 2, 3, 0, 0, 1]], dtype=torch.uint8), {})
    assert BinaryDual().shares(codes) == {"zero_bits_1": 5 / 8, "zero_bits_2": 6 / 8, "zero_weights": 4 / 8}


def test_bits_beyond_the_last_column_are_refused() -> None:
    fmt = BinaryDual(group=16)
    good = fmt.pack(fmt.nearest(weights(2, 48)))
    fmt.check(good, 2, 48)
    bad = good["weight_packed"].clone()
    bad[1, -5] = 1  # plane 1 of columns 56 to 63
    with pytest.raises(ValueError, match="bits set beyond column 48"):
        fmt.check(good | {"weight_packed": bad}, 2, 48)


@pytest.mark.parametrize(("options", "message"), [({"bits": 3}, "two planes"), ({"group": 0}, "group 0")])
def test_impossible_parameters_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryDual(**options)
