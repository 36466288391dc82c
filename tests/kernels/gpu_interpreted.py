"""The Triton programs against integer references, on the CPU. Run by test_gpu_a8w4.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from quant.kernels.activation import quantize_token
from quant.kernels.gpu.a8w4 import launch, to_device_layout
from quant.kernels.gpu.jit.a8w4 import bfloat16_bits, matmul_tile, quantize_rows, tl, triton
from quant.kernels.gpu.tiles import ARCHITECTURES, tiles

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_gpu_a8w4.py"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN or the largest integer, so an element that a program leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1, dtype=torch.int8).item() == 127
    assert torch.empty(0).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


LAYERS = [(96, 192, 64), (130, 576, 96), (72, 96, 32), (200, 256, 128), (33, 512, 256)]


@pytest.mark.parametrize("m", [1, 17, 64])
@pytest.mark.parametrize(("n", "k", "group"), LAYERS)
def test_integer_sums_are_exact(dual_layer, m, n, k, group):
    """Unit scales and float32 output show the int32 sums themselves (below 2^24 here), tails of M, N and K included."""
    fmt, codes = dual_layer(n, k, group)
    weight, words, _ = to_device_layout(fmt.pack(codes), n, k, group)
    x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(m), dtype=torch.int8)
    half = weight.shape[1]
    blocks = -(-k // (2 * half))
    padded = torch.nn.functional.pad(x, (0, blocks * 2 * half - k))
    expected = x.long() @ fmt.integers(codes).long().t()
    assert expected.abs().max() < 2**24
    shapes = {(tile.bm, tile.bn, tile.swap) for arch in ARCHITECTURES for tile in tiles(arch, half)}
    for bm, bn, swap in sorted(shapes):
        if bm > 16 and m == 1:
            continue
        y = torch.empty(m, n)
        grid = (-(-m // bm), -(-n // bn))
        flags = dict(HALF=half, PAIR=group // half % 2 == 1, SWAP=swap, BIAS=False, BF16=False, INLINE=False)
        sizes = (m, n, blocks, padded.shape[1], n * half)
        matmul_tile[grid](padded, torch.ones(m), weight, words, torch.ones(n), None, y, *sizes, BM=bm, BN=bn, **flags)
        assert torch.equal(y.long(), expected), (bm, bn, swap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_whole_operator_follows_the_formula_bit_for_bit(dual_layer, dtype, bias):
    n, k, group, m = 130, 576, 96, 17
    fmt, codes = dual_layer(n, k, group)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(n, generator=generator).to(dtype) if bias else None
    y = launch(x, *to_device_layout(fmt.pack(codes), n, k, group), b, group, (80, 1))
    q, scale = quantize_token(x)
    expected = (q.long() @ fmt.integers(codes).long().t()).float() * codes.params["row_scale"] * scale.unsqueeze(1)
    expected = expected if b is None else expected + b.float()
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


def quantized(x: torch.Tensor, k_pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(x.shape[0], k_pad, dtype=torch.int8)
    scale = torch.empty(x.shape[0])
    quantize_rows[(x.shape[0],)](x, codes, scale, x.shape[1], k_pad, BLOCK=256)
    return codes, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_codes_equal_the_reference(dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 600, generator=generator) * torch.logspace(-4, 3, 9).unsqueeze(1)
    x[3] = 0
    x = x.to(dtype)
    codes, scale = quantized(x, 640)
    expected, expected_scale = quantize_token(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes[:, :600], expected)
    assert not codes[:, 600:].any(), "padding must be zero"


def test_ties_go_to_the_even_code():
    ties = torch.arange(-126.5, 127)
    x = torch.cat([torch.tensor([127.0]), ties]).unsqueeze(0)  # scale 1: every other value lies between two codes
    codes, _ = quantized(x, 256)
    assert torch.equal(codes[:, : x.shape[1]], quantize_token(x)[0])
    assert (codes[0, 1 : x.shape[1]] % 2 == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_is_seen_in_its_scale(bad):
    x = torch.ones(2, 40)
    x[1, 7] = bad
    _, scale = quantized(x, 64)
    assert scale[0].isfinite()
    assert scale[1].isinf()


@triton.jit
def round_program(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, bfloat16_bits(tl.load(x_ptr + at)))


def test_bfloat16_rounding_equals_torch():
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    bits[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000])  # two ties, overflow, a subnormal tie
    x = bits.view(torch.float32)
    y = torch.empty(4096, dtype=torch.int16)
    round_program[(1,)](x, y, SIZE=4096)
    got, expected = y.view(torch.bfloat16), x.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), expected[~got.isnan()].view(torch.int16))
