"""The Triton programs against references, on the CPU. Run by test_gpu_programs.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.activations.int_token import quantize_token
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.none import Unquantized
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.format import Codes
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import ENTRIES, Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int_group import IntGroup, unpack_bits
from quant.kernels.gpu import a8w4, codebook, dual, fp4, fp4_native, fp_channel, launch, w8a8, wna16
from quant.kernels.gpu.jit.activation import quantize_rows, tl, triton
from quant.kernels.gpu.jit.gemm import bfloat16_bits
from quant.kernels.gpu.plan import DENSE_TOKENS, Layer, dense_plan, plan_with
from quant.kernels.gpu.program import Plan, run
from quant.kernels.gpu.tiles import Tile
from quant.kernels.minifloat import E2M1

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_gpu_programs.py"
FACTS = (80, 108)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN or the largest integer, so an element that a program leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1, dtype=torch.int8).item() == 127
    assert torch.empty(0).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def tile(bm: int, bn: int, swap: bool = False, on_sum: bool = False) -> Tile:
    return Tile(max_m=None, bm=bm, bn=bn, warps=4, stages=2, swap=swap, on_sum=on_sum, few=bm < 64)


def launches(layer: Layer, shape: Tile | None, splits: int) -> Plan:
    """Those of a tile; None: a dense weight and torch's product."""
    return (
        dense_plan(layer, "interpreter") if shape is None else plan_with(layer, shape, min(splits, layer.blocks), "interpreter")
    )


def relative(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given.double() - wanted).norm() / wanted.norm())


def int_layer(bits: int, n: int, k: int, group: int, symmetric: bool) -> tuple[IntGroup, Codes]:
    fmt = IntGroup(bits=bits, group=group, symmetric=symmetric)
    generator = torch.Generator().manual_seed(n + k + bits)
    groups = fmt.groups(k)
    size, sign = torch.rand(2, n, groups, generator=generator)
    params = {"weight_scale": ((size + 0.1) * torch.where(sign < 0.3, -1.0, 1.0)).to(fmt.scale_dtype)}
    if not symmetric:
        params["weight_zero"] = torch.randint(0, 2**bits, (n, groups), generator=generator, dtype=torch.uint8)
    return fmt, Codes(torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8), params)


def random_tokens(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


# The layers have tails in N and K; (tokens, tile) covers both operand orders, tails of M, and 1, 2 or 4 parts of K.
DUAL = [(96, 192, 64), (130, 576, 96), (72, 96, 32), (200, 256, 128), (33, 512, 256)]
RUNS = [
    (1, tile(16, 128), 1),
    (1, tile(16, 128), 4),
    (17, tile(16, 64, swap=True), 1),
    (17, tile(32, 128), 2),
    (64, tile(64, 128, swap=True), 1),
]


@pytest.mark.parametrize(("m", "shape", "splits"), RUNS)
@pytest.mark.parametrize(("n", "k", "group"), DUAL)
def test_dual_sums_are_exact(dual_layer, n, k, group, m, shape, splits):
    """Unit scales and float32 output show the int32 sums themselves (below 2^24 here), tails of M, N and K included."""
    fmt, codes = dual_layer(n, k, group)
    codes.params["row_scale"].fill_(1)
    x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(m)).float()
    x[:, 0] = 127  # the token's scale is exactly 1
    layer = a8w4.layer_of(n, k, group, x.dtype, None)
    prepared = a8w4.to_device_layout(fmt.pack(codes), n, k, group)
    y = torch.empty(m, n)
    tensors = {"x": x, "y": y, **dict(zip(("weight", "words", "row_scale"), prepared, strict=True))}
    run(plan_with(layer, shape, min(splits, layer.blocks), "interpreter"), tensors, m)
    expected = x.long() @ fmt.integers(codes).long().t()
    assert expected.abs().max() < 2**24
    assert torch.equal(y.long(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_dual_operator_follows_the_formula_bit_for_bit(dual_layer, dtype, bias):
    n, k, group, m = 130, 576, 96, 17
    fmt, codes = dual_layer(n, k, group)
    x = random_tokens(m, k, dtype)
    b = random_tokens(1, n, dtype)[0] if bias else None
    prepared = dict(zip(("weight", "words", "row_scale"), a8w4.to_device_layout(fmt.pack(codes), n, k, group), strict=True))
    y = launch.matmul(a8w4.layer_of(n, k, group, dtype, b), x, b, prepared, FACTS)
    q, scale = quantize_token(x)
    expected = (q.long() @ fmt.integers(codes).long().t()).float() * codes.params["row_scale"] * scale.unsqueeze(1)
    expected = expected if b is None else expected + b.float()
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "m", "shape", "splits"), [(33, 200, 1, tile(16, 128), 2), (130, 384, 17, tile(16, 64, swap=True), 1)]
)
def test_w8a8_follows_the_formula_bit_for_bit(n, k, m, shape, splits, divided):
    fmt, codes = int_layer(8, n, k, -1, True)
    spec_fields = fmt.pack(codes)
    weight = w8a8.pack_weight(spec_fields["weight_packed"] ^ 128, w8a8.POLICY, w8a8.POLICY.blockings[0][0])
    divisor = torch.rand(k, generator=torch.Generator().manual_seed(5)) + 0.2 if divided else None
    x = random_tokens(m, k, torch.float32)
    y = torch.empty(m, n)
    tensors = {"x": x, "y": y, "weight": weight, "row_scale": spec_fields["weight_scale"].flatten()}
    if divisor is not None:
        tensors["divisor"] = divisor
    run(plan_with(w8a8.layer_of(n, k, x.dtype, None, divisor), shape, splits, "interpreter"), tensors, m)
    q, scale = quantize_token(x if divisor is None else x / divisor)
    sums = q.long() @ (codes.codes.long() - 128).t()
    assert torch.equal(y, sums.float() * codes.params["weight_scale"].flatten() * scale.unsqueeze(1))


# (bits, group, symmetric): every blocking of every policy, one group per row included
GROUPED = [
    *((bits, group, symmetric) for bits in (2, 3, 4, 8) for group, symmetric in ((128, False), (32, True), (-1, False))),
    (2, 64, False),
    (3, 64, True),
    (4, 64, False),
    (4, 96, False),
    (8, 64, True),
]


@pytest.mark.parametrize(("bits", "group", "symmetric"), GROUPED)
def test_float_tokens(bits, group, symmetric):
    """Against float64, K ragged where the group allows it; float16 arithmetic where the scale is on the weights."""
    n, k = 72, 3 * group if group > 64 else 288 if group != -1 and 288 % group == 0 else 320
    fmt, codes = int_layer(bits, n, k, group, symmetric)
    prepared = wna16.to_device_layout(fmt.pack(codes), fmt, n, k)
    tensors = dict(zip(("weight", "words", "row_scale"), prepared, strict=True))
    weight = fmt.dequantize(codes).double()
    cases = [
        (1, torch.float32, tile(16, 128, on_sum=True), 2),
        (17, torch.bfloat16, tile(32, 128, swap=True, on_sum=True), 1),
        (17, torch.float16, tile(32, 128), 1),
        (3, torch.float16, None, 1),
        (3, torch.bfloat16, None, 1),
    ]
    for m, dtype, shape, splits in cases:
        x = random_tokens(m, k, dtype)
        layer = wna16.layer_of(n, k, bits, group, dtype, None)
        y = torch.empty(m, n, dtype=dtype)
        out = y.view(torch.int16) if dtype == torch.bfloat16 else y
        run(launches(layer, shape, splits), {"x": x, "y": out, **tensors}, m)
        assert relative(y, x.double() @ weight.t()) < ROUNDING[dtype], (m, dtype, shape)


@pytest.mark.parametrize(("n", "k"), [(72, 416), (130, 96), (33, 672)])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_four_bit_floats(kind, n, k):
    """Against float64, tails of M, N and K; a block of scale 0, and scales over the whole range that counts."""
    fmt = Fp4Block(kind=kind)
    generator = torch.Generator().manual_seed(n + k)
    fields = fmt.pack(fmt.nearest(torch.randn(n, k, generator=generator)))
    scale = fields["weight_scale"].view(torch.uint8)
    if kind == "nvfp4":
        scale[:, 0] = torch.randint(0, 127, (n,), generator=generator)
    else:
        scale[:, 0] = scale[:, 1] - torch.randint(0, 25, (n,), generator=generator).to(torch.uint8)
    fields["weight_packed"][:, 0] = torch.randint(0, 256, (n,), generator=generator)
    weight = fmt.dequantize(fmt.unpack(fields, n, k)).double()
    tensors = dict(zip(("weight", "words", "row_scale"), fp4.to_device_layout(fields, fmt, n, k)[:3], strict=True))
    for m, dtype, shape, splits in [
        (1, torch.float32, tile(16, 128), 2),
        (17, torch.bfloat16, tile(32, 128, swap=True), 1),
        (5, torch.float16, tile(16, 64), 1),
        (3, torch.bfloat16, None, 1),
    ]:
        x = random_tokens(m, k, dtype)
        y = torch.empty(m, n, dtype=dtype)
        out = y.view(torch.int16) if dtype == torch.bfloat16 else y
        layer = fp4.layer_of(n, k, kind, dtype, None)
        run(launches(layer, shape, splits), {"x": x, "y": out, **tensors}, m)
        assert relative(y, x.double() @ weight.t()) < ROUNDING[dtype], (m, dtype, shape)


def channel_layer(n: int, k: int, group: int, exponents: int, bits: int = 4) -> tuple[FpChannel, Codes]:
    """Every code, under scales of very different sizes."""
    fmt = FpChannel(bits=bits, group=group)
    generator = torch.Generator().manual_seed(n + k + exponents)
    size = torch.exp2(torch.rand(n, fmt.groups(k), generator=generator) * 12 - 6)  # of the largest weight
    scale = (size / fmt.kind(exponents).largest).to(fmt.scale_dtype)
    params = fmt.params(scale, exponents)
    return fmt, Codes(torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8), params)


FLOATS = [
    (4, e, *size) for e in (1, 2, 3) for size in ((72, 416, 32), (130, 192, 64), (33, 672, 96), (40, 208, -1), (72, 384, 128))
]
FLOATS += [(8, e, n, 208, -1) for e, n in ((1, 72), (2, 40), (3, 130), (4, 33), (5, 40))]


@pytest.mark.parametrize(("bits", "exponents", "n", "k", "group"), FLOATS)
def test_searched_floats(bits, exponents, n, k, group):
    """fp_channel against float64, tails of M, N and K."""
    fmt, codes = channel_layer(n, k, group, exponents, bits)
    weight = fmt.dequantize(codes).double()
    prepared = fp_channel.to_device_layout(fmt.pack(codes), fmt, n, k)
    tensors = dict(zip(("weight", "words", "row_scale"), prepared, strict=True))
    for m, dtype, shape, splits in [
        (1, torch.float32, tile(16, 128, on_sum=bits == 4), 2),
        (17, torch.bfloat16, tile(32, 128, swap=True, on_sum=bits == 4), 1),
        (17, torch.float16, tile(32, 128), 1),
        (3, torch.bfloat16, None, 1),
    ]:
        x = random_tokens(m, k, dtype)
        y = torch.empty(m, n, dtype=dtype)
        out = y.view(torch.int16) if dtype == torch.bfloat16 else y
        layer = fp_channel.layer_of(n, k, bits, group, dtype, None, False)
        run(launches(layer, shape, splits), {"x": x, "y": out, **tensors}, m)
        limit = ROUNDING[dtype] if shape is not None else 2 * ROUNDING[dtype]  # each weight is rounded, then the sum
        assert relative(y, x.double() @ weight.t()) < limit, (m, dtype, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group", "activation"),
    [(4, 96, FpShift()), (4, 96, FpShift(bits=4, dynamic=True, group=16)), (8, -1, FpShift(dynamic=True))],
    ids=str,
)
def test_searched_tokens(bits, group, activation, dtype):
    """Tokens of fp_shift: multiplied without their scale, which joins the sums before they are rounded."""
    n, k, m = 40, 288, 5
    fmt, codes = channel_layer(n, k, group, 2, bits)
    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(m, k, generator=generator) * torch.logspace(-2, 2, m).unsqueeze(1)).to(dtype)
    shift = torch.randint(0, 4, (k,), generator=generator)
    inputs = activation.stored(torch.tensor(0.7), shift, 2)
    seen, scale = activation.codes(x, inputs)
    tokens = seen.to(fp_channel.tokens_as(activation, dtype))
    assert torch.equal(tokens.float(), seen), "the type of the tokens holds them exactly"
    prepared = fp_channel.to_device_layout(fmt.pack(codes), fmt, n, k)
    tensors = dict(zip(("weight", "words", "row_scale"), prepared, strict=True))
    tensors["x_scale"] = scale.reshape(-1).expand(m).contiguous()
    y = launch.matmul(fp_channel.layer_of(n, k, bits, group, tokens.dtype, None, True), tokens, None, tensors, FACTS)
    assert relative(y, activation.quantize(x, inputs).double() @ fmt.dequantize(codes).double().t()) < ROUNDING[y.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [MxFp4(), NvFp4(), NvFp4(four_six=True)], ids=str)
def test_four_bit_tokens(activation, dtype):
    """Tokens of the weights' own kind, of very different sizes."""
    n, k, m = 40, 288, 5
    fmt = Fp4Block(kind=activation.name)
    generator = torch.Generator().manual_seed(4)
    x = (torch.randn(m, k, generator=generator) * torch.logspace(-3, 3, m).unsqueeze(1)).to(dtype)
    fields = fmt.pack(fmt.nearest(torch.randn(n, k, generator=generator))) | activation.fit(x.float(), x.abs().amax(0).float())
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cuda")
    prepared = fp4.GpuFp4().prepare(fields, spec)
    divisor, prepared = (prepared[0], prepared[1:]) if activation.name == "nvfp4" else (None, prepared)
    seen = fp4.tokens(x, activation, divisor)
    assert seen.dtype == fp4.tokens_as(activation, dtype)
    layer = fp4.layer_of(n, k, fmt.kind, seen.dtype, None)
    y = torch.empty(m, n, dtype=seen.dtype)
    out = y.view(torch.int16) if dtype == torch.bfloat16 else y
    tensors = dict(zip(("weight", "words", "row_scale"), prepared[:3], strict=True))
    run(plan_with(layer, tile(16, 128), 1, "interpreter"), {"x": seen, "y": out, **tensors}, m)
    weight = fmt.dequantize(fmt.unpack(fields, n, k)).double()
    expected = activation.quantize(x, fields).double() @ weight.t()
    assert relative(y.to(dtype), expected) < ROUNDING[dtype]


@pytest.mark.parametrize("m", [1, 17, 64, DENSE_TOKENS])
def test_chosen_launches_serve_any_number_of_tokens(m):
    """The tables' own choice, K split where it says so, bias included."""
    n, k = 40, 1088
    fmt, codes = int_layer(4, n, k, 64, False)
    prepared = wna16.to_device_layout(fmt.pack(codes), fmt, n, k)
    tensors = dict(zip(("weight", "words", "row_scale"), prepared, strict=True))
    x, bias = random_tokens(m, k, torch.float16), random_tokens(1, n, torch.float16)[0]
    y = launch.matmul(wna16.layer_of(n, k, 4, 64, x.dtype, bias), x, bias, tensors, FACTS)
    expected = x.double() @ fmt.dequantize(codes).double().t() + bias.double()
    assert relative(y, expected) < ROUNDING[torch.float16]


def quantized(x: torch.Tensor, k_pad: int, divisor: torch.Tensor | None = None, group: int | None = None):
    codes = torch.empty(x.shape[0], k_pad, dtype=torch.int8)
    scale = torch.empty(x.shape[0])
    sums = None if group is None else torch.empty(x.shape[0], k_pad // group, dtype=torch.int32)
    quantize_rows[(x.shape[0],)](x, divisor, codes, scale, sums, x.shape[1], k_pad, BLOCK=256, GROUP=group or 1)
    return codes, scale, sums


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_codes_equal_the_reference(dtype, divided):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 600, generator=generator) * torch.logspace(-4, 3, 9).unsqueeze(1)
    x[3] = 0
    x = x.to(dtype)
    divisor = torch.rand(600, generator=generator) + 0.1 if divided else None
    codes, scale, sums = quantized(x, 640, divisor, 64)
    expected, expected_scale = quantize_token(x if divisor is None else x.float() / divisor)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes[:, :600], expected)
    assert not codes[:, 600:].any(), "padding must be zero"
    assert torch.equal(sums, codes.view(9, 10, 64).sum(-1, dtype=torch.int32))


def test_ties_go_to_the_even_code():
    ties = torch.arange(-126.5, 127)
    x = torch.cat([torch.tensor([127.0]), ties]).unsqueeze(0)  # scale 1: every other value lies between two codes
    codes, _, _ = quantized(x, 256)
    assert torch.equal(codes[:, : x.shape[1]], quantize_token(x)[0])
    assert (codes[0, 1 : x.shape[1]] % 2 == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_is_seen_in_its_scale(bad):
    x = torch.ones(2, 40)
    x[1, 7] = bad
    _, scale, _ = quantized(x, 64)
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


def native_codes(x, activation, divisor):
    """(values uint8 codes [M, K], scale bytes [M, K / G]) that the token program makes."""
    m, k = x.shape
    group = 16 if divisor is not None else 32
    four_six = isinstance(activation, NvFp4) and activation.four_six
    step = fp4_native.tokens_step(k, activation.name, launch.dtype_name(x.dtype), four_six)
    q, scale = torch.empty(m, k // 2, dtype=torch.uint8), torch.empty(m, k // group, dtype=torch.uint8)
    run(Plan(steps=(step,), scratch=()), {"x": x, "divisor": divisor, "q": q, "q_scale": scale}, m)
    return q, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [MxFp4(), NvFp4(), NvFp4(four_six=True)], ids=str)
def test_native_tokens_are_those_of_the_rule(activation, dtype):
    """Bit for bit; K in two programs, the second one ragged; every kind of size; a token with an infinity is not finite."""
    fmt, (m, k) = Fp4Block(kind=activation.name), (4, 2048 + 96)
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(m, k, generator=generator) * torch.logspace(-4, 4, m).unsqueeze(1)).to(dtype)
    x[0, :32] = 0
    x[1, 40] = float("nan")
    x[2, 40] = float("inf")
    inputs = activation.fit(x.float(), torch.tensor([3.0]))
    divisor = inputs.get("input_global_scale")
    q, scale = native_codes(x, activation, divisor)
    params = {"weight_scale": scale} if divisor is None else {"weight_scale": scale.view(torch.float8_e4m3fn)}
    seen = fmt.dequantize(fmt.unpack({"weight_packed": q, "weight_global_scale": divisor, **params}, m, k))
    wanted = activation.quantize(x, inputs)
    spoiled = torch.zeros(m, k, dtype=torch.bool)
    spoiled[1:3, 32:64] = True
    if divisor is not None:
        spoiled[1:3, 48:64] = False
        assert bool(seen[1:3, 32:48].isnan().all())
    else:
        assert scale[1:3, 1].tolist() == [255, 255]
    assert torch.equal(seen[~spoiled], wanted[~spoiled])


@pytest.mark.parametrize(
    ("m", "n", "k", "processors", "splits"), [(1, 130, 288, 64, 2), (17, 72, 544, 1, 1), (64, 40, 96, 9, 1)]
)
def test_native_four_bit_products(m, n, k, processors, splits):
    """mxfp4 against float64, tails of M, N and K, one part of K and several."""
    fmt, activation = Fp4Block(kind="mxfp4"), MxFp4()
    generator = torch.Generator().manual_seed(n + m)
    fields = fmt.pack(fmt.nearest(torch.randn(n, k, generator=generator)))
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cuda")
    prepared = fp4_native.GpuFp4Native().prepare(fields, spec)
    weight = fmt.dequantize(fmt.unpack(fields, n, k)).double()
    dtype = torch.bfloat16 if m == 17 else torch.float32
    x, bias = random_tokens(m, k, dtype), torch.randn(n, generator=generator)
    y = fp4_native.multiply(x, *prepared, None, bias, False, processors)
    assert relative(y, activation.quantize(x, {}).double() @ weight.t() + bias.double()) < ROUNDING[dtype]
    assert fp4_native.parts(m, n, k, processors)[1] == splits


def test_native_blocks_of_sixteen():
    """The interpreter takes E4M3 bytes for powers of two, so this is about which block a byte belongs to."""
    m, n, k = 17, 130, 304
    generator = torch.Generator().manual_seed(3)
    fmt, activation = Fp4Block(kind="nvfp4"), NvFp4()
    fields = fmt.pack(fmt.nearest(torch.randn(n, k, generator=generator)))
    fields["input_global_scale"] = torch.ones(1)
    x = random_tokens(m, k, torch.float32)
    q, scale = native_codes(x, activation, fields["input_global_scale"])
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cuda")
    weight, weight_scale, row_scale, divisor, whole = fp4_native.GpuFp4Native().prepare(fields, spec)

    def as_powers(packed, scales):
        codes = unpack_bits(packed, 4, k)
        powers = torch.exp2(scales.double() - 127).repeat_interleave(16, 1)
        return E2M1.decode(codes).double() * powers

    wanted = as_powers(q, scale) @ as_powers(weight, weight_scale).t() / whole.double()
    y = fp4_native.multiply(x, weight, weight_scale, row_scale, divisor, None, False, 1)
    assert relative(y, wanted) < ROUNDING[torch.float32]


@pytest.mark.parametrize(
    ("books", "group", "m", "n", "k", "processors", "splits"),
    [
        (1, 4, 1, 130, 576, 9, 2),
        (2, 8, 17, 72, 200, 1, 2),
        (3, 2, 33, 40, 264, 9, 7),
        (1, 16, 2, 40, 96, 9, 1),
        (1, 1, 2, 40, 40, 1, 1),
        (2, 8, DENSE_TOKENS, 70, 200, 1, 1),
    ],
)
def test_codebook_products(books, group, m, n, k, processors, splits):
    """Against float64: tails of M, N and K, one part of K and several, one that begins inside a book, entries looked up in
    pieces, many tokens with a dense weight."""
    generator = torch.Generator().manual_seed(n + m)
    fmt = Codebook(books=books, group=group)
    codes = torch.randint(0, ENTRIES, (n, k // group, books), generator=generator, dtype=torch.uint8)
    book = torch.randn(books, ENTRIES, group, generator=generator).half()
    fields = fmt.pack(Codes(codes, {"codebook": book, "weight_scale": torch.rand(n, 1, generator=generator)}))
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cuda")
    prepared = codebook.GpuCodebook().prepare(fields, spec)
    weight, bias = fmt.dequantize(fmt.unpack(fields, n, k)).double(), torch.randn(n, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if m == DENSE_TOKENS and dtype == torch.float32:
            continue
        x = random_tokens(m, k, dtype)
        y = codebook.multiply(x, *prepared, bias, processors)
        assert relative(y, x.double() @ weight.t() + bias.double()) < ROUNDING[dtype], dtype
    shape = codebook.shape_of(m, group, "bfloat16")
    assert codebook.parts(m, n, k, books, group, shape, processors) == splits


@pytest.mark.parametrize(
    ("group", "dtype", "m", "n", "k", "processors", "splits"),
    [
        (64, torch.float16, 1, 72, 576, 9, 2),
        (64, torch.bfloat16, 17, 72, 192, 1, 1),
        (128, torch.float16, 64, 72, 128, 1, 1),
        (64, torch.float32, 9, 72, 64, 1, 1),
        (96, torch.bfloat16, 16, 300, 96, 1, 1),
        (-1, torch.float32, 3, 72, 104, 1, 1),
        (-1, torch.bfloat16, 3, 72, 201, 1, 1),
        (64, torch.float16, DENSE_TOKENS, 72, 128, 1, 1),
        (-1, torch.bfloat16, DENSE_TOKENS, 40, 201, 1, 1),
    ],
)
def test_two_planes(group, dtype, m, n, k, processors, splits):
    """Against float64: tails of M, N and K, one part of K and two, many tokens with a dense weight."""
    generator = torch.Generator().manual_seed(n + m)
    fmt = BinaryDual(group=group)
    scale = torch.randn(n, fmt.groups(k), 2, generator=generator).to(fmt.scale_dtype)
    codes = torch.randint(0, 4, (n, k), generator=generator, dtype=torch.uint8)
    fields = fmt.pack(Codes(codes, {"weight_scale": scale}))
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cuda")
    prepared = dual.GpuDual().prepare(fields, spec)
    weight, bias = fmt.dequantize(fmt.unpack(fields, n, k)).double(), torch.randn(n, generator=generator)
    x = random_tokens(m, k, dtype)
    y = dual.multiply(x, *prepared, bias, group, processors)
    assert relative(y, x.double() @ weight.t() + bias.double()) < ROUNDING[dtype]
    assert dual.parts(m, n, k, group, launch.dtype_name(dtype), processors)[1] == splits
