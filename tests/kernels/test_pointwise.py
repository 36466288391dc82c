"""Norms and activations: float64 as truth, the same bits on every instruction set and however rows are shared out, and as
classes of transformers' modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.kernels.cpu import library
from quant.serve import pointwise

OPS = torch.ops.lowbit
DTYPES = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 576), (3, 33), (130, 384), (2, 5, 17)]
EPS = 1e-5


ISAS = library.supported(library.load()) if library.available() else []
pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")


def rms(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w, b, EPS)


Case = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]
CASES: dict[str, Case] = {  # ours, and the truth
    "rms_norm": (lambda x, w, b: OPS.cpu_rms_norm(x, w, EPS), rms),
    "layer_norm": (lambda x, w, b: OPS.cpu_layer_norm(x, w, b, EPS), layer),
    "silu": (lambda x, w, b: OPS.cpu_silu(x), lambda x, w, b: functional.silu(x)),
    "silu_mul": (lambda x, w, b: OPS.cpu_silu_mul(x, x.flip(-1)), lambda x, w, b: functional.silu(x) * x.flip(-1)),
    "gelu": (lambda x, w, b: OPS.cpu_gelu(x), lambda x, w, b: functional.gelu(x)),
}


def data(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape) * 3 + 0.5
    x.view(-1)[::7] *= 5
    return x.to(dtype), torch.rand(shape[-1]).to(dtype) + 0.5, torch.randn(shape[-1]).to(dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_truth_and_the_same_bits_everywhere(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ours, truth = CASES[name]
    given = data(shape, dtype)
    want = truth(*(part.double() for part in given))
    found = []
    before = torch.get_num_threads()
    try:
        for isa in ISAS:
            library.select(library.load(), isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(ours(*given))
    finally:
        torch.set_num_threads(before)
        library.load.cache_clear()
        library.load()
    assert float((found[0] - want).norm() / want.norm()) < DTYPES[dtype]
    assert all(torch.equal(found[0], other) for other in found[1:])
    x, w, b = given
    rows = torch.cat([ours(row[None], w, b) for row in x.flatten(0, -2)])  # a prompt is its tokens one by one
    assert torch.equal(found[0].flatten(0, -2), rows)


@pytest.mark.parametrize("name", CASES)
def test_operators_are_what_torch_expects(name: str) -> None:
    x, w, b = data((3, 20), torch.float32)
    operator = getattr(OPS, f"cpu_{name}").default
    rest = {"rms_norm": (w, EPS), "layer_norm": (w, b, EPS), "silu_mul": (x,)}.get(name, ())
    torch.library.opcheck(operator, (x, *rest), test_utils=("test_schema", "test_faketensor"))


def test_edges() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 300.0, -300.0, torch.nan])
    for ours, theirs in ((OPS.cpu_silu, functional.silu), (OPS.cpu_gelu, functional.gelu)):
        assert torch.allclose(ours(x), theirs(x), rtol=1e-6, atol=2e-12, equal_nan=True)
    zero = torch.zeros(2, 8)
    assert torch.equal(OPS.cpu_rms_norm(zero, torch.ones(8), EPS), zero)
    assert torch.equal(OPS.cpu_layer_norm(zero + 3, torch.ones(8), torch.ones(8), EPS), zero + 1)
    assert OPS.cpu_rms_norm(torch.empty(0, 8), torch.ones(8), EPS).shape == (0, 8)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(7,\)"):
        OPS.cpu_rms_norm(zero, torch.ones(7), EPS)
    with pytest.raises(ValueError, match="the kernel needs it contiguous"):
        OPS.cpu_gelu(torch.zeros(4, 6).T)
    with pytest.raises(ValueError, match=r"torch.float64 input is not supported"):
        OPS.cpu_silu(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_norms_of_transformers_become_ours(kind: str) -> None:
    module = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["x"])
    name = next(name for name in pointwise.RMS_NORMS if name.lower().startswith(kind))
    norm = getattr(module, name)(64, eps=EPS).to(torch.bfloat16)
    x, norm.weight.data, _ = data((5, 64), torch.bfloat16)
    with torch.no_grad():
        before = norm(x)
        pointwise.install(norm)
        assert type(norm) is pointwise.RMSNorm
        assert float((norm(x).double() - before.double()).norm() / before.double().norm()) < 1e-3


def test_what_is_not_served_computes_the_same() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.SiLU())
    x = torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
    pointwise.install(model)
    assert [type(part) for part in model] == [pointwise.LayerNorm, pointwise.SiLU]
    with torch.no_grad():
        strided = x.T.contiguous().T
        assert torch.equal(model(strided), model(x))
    y = model(x)  # the weights ask for gradients
    y.sum().backward()
    assert model[0].weight.grad is not None
    assert torch.equal(y, want)
    assert torch.allclose(model.double()(x.double()), want.double(), atol=1e-6)


def test_other_norms_stay() -> None:
    others = [nn.LayerNorm((2, 8)), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), nn.GELU()]
    assert [pointwise.replacement(other) for other in others] == [None] * 4
