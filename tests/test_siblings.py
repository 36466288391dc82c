"""Siblings: one launch for layers that read one tensor, and never a stale result."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from quant.kernels import dispatch
from quant.kernels.activation import Activation
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.dispatch import Kernel, MatmulSpec
from quant.kernels.format import Codes, Format
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.linear import PackedLinear
from quant.siblings import link

K, ROWS = 64, {"q_proj": 48, "k_proj": 20, "v_proj": 32}
SCHEMES = [
    (Int4Dual(group=32), Int8Token()),
    (IntGroup(bits=8, group=-1, symmetric=True), Int8Token()),
    (IntGroup(bits=3, group=16), Unquantized()),
]


def packed(fmt: Format, activation: Activation, n: int, k: int = K) -> PackedLinear:
    if isinstance(fmt, Int4Dual):
        scale = torch.randint(1, 8, (n, k // fmt.group), dtype=torch.uint8)
        params = {"group_scale": scale, "group_offset": (-8 * scale.int()).to(torch.int8), "row_scale": torch.rand(n) + 0.1}
        fields = fmt.pack(Codes(torch.randint(0, 16, (n, k), dtype=torch.uint8), params))
    else:
        fields = fmt.pack(fmt.nearest(torch.randn(n, k)))
    return PackedLinear.from_fields(fields, fmt, activation, n, k, torch.randn(n))


class Attention(nn.Module):
    def __init__(self, fmt: Format, activation: Activation) -> None:
        super().__init__()
        for name, n in ROWS.items():
            self.add_module(name, packed(fmt, activation, n))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in ROWS]


@pytest.fixture(params=SCHEMES, ids=lambda scheme: f"{scheme[0].name}-{scheme[1]}")
def pair(request: pytest.FixtureRequest) -> tuple[Attention, Attention]:
    """A block whose layers are siblings, already joined, and an equal one whose layers are not."""
    torch.manual_seed(0)
    alone = Attention(*request.param)
    together = copy.deepcopy(alone)
    assert len(link(together)) == 1
    together(torch.randn(3, K))
    spec = MatmulSpec(n=8, k=K, format=request.param[0], activation=request.param[1], device="cpu")
    if dispatch.choose(spec)[0].name == "reference":
        pytest.skip("the C++ kernels are not built")
    siblings = together.q_proj.siblings
    assert siblings is not None
    assert siblings.joined is not None
    return together, alone


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers of every launch."""
    counts: list[int] = []
    for kernel in dispatch.load_all():

        def single(*args: object, kernel: Kernel = kernel, original: object = kernel.matmul) -> Tensor:
            counts.append(1)
            return original(*args)

        def several(*args: object, original: object = kernel.matmul_joined) -> list[Tensor]:
            counts.append(len(args[3]))
            return original(*args)

        monkeypatch.setattr(kernel, "matmul", single)
        monkeypatch.setattr(kernel, "matmul_joined", several)
    return counts


def equal(given: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


@torch.no_grad()
def test_one_launch_and_the_same_results(pair: tuple[Attention, Attention], launches: list[int]) -> None:
    together, alone = pair
    for shape in ((1, K), (2, 5, K), (40, K)):
        x = torch.randn(shape)
        wanted = alone(x)
        launches.clear()
        assert equal(together(x), wanted)
        assert launches == [3]


@torch.no_grad()
def test_a_tensor_changed_in_place_is_computed_again(pair: tuple[Attention, Attention]) -> None:
    together, alone = pair
    x = torch.randn(2, K)
    together.q_proj(x)
    x.mul_(-2)
    assert equal(together(x), alone(x))


@torch.no_grad()
def test_another_tensor_in_the_same_memory_is_computed_again(pair: tuple[Attention, Attention]) -> None:
    together, alone = pair
    x = torch.randn(2, K)
    together.q_proj(x)
    other = x.view(1, 2, K)[0]
    wanted = alone.k_proj(other.add_(1))
    assert torch.equal(together.k_proj(other), wanted)
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


@torch.no_grad()
def test_nothing_is_kept_once_the_tensor_is_gone(pair: tuple[Attention, Attention]) -> None:
    together, alone = pair
    siblings = together.q_proj.siblings
    x = torch.randn(2, K)
    together.q_proj(x)
    assert any(y is not None for y in siblings.outputs)
    del x
    assert all(y is None for y in siblings.outputs)
    x = torch.randn(2, K)
    together(x)
    assert all(y is None for y in siblings.outputs)  # and nothing after all have been served
    assert equal(together(x), alone(x))


@torch.no_grad()
def test_a_bias_changed_between_siblings_counts(pair: tuple[Attention, Attention]) -> None:
    together, alone = pair
    x = torch.randn(2, K)
    together.q_proj(x)
    for block in pair:
        block.v_proj.bias.add_(1)
    assert torch.equal(together.v_proj(x), alone.v_proj(x))


@torch.no_grad()
def test_saving_moving_copying_and_loading(pair: tuple[Attention, Attention]) -> None:
    together, alone = pair
    x = torch.randn(4, K)
    wanted, state = alone(x), alone.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in together.state_dict().items())
    assert equal(together(x), wanted)  # reading the state leaves the layers joined
    assert equal(copy.deepcopy(together)(x), wanted)
    buffer = io.BytesIO()
    torch.save(together, buffer)
    buffer.seek(0)
    assert equal(torch.load(buffer, weights_only=False)(x), wanted)
    together.k_proj.unbind()
    assert equal(together(x), wanted)
    together.to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(together(x.bfloat16()), alone.bfloat16()(x.bfloat16()), strict=True))
    other = Attention(together.q_proj.format, together.q_proj.activation)
    link(other)
    for _ in range(2):
        other(x)
    other.load_state_dict(state)
    assert equal(other(x), wanted)


@torch.no_grad()
def test_cross_attention_is_left_alone(launches: list[int]) -> None:
    """There q reads another tensor than k and v: seen in the first round, and nothing is computed in vain."""
    block = Attention(*SCHEMES[0])
    link(block)
    for _ in range(2):
        x, states = torch.randn(1, K), torch.randn(9, K)
        block.q_proj(x), block.k_proj(states), block.v_proj(states)
    assert launches == [1] * 6
    assert block.q_proj.siblings is None


@torch.no_grad()
def test_gradients_and_inference_mode_go_alone(pair: tuple[Attention, Attention]) -> None:
    together, alone = pair
    with torch.enable_grad():
        x = torch.randn(2, K, requires_grad=True)
        assert equal(together(x), alone(x))
    with torch.inference_mode():
        x = torch.randn(2, K)
        first = together.q_proj(x)
        assert torch.equal(first, alone.q_proj(x))
        x.mul_(2)
        assert torch.equal(together.k_proj(x), alone.k_proj(x))


def test_only_equal_schemes_are_linked() -> None:
    block = Attention(*SCHEMES[0])
    block.add_module("k_proj", packed(*SCHEMES[1], ROWS["k_proj"]))
    assert link(block) == []
