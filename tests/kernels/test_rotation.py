"""The block Hadamard rotation: exact in the product, equal on every path, and what makes int8 tokens lose little."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from quant.kernels import activation, dispatch
from quant.kernels.activations.int_token import Int4Token, Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.cpu import library
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.rotation import by_matrix, hadamard, largest_block, rotate, rotate_gram
from quant.linear import PackedLinear

dispatch.load_all()
CODE = """
import sys, torch
from quant.kernels import dispatch
from quant.kernels.rotation import by_matrix, rotate
dispatch.load_all()
torch.manual_seed(0)
for size in (2, 16, 64, 256):
    x = torch.randn(17, 768)
    assert torch.allclose(rotate(x, size), by_matrix(x, size), atol=2e-6), size
"""


@pytest.mark.parametrize("size", [2, 8, 64, 128])
def test_it_is_its_own_inverse_and_leaves_products(size: int) -> None:
    h = hadamard(size).double()
    assert torch.equal(h, h.T)
    assert torch.allclose(h @ h, torch.eye(size, dtype=torch.float64), atol=1e-6)
    x, w = torch.randn(5, 3 * size), torch.randn(7, 3 * size)
    assert torch.allclose(by_matrix(by_matrix(x, size), size), x, atol=1e-5)
    wanted = x.double() @ w.double().T
    assert float((by_matrix(x, size).double() @ by_matrix(w, size).double().T - wanted).norm() / wanted.norm()) < 1e-6
    a = torch.randn(3 * size, 3 * size)
    r = torch.block_diag(*[hadamard(size)] * 3)
    assert torch.allclose(rotate_gram(a, size), r @ a @ r, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize("size", [2, 32, 64, 512])
def test_the_operator_is_the_product(dtype: torch.dtype, tokens: int, size: int) -> None:
    x = torch.randn(tokens, 3 * size).to(dtype)
    wanted = x.double() @ torch.block_diag(*[hadamard(size).double()] * 3)
    got = rotate(x, size)
    assert got.dtype == dtype
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 3e-6)
    assert float((got.double() - wanted).norm() / wanted.norm()) < step
    strided = rotate(x.unflatten(1, (3, size)).transpose(0, 1), size)[1]
    assert torch.allclose(strided, rotate(x[:, size : 2 * size], size), rtol=step, atol=step)


@pytest.mark.parametrize("isa", library.ISAS)
def test_every_instruction_set(isa: str) -> None:
    if not library.available() or library.load().lowbit_select(library.ISAS.index(isa)):
        pytest.skip(f"this machine has no {isa}")
    library.load.cache_clear()
    subprocess.run([sys.executable, "-c", CODE], check=True, env={**os.environ, "LOWBIT_CPU_ISA": isa})


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert largest_block(64, 576) == 64
    assert largest_block(64, 80) == 16
    assert largest_block(64, 81) == 1
    for bad in (1, 12, 128):
        reason = Int8Token(rotate=bad).refuses(576)
        assert reason is not None
        assert "divides K = 576" in reason
    with pytest.raises(ValueError, match="divides K = 96"):
        rotate(torch.randn(2, 96), 64)


def test_gradients_pass() -> None:
    x = torch.randn(3, 128, requires_grad=True)
    rotate(x, 64).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)


def test_an_outlier_costs_the_other_channels_little_after_rotation() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    x[:, 7] *= 50
    errors = []
    for rule in (Int8Token(), Int8Token(rotate=64)):
        seen = by_matrix(rule.quantize(rule.rotated(x), {}), rule.rotate)
        others = torch.arange(256) != 7
        errors.append(float((seen - x)[:, others].norm() / x[:, others].norm()))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("rule", [Unquantized(rotate=32), Int8Token(rotate=32), Int4Token(rotate=64)])
def test_a_packed_layer_turns_its_input_and_gives_its_weight_back(rule: activation.Activation) -> None:
    torch.manual_seed(1)
    fmt, weight = IntGroup(bits=8, group=-1, symmetric=True), torch.randn(48, 128)
    fields = fmt.pack(fmt.nearest(by_matrix(weight, rule.rotate)))
    layer = PackedLinear.from_fields(fields, fmt, rule, 48, 128, None)
    assert float((layer.weight - weight).norm() / weight.norm()) < 0.01
    x = torch.randn(17, 128)
    wanted = rule.quantize(by_matrix(x, rule.rotate), {}).double() @ by_matrix(layer.weight, rule.rotate).double().T
    assert float((layer(x).double() - wanted).norm() / wanted.norm()) < 2e-3


def test_rules_have_names_and_parameters() -> None:
    for rule in (Unquantized(), Int8Token(), Int8Token(rotate=64), Int4Token(rotate=16)):
        assert activation.from_config(rule.config()) == rule
    assert Int8Token().config() == "int8_token"
    for bad, told in (("int8_tokens", "did you mean 'int8_token'"), ({"name": "none", "turn": 2}, "no parameter 'turn'")):
        with pytest.raises(ValueError, match=told):
            activation.from_config(bad)
    with pytest.raises(ValueError, match="must be of type int"):
        activation.from_config({"name": "int8_token", "rotate": "64"})
