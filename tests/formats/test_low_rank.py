"""low_rank: golden bytes, the bits it costs, what it adds to its base, what is refused."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.format import Codes, from_config
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.formats.low_rank import LowRank, nearest_product

BASE = IntGroup(bits=2, group=16, symmetric=True)


def test_golden_bytes() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(4).view(2, 16)
    coded = Codes(codes, {"weight_scale": torch.tensor([[0.5], [1.0]]).half()})
    fmt = LowRank(rank=1, base=BASE)
    packed = fmt.pack(fmt.beside(coded, torch.tensor([[1.0], [-2.0]]), torch.ones(1, 16)))
    assert {n: t for n, t in packed.items() if n.startswith("weight")}.keys() == BASE.fields(2, 16).keys()
    assert torch.equal(packed["weight_packed"], BASE.pack(coded)["weight_packed"])
    assert packed["side_in"].tolist() == [[1.0] * 16]
    assert packed["side_out"].tolist() == [[1.0], [-2.0]]
    assert fmt.dequantize(fmt.unpack(packed, 2, 16))[1, :4].tolist() == [-4.0, -3.0, -2.0, -1.0]


@pytest.mark.parametrize("base", [BASE, BinaryDual(group=32)])
def test_a_side_path_takes_what_it_can_of_the_error_and_its_bits_are_counted(base: IntGroup | BinaryDual) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((weight - base.dequantize(base.nearest(weight))).square().sum())]
    for rank in (1, 4, 16):
        fmt = LowRank(rank=rank, base=base)
        errors.append(float((weight - fmt.dequantize(fmt.nearest(weight))).square().sum()))
        assert fmt.bits_per_weight(48, 64) == pytest.approx(base.bits_per_weight(48, 64) + 16 * rank * (48 + 64) / (48 * 64))
    lost = weight - base.dequantize(base.nearest(weight))
    sizes = torch.linalg.svdvals(lost).square()
    assert errors[1:] == pytest.approx([float(sizes[rank:].sum()) for rank in (1, 4, 16)], rel=1e-2)
    assert errors == sorted(errors, reverse=True)


def test_the_nearest_product_is_the_truncated_singular_value_decomposition() -> None:
    left, right = torch.randn(9, 3), torch.randn(3, 20)
    found = nearest_product(left @ right, 3)
    assert torch.allclose(found[0] @ found[1], left @ right, atol=1e-4)
    assert torch.allclose(found[0].norm(dim=0), found[1].norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "no rank 0"),
        ({"rank": 1.5}, "must be of type int"),
        ({"base": 3}, "must be a format"),
        ({"alpha": 1}, "no parameter 'alpha'"),
        ({"base": {"name": "fp4_block", "kind": "nvfp4"}}, "parts of which belong to a weight as a whole"),
        ({"base": {"name": "low_rank"}}, "cannot stand beside low_rank"),
    ],
)
def test_what_is_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config({"name": "low_rank", **config})
    assert LowRank(rank=48, base=BASE).refuses(48, 64) is not None
    assert Fp4Block(kind="mxfp4").whole or LowRank(base=Fp4Block(kind="mxfp4")).refuses(48, 64) is None
