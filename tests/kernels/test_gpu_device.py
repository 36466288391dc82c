"""The GPU kernels on a real GPU against the reference. Skipped where there is none; nothing else in the suite runs on one."""

import pytest
import torch

from quant.kernels.activations.int_token import Int8Token, quantize_token
from quant.kernels.activations.none import Unquantized
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.format import Codes
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu.a8w4 import GpuA8W4, gpu_a8w4
from quant.kernels.gpu.w8a8 import DIVISOR, GpuW8A8
from quant.kernels.gpu.wna16 import GpuWnA16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU kernels were not run here")

UNIT = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}
# Relative norm. Above 64 tokens a tile may round each weight once to the tokens' type (bfloat16: the scale as well).
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def close_to(y, sums, row_scale, scale, bias, dtype):
    """Three float32 roundings and the one to the output, each relative to the larger of the two terms of the sum."""
    expected = sums * row_scale.double() * scale.double().unsqueeze(1) + bias.double()
    bound = UNIT[dtype] * (expected.abs() + bias.double().abs() + (expected - bias.double()).abs())
    return bool(((y.double().cpu() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(96, 192, 64), (130, 576, 96), (72, 96, 32), (4096, 4096, 128), (1000, 1536, 64), (33, 512, 256)]
)
def test_a8w4_equals_the_reference_and_repeats_itself(dual_layer, m, n, k, group, dtype):
    fmt, codes = dual_layer(n, k, group)
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Int8Token(), device="cuda")
    kernel = GpuA8W4()
    assert (reason := kernel.refuses(spec)) is None, reason
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator)
    prepared = tuple(t.cuda() for t in kernel.prepare(fmt.pack(codes), spec))
    y = kernel.matmul(x.cuda(), prepared, bias.cuda(), spec)
    assert torch.equal(y, kernel.matmul(x.cuda(), prepared, bias.cuda(), spec))
    q, scale = quantize_token(x)
    sums = q.double() @ fmt.integers(codes).double().t()  # exact: below 2^53
    assert close_to(y, sums, codes.params["row_scale"], scale, bias, dtype)


def random_codes(fmt: IntGroup, n: int, k: int) -> Codes:
    generator = torch.Generator().manual_seed(n + k)
    params = {"weight_scale": (torch.rand(n, fmt.groups(k), generator=generator) + 0.1).to(fmt.scale_dtype)}
    if not fmt.symmetric:
        params["weight_zero"] = torch.randint(0, 2**fmt.bits, (n, fmt.groups(k)), generator=generator, dtype=torch.uint8)
    return Codes(torch.randint(0, 2**fmt.bits, (n, k), generator=generator, dtype=torch.uint8), params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(96, 192, 64), (130, 576, 96), (256, 8192, 128), (1000, 1536, 32), (33, 520, -1)]
)
def test_wna16_matches_float64_and_repeats_itself(n, k, group, bits, m, dtype):
    fmt = IntGroup(bits=bits, group=group, symmetric=bits == 3)
    codes = random_codes(fmt, n, k)
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cuda")
    kernel = GpuWnA16()
    assert (reason := kernel.refuses(spec)) is None, reason
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    prepared = tuple(t.cuda() for t in kernel.prepare(fmt.pack(codes), spec))
    y = kernel.matmul(x.cuda(), prepared, None, spec)
    assert torch.equal(y, kernel.matmul(x.cuda(), prepared, None, spec))
    expected = x.double() @ fmt.dequantize(codes).double().t()
    assert float((y.double().cpu() - expected).norm() / expected.norm()) < ROUNDING[dtype]


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("m", [1, 17, 200])
def test_w8a8_equals_the_reference(m, divided):
    n, k = 1000, 1536
    fmt = IntGroup(bits=8, group=-1, symmetric=True)
    codes = random_codes(fmt, n, k)
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Int8Token(), device="cuda")
    kernel = GpuW8A8()
    generator = torch.Generator().manual_seed(m)
    divisor = torch.rand(k, generator=generator) + 0.1 if divided else torch.ones(k)
    x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
    fields = fmt.pack(codes) | ({DIVISOR: divisor} if divided else {})
    prepared = tuple(t.cuda() for t in kernel.prepare(fields, spec))
    y = kernel.matmul(x.cuda(), prepared, bias.cuda(), spec)
    q, scale = quantize_token(x / divisor)
    sums = q.double() @ (codes.codes.double() - 128).t()
    assert close_to(y, sums, codes.params["weight_scale"].flatten(), scale, bias, torch.float32)


def test_the_operator_can_be_captured(dual_layer):
    fmt, codes = dual_layer(256, 256, 128)
    spec = MatmulSpec(n=256, k=256, format=fmt, activation=Int8Token(), device="cuda")
    kernel = GpuA8W4()
    prepared = tuple(t.cuda() for t in kernel.prepare(fmt.pack(codes), spec))
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    expected = kernel.matmul(x, prepared, None, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.matmul(x, prepared, None, spec)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_the_operator_passes_the_checks_of_torch(dual_layer):
    fmt, codes = dual_layer(96, 192, 64)
    spec = MatmulSpec(n=96, k=192, format=fmt, activation=Int8Token(), device="cuda")
    prepared = tuple(t.cuda() for t in GpuA8W4().prepare(fmt.pack(codes), spec))
    torch.library.opcheck(gpu_a8w4, (torch.randn(3, 192, device="cuda"), *prepared, None, 64))
