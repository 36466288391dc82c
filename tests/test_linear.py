"""PackedLinear: one module, two layouts, one set of canonical bytes."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from quant.kernels.activation import Activation
from quant.kernels.activations.int4_group import Int4Group
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Format
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.linear import PackedLinear

N, K = 48, 64
SCHEMES = [
    (IntGroup(bits=4, group=32), Unquantized()),
    (IntGroup(bits=3, group=64), Unquantized()),
    (IntGroup(bits=8, group=-1, symmetric=True), Int8Token()),
    (Int4Dual(group=32), Int8Token()),
]


def make(fmt: Format, activation: Activation, bias: bool = True, dtype: torch.dtype = torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    packed = fmt.pack(fmt.nearest(torch.randn(N, K)))
    return PackedLinear.from_fields(packed, fmt, activation, N, K, torch.randn(N).to(dtype) if bias else None)


def canonical(layer: PackedLinear) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize(("fmt", "activation"), [*SCHEMES, (IntGroup(bits=6, group=32), Int4Group())], ids=str)
def test_unpacked_it_gives_the_same_bits_and_bytes(fmt: Format, activation: Activation) -> None:
    layer, other = make(fmt, activation), make(fmt, activation)
    other.unpack()
    x = torch.randn(7, K)
    assert torch.equal(layer(x), other(x))
    assert same(canonical(layer), canonical(other))
    if layer.kernel is not None and layer.kernel.name == "reference":
        assert any(torch.equal(t, layer.weight) for t in other.bound()[1] if t.shape == (N, K))
    other.unpack()
    other.unbind()
    assert same(canonical(layer), canonical(other))


@pytest.mark.parametrize(("fmt", "activation"), SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_definition(fmt: Format, activation: Activation, bias: bool) -> None:
    layer = make(fmt, activation, bias)
    x = torch.randn(2, 5, K)
    want = nn.functional.linear(activation.quantize(x, {}), layer.weight, layer.bias)
    got = layer(x)
    assert got.shape == (2, 5, N)
    assert got.dtype == x.dtype
    assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))
    assert torch.equal(layer(x.transpose(0, 1)), got.transpose(0, 1))  # input that is not contiguous
    assert layer(x[:, :0]).shape == (2, 0, N)


@pytest.mark.parametrize(("fmt", "activation"), SCHEMES, ids=str)
def test_state_dict_is_canonical_bound_and_unbound(fmt: Format, activation: Activation) -> None:
    layer = make(fmt, activation)
    fields = dict(layer.fields())
    before = canonical(layer)
    assert set(before) == {*fmt.fields(N, K), "bias"}
    layer(torch.randn(3, K))
    assert layer.kernel is not None
    assert same(canonical(layer), before)
    assert sum(p.numel() for p in layer.parameters()) == N  # only the bias: the codes are in the kernel's layout now
    weight = layer.weight
    layer.unbind()
    assert layer.kernel is None
    assert same(canonical(layer), before)
    assert all(torch.equal(layer.fields()[name], fields[name]) for name in fields)
    assert torch.equal(layer.weight, weight)
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize(("fmt", "activation"), SCHEMES, ids=str)
@pytest.mark.parametrize("bound", [True, False])
def test_casts_move_the_bias_and_nothing_else(fmt: Format, activation: Activation, bound: bool) -> None:
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")):
        layer = make(fmt, activation)
        before = canonical(layer)
        if bound:
            layer(torch.randn(3, K))
        cast(layer)
        after = canonical(layer)
        bias, was = after.pop("bias"), before.pop("bias")
        assert same(after, before)
        assert torch.equal(bias, was.to(bias.dtype))
        assert layer.weight.dtype == bias.dtype
    layer = make(fmt, activation, bias=False).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    x = torch.randn(4, K).bfloat16()
    want = nn.functional.linear(activation.quantize(x, {}), make(fmt, activation).weight)
    got = layer(x)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), want, atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize(("fmt", "activation"), SCHEMES, ids=str)
@pytest.mark.parametrize("bound", [True, False])
def test_copies_are_whole_and_independent(fmt: Format, activation: Activation, bound: bool) -> None:
    layer, x = make(fmt, activation), torch.randn(3, K)
    before, y = canonical(layer), layer(x)
    if not bound:
        layer.unbind()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
        assert same(canonical(other), before)
        other.unbind()
        for parameter in other.parameters():
            parameter.data.zero_()
        assert same(canonical(layer), before)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize(("given", "taking"), list(itertools.product([True, False], repeat=2)))
def test_load_state_dict(given: bool, taking: bool) -> None:
    fmt, x = Int4Dual(group=32), torch.randn(3, K)
    source = make(fmt, Int8Token())
    target = PackedLinear(K, N, fmt, Int8Token(), bias=True)
    for value in target.state_dict().values():
        value.zero_()
    if given:
        source(x)
    if taking:
        target.row_scale.data.fill_(1)
        target(x)
    target.load_state_dict(source.state_dict())
    assert same(canonical(target), canonical(source))
    assert torch.equal(target(x), source(x))
    wrong = canonical(source)
    del wrong["row_scale"]
    with pytest.raises(RuntimeError, match="row_scale"):
        target.load_state_dict(wrong)


def test_a_layer_on_meta_has_shapes_and_can_be_filled() -> None:
    fmt = IntGroup(bits=4, group=32)
    with torch.device("meta"):
        layer = PackedLinear(K, N, fmt, Unquantized(), bias=True, dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert layer.weight.shape == (N, K)
    assert layer.weight.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (K, N)
    source = make(fmt, Unquantized())
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, K)
    assert torch.equal(layer(x), source(x))
    assert layer.to_empty(device="cpu").weight_packed.device.type == "cpu"


def test_tensors_that_do_not_fit_are_refused() -> None:
    fmt = IntGroup(bits=4, group=32)
    packed = fmt.pack(fmt.nearest(torch.randn(N, K)))
    for change in (
        lambda f: f.pop("weight_zero"),
        lambda f: f.update(weight_scale=f["weight_scale"].float()),
        lambda f: f.update(weight_packed=f["weight_packed"][1:]),
        lambda f: f["weight_scale"].fill_(torch.inf),
    ):
        fields = {name: value.clone() for name, value in packed.items()}
        change(fields)
        with pytest.raises(ValueError, match="weight_"):
            PackedLinear.from_fields(fields, fmt, Unquantized(), N, K, None)


def test_no_gradient_is_lost_silently() -> None:
    """Codes do not train; an input that needs a gradient either gets it or is told that there is none."""
    layer = make(IntGroup(bits=4, group=32), Unquantized())
    x = torch.randn(3, K, requires_grad=True)
    told = ""
    try:
        layer(x).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        told = str(error)
    if x.grad is None:
        assert "backward" in told
    else:
        assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, K), rtol=1e-3, atol=1e-3)
