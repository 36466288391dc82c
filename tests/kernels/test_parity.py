"""Every registered kernel that serves a CPU problem against a float64 reference, by relative norm.

Fresh output memory is poisoned first, so an element that a kernel leaves unwritten is a NaN and fails the comparison.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels import dispatch
from quant.kernels.activation import Activation
from quant.kernels.activations.fp8_token import Fp8Token
from quant.kernels.activations.int_token import Int4Token, Int8Token, IntToken, quantize_token
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.none import Unquantized
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.dispatch import Kernel, MatmulSpec
from quant.kernels.format import Codes, Fields, Format
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp8 import Fp8
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.formats.low_rank import LowRank
from quant.kernels.minifloat import EXPONENTS

KERNELS = dispatch.load_all()
SHAPES = ((33, 96, 48), (200, 160, 32), (64, 576, 96), (7, 64, 16))  # N, K, G
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
FORMATS = {
    "int4_dual": lambda g: (Int4Dual(group=g), Int8Token()),
    "w8": lambda g: (IntGroup(bits=8, group=-1, symmetric=True), Int8Token()),
    "w2_asym": lambda g: (IntGroup(bits=2, group=g, symmetric=False), Unquantized()),
    "w3_asym": lambda g: (IntGroup(bits=3, group=g, symmetric=False), Unquantized()),
    "w4_asym": lambda g: (IntGroup(bits=4, group=g, symmetric=False), Unquantized()),
    "w8_asym": lambda g: (IntGroup(bits=8, group=g, symmetric=False), Unquantized()),
    "w2_sym": lambda g: (IntGroup(bits=2, group=g, symmetric=True), Unquantized()),
    "w3_row": lambda g: (IntGroup(bits=3, group=-1, symmetric=True), Unquantized()),
    "w4_sym": lambda g: (IntGroup(bits=4, group=g, symmetric=True), Unquantized()),
    "w4_row": lambda g: (IntGroup(bits=4, group=-1, symmetric=False), Unquantized()),
    "fp4": lambda g: (FpChannel(group=g), Unquantized()),
    "fp4_row": lambda g: (FpChannel(group=-1), Unquantized()),
    "fp8": lambda g: (FpChannel(bits=8), Unquantized()),
    "e4m3": lambda g: (Fp8(), Fp8Token()),
    "w8_row": lambda g: (IntGroup(bits=8, group=-1, symmetric=False), Unquantized()),
    "mxfp4": lambda g: (Fp4Block(kind="mxfp4"), Unquantized()),
    "nvfp4": lambda g: (Fp4Block(kind="nvfp4"), Unquantized()),
    "mxfp4_w4a4": lambda g: (Fp4Block(kind="mxfp4"), MxFp4()),
    "dual": lambda g: (BinaryDual(group=g), Unquantized()),
    "dual_row": lambda g: (BinaryDual(group=-1), Unquantized()),
    "w2_side": lambda g: (LowRank(rank=5, base=IntGroup(bits=2, group=g)), Unquantized()),
    "codebook_1x8g4": lambda g: (Codebook(books=1, group=4), Unquantized()),
    "codebook_2x8g8": lambda g: (Codebook(books=2, group=8), Unquantized()),
    "nvfp4_w4a4": lambda g: (Fp4Block(kind="nvfp4"), NvFp4()),
    "int4_dual_a4": lambda g: (Int4Dual(group=g), Int4Token(clip=0.8)),
}


def random_codes(fmt: Format, n: int, k: int) -> Codes:
    """Valid random codes and parameters."""
    if isinstance(fmt, LowRank):
        return fmt.beside(random_codes(fmt.base, n, k), torch.randn(n, fmt.rank) * 0.3, torch.randn(fmt.rank, k) * 0.3)
    if isinstance(fmt, Int4Dual):
        s2, z = torch.randint(1, 16, (n, k // fmt.group)), torch.randint(0, 16, (n, k // fmt.group))
        beyond = ((15 - z) * s2 > 127) | (z * s2 > 128)
        s2[beyond], z[beyond] = 8, 8
        params = {"group_scale": s2.to(torch.uint8), "group_offset": (-z * s2).to(torch.int8), "row_scale": torch.rand(n) + 0.1}
        return Codes(torch.randint(0, 16, (n, k), dtype=torch.uint8), params)
    if isinstance(fmt, Codebook):
        codes = torch.randint(0, 256, (n, k // fmt.group, fmt.books), dtype=torch.uint8)
        books = torch.randn(fmt.books, 256, fmt.group).half()
        return Codes(codes, {"codebook": books, "weight_scale": torch.rand(n, 1) * 0.1 + 0.01})
    if isinstance(fmt, BinaryDual):
        scale = (torch.rand(n, fmt.groups(k), 2) * 0.1 + 0.01) * torch.tensor([1.0, -1.0])
        return Codes(torch.randint(0, 4, (n, k), dtype=torch.uint8), {"weight_scale": scale.to(fmt.scale_dtype)})
    if isinstance(fmt, Fp4Block):
        groups, params = k // fmt.group, {"weight_scale": torch.randint(118, 126, (n, k // fmt.group), dtype=torch.uint8)}
        if fmt.kind == "nvfp4":  # subnormal scales too
            params = {"weight_scale": torch.randint(1, 0x7F, (n, groups), dtype=torch.uint8).view(torch.float8_e4m3fn)}
            params["weight_global_scale"] = torch.rand(1) * 1000 + 500
        return Codes(torch.randint(0, 16, (n, k), dtype=torch.uint8), params)
    if isinstance(fmt, FpChannel):
        scale = (torch.rand(n, fmt.groups(k)) * 0.1 + 0.01).to(fmt.scale_dtype)
        exponents = torch.tensor([EXPONENTS[fmt.bits][n % 3]], dtype=torch.uint8)
        codes = torch.randint(0, 2**fmt.bits, (n, k), dtype=torch.uint8)
        return Codes(codes, {"weight_scale": scale, "weight_exponents": exponents})
    if isinstance(fmt, Fp8):
        codes = torch.randint(0, 127, (n, k), dtype=torch.uint8) | torch.randint(0, 2, (n, k), dtype=torch.uint8) << 7
        return Codes(codes, {"weight_scale": torch.rand(n, 1) * 0.1 + 0.01})
    assert isinstance(fmt, IntGroup)
    top, groups = 2**fmt.bits, fmt.groups(k)
    sign = torch.where(torch.rand(n, groups) < 0.3, -1.0, 1.0)
    params = {"weight_scale": ((torch.rand(n, groups) * 0.1 + 0.01) * sign).to(fmt.scale_dtype)}
    if not fmt.symmetric:
        params["weight_zero"] = torch.randint(0, top, (n, groups), dtype=torch.uint8)
    return Codes(torch.randint(0, top, (n, k), dtype=torch.uint8), params)


def fields_of(spec: MatmulSpec, codes: Codes) -> Fields:
    """All stored tensors of a layer."""
    tokens = torch.randn(8, spec.k)
    return {**spec.format.pack(codes), **spec.activation.fit(tokens, tokens.abs().amax(0))}


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, fields: Fields) -> Tensor:
    """float64 [M, N]."""
    seen = activation.quantize(x, fields).double()
    if isinstance(activation, IntToken):
        codes, scale = quantize_token(x, activation.top, activation.reach)
        seen = codes.double() * scale.double().unsqueeze(-1)
    return seen @ weight.double().T + (0 if bias is None else bias.double())


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty filled with NaN, or with 0x5A where there is none."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 0x5A)

    monkeypatch.setattr(torch, "empty", poisoned)


def serving(kernel: Kernel, kind: str, n: int, k: int, g: int) -> MatmulSpec:
    """The spec of a problem; skips where the kernel refuses it."""
    fmt, activation = FORMATS[kind](g)
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=activation, device="cpu")
    if (reason := kernel.refuses(spec)) is not None:
        pytest.skip(reason)
    return spec


every = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
kinds = pytest.mark.parametrize("kind", FORMATS)


@every
@kinds
@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
def test_matches_float64(kernel: Kernel, kind: str, n: int, k: int, g: int) -> None:
    torch.manual_seed(n)
    spec = serving(kernel, kind, n, k, g)
    codes = random_codes(spec.format, n, k)
    fields, weight = fields_of(spec, codes), spec.format.dequantize(codes)
    prepared = kernel.prepare(fields, spec)
    for m in (1, 3, 17, 64):
        for dtype, tolerance in ROUNDING.items():
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
            for given in (None, bias):
                y = kernel.matmul(x, prepared, given, spec)
                assert y.dtype == dtype
                assert y.shape == (m, n)
                assert relative(y, expected(x, weight, given, spec.activation, fields)) < tolerance, (m, dtype)


@every
@kinds
@pytest.mark.parametrize(("n", "k", "g"), SHAPES)
def test_restore_gives_back_the_canonical_bytes(kernel: Kernel, kind: str, n: int, k: int, g: int) -> None:
    spec = serving(kernel, kind, n, k, g)
    fields = fields_of(spec, random_codes(spec.format, n, k))
    restored = kernel.restore(kernel.prepare(fields, spec), spec)
    assert restored.keys() == fields.keys()
    for name, stored in fields.items():
        assert restored[name].dtype == stored.dtype
        assert torch.equal(restored[name].view(torch.uint8), stored.view(torch.uint8)), name  # float8 has no `equal`
        assert restored[name].is_contiguous()


@every
@kinds
def test_extremes(kernel: Kernel, kind: str) -> None:
    """Largest codes against largest tokens, an all-zero token, one huge outlier, no token at all."""
    torch.manual_seed(0)
    n, k, g = 40, 4096, 64
    spec = serving(kernel, kind, n, k, g)
    codes = random_codes(spec.format, n, k)
    if isinstance(spec.format, Int4Dual):  # w8 = -128 and 127 at the ends of the code range
        codes.params["group_scale"].fill_(17)
        codes.params["group_offset"].fill_(-128)
    codes.codes[: n // 2] = 0
    coded = spec.format.inner
    codes.codes[n // 2 :] = 2**coded.bits - 1 if isinstance(coded, IntGroup | BinaryDual) else 15
    fields, weight = fields_of(spec, codes), spec.format.dequantize(codes)
    prepared = kernel.prepare(fields, spec)
    x = torch.randn(21, k)
    x[0], x[1], x[2] = 0, 3, -3
    x[3, 7] = 1e6
    y = kernel.matmul(x, prepared, None, spec)
    assert torch.equal(y[0], torch.zeros(n))
    for row in (1, 2, 3, 20):
        wanted = expected(x[row : row + 1], weight, None, spec.activation, fields)
        assert relative(kernel.matmul(x[row : row + 1], prepared, None, spec), wanted) < 2e-5, row
        assert relative(y[row : row + 1], wanted) < 2e-5, row
    assert kernel.matmul(x[:0], prepared, None, spec).shape == (0, n)


@every
@pytest.mark.parametrize("kind", ["int4_dual", "w8"])
def test_integer_sums_are_exact(kernel: Kernel, kind: str) -> None:
    """With all scales powers of two the output is the int32 sum itself, so equality is bit for bit."""
    n, k, g = 65, 288, 96
    spec = serving(kernel, kind, n, k, g)
    codes = random_codes(spec.format, n, k)
    codes.params["row_scale" if kind == "int4_dual" else "weight_scale"].fill_(1)
    x = torch.randint(-127, 128, (19, k)).float()
    x[:, 0] = 127  # the token's scale is exactly 1
    wanted = (x.long() @ spec.format.dequantize(codes).long().T).float()
    prepared = kernel.prepare(spec.format.pack(codes), spec)
    assert torch.equal(kernel.matmul(x, prepared, None, spec), wanted)
    assert torch.equal(kernel.matmul(x[4:5], prepared, None, spec), wanted[4:5])


def test_cpu_kernels_are_the_ones_chosen() -> None:
    """The C++ kernels come before the reference wherever they were built."""
    for kind, name in (
        ("int4_dual", "cpu_a8w4"),
        ("int4_dual_a4", "cpu_a8w4"),
        ("w8", "cpu_w8a8"),
        ("fp4", "cpu_fp_channel"),
        ("dual", "cpu_dual"),
        ("codebook_1x8g4", "cpu_codebook"),
        ("codebook_2x8g8", "cpu_codebook"),
        *((f"w{b}_asym", "cpu_weight_only") for b in (2, 3, 4, 8)),
        *((kind, "cpu_fp4") for kind in ("mxfp4", "nvfp4", "mxfp4_w4a4", "nvfp4_w4a4")),
    ):
        fmt, activation = FORMATS[kind](32)
        kernel, refusals = dispatch.choose(MatmulSpec(n=8, k=64, format=fmt, activation=activation, device="cpu"))
        assert kernel.name == name or "C++" in refusals[name], refusals
