"""gpu_a8w4 on a real GPU against the reference. Skipped where there is none; nothing else in the suite runs on one."""

import pytest
import torch

from quant.kernels.activation import quantize_token
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.gpu.a8w4 import GpuA8W4, gpu_a8w4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU kernels were not run here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 200])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(96, 192, 64), (130, 576, 96), (72, 96, 32), (4096, 4096, 128), (1000, 1536, 64), (33, 512, 256)]
)
def test_equals_the_reference_and_repeats_itself(dual_layer, m, n, k, group, dtype):
    fmt, codes = dual_layer(n, k, group)
    spec = MatmulSpec(n=n, k=k, format=fmt, activation="int8_token", device="cuda")
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
    expected = sums * codes.params["row_scale"].double() * scale.double().unsqueeze(1) + bias.double()
    unit = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    # three float32 roundings and the one to the output, each relative to the larger of the two terms of the sum
    bound = unit * (expected.abs() + bias.double().abs() + (expected - bias.double()).abs())
    assert ((y.double().cpu() - expected).abs() <= bound).all()


def test_the_operator_can_be_captured(dual_layer):
    fmt, codes = dual_layer(256, 256, 128)
    spec = MatmulSpec(n=256, k=256, format=fmt, activation="int8_token", device="cuda")
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
    spec = MatmulSpec(n=96, k=192, format=fmt, activation="int8_token", device="cuda")
    prepared = tuple(t.cuda() for t in GpuA8W4().prepare(fmt.pack(codes), spec))
    torch.library.opcheck(gpu_a8w4, (torch.randn(3, 192, device="cuda"), *prepared, None, 64))
