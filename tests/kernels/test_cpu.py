"""What only the C++ kernels promise: equal integers on every instruction set and thread count, sound operators, one
thread pool, bit-exact activation quantization, and a clear refusal where there was no compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quant.kernels.activations.int_token import Int4Token, Int8Token, IntToken, quantize_token
from quant.kernels.activations.none import Unquantized
from quant.kernels.cpu import a8w4, build, codebook, dual, fp4, fp_channel, library, memory, w8a8, weight_only
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.format import Codes
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import ENTRIES, Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup

ROOT = Path(__file__).resolve().parents[2]
N, K, G = 72, 1056, 96


def built() -> bool:
    try:
        library.load()
    except library.Unavailable:
        return False
    return True


needs_library = pytest.mark.skipif(not built(), reason="the C++ kernels are not built")


def grouped(top: int) -> dict[str, Tensor]:
    """Scales and zero points of an asymmetric int_group layer."""
    return {
        "weight_scale": torch.rand(N, K // G).half(),
        "weight_zero": torch.randint(0, top, (N, K // G), dtype=torch.uint8),
    }


def problems() -> list[tuple[object, tuple[Tensor, ...], MatmulSpec]]:
    """One prepared layer per kernel: (kernel, prepared, spec)."""
    torch.manual_seed(0)
    z = torch.randint(0, 16, (N, K // G))
    integers = {
        "group_scale": torch.full((N, K // G), 7, dtype=torch.uint8),
        "group_offset": (-7 * z).to(torch.int8),
        "row_scale": torch.rand(N),
    }
    nvfp4 = {"weight_scale": torch.rand(N, K // 16).to(torch.float8_e4m3fn), "weight_global_scale": torch.tensor([700.0])}
    e3m0 = {"weight_scale": torch.rand(N, K // G).half(), "weight_exponents": torch.tensor([3], dtype=torch.uint8)}
    float_weights = [
        (weight_only.WeightOnly(), IntGroup(bits=bits, group=G, symmetric=False), Unquantized(), 2**bits, grouped(2**bits))
        for bits in (2, 3, 4, 8)
    ]
    layers = [
        (a8w4.A8W4(), Int4Dual(group=G), Int8Token(), 16, integers),
        (w8a8.W8A8(), IntGroup(bits=8, group=-1, symmetric=True), Int8Token(), 256, {"weight_scale": torch.rand(N, 1)}),
        (fp4.Fp4(), Fp4Block(kind="mxfp4"), Unquantized(), 16, {"weight_scale": torch.randint(118, 126, (N, K // 32)).byte()}),
        (fp4.Fp4(), Fp4Block(kind="nvfp4"), Unquantized(), 16, nvfp4),
        (fp_channel.FpChannelKernel(), FpChannel(group=G), Unquantized(), 16, e3m0),
        (dual.CpuDual(), BinaryDual(group=G), Unquantized(), 4, {"weight_scale": torch.randn(N, K // G, 2).half()}),
        *float_weights,
    ]
    out = []
    for kernel, fmt, activation, top, params in layers:
        spec = MatmulSpec(n=N, k=K, format=fmt, activation=activation, device="cpu")
        codes = Codes(torch.randint(0, top, (N, K), dtype=torch.uint8), params)
        out.append((kernel, kernel.prepare(fmt.pack(codes), spec), spec))
    for books, group in ((1, 4), (2, 8)):
        fmt = Codebook(books=books, group=group)
        spec = MatmulSpec(n=N, k=K, format=fmt, activation=Unquantized(), device="cpu")
        out.append((codebook.CpuCodebook(), codebook.CpuCodebook().prepare(fmt.pack(random_entries(fmt, N, K)), spec), spec))
    return out


def random_entries(fmt: Codebook, n: int, k: int) -> Codes:
    """Random codes of a random codebook."""
    codes = torch.randint(0, ENTRIES, (n, k // fmt.group, fmt.books), dtype=torch.uint8)
    params = {"codebook": torch.randn(fmt.books, ENTRIES, fmt.group).half(), "weight_scale": torch.rand(n, 1)}
    return Codes(codes, params)


def operator_calls() -> list[tuple[object, tuple[object, ...]]]:
    """Each torch operator with arguments for it."""
    (
        (_, (codes, scales, rows), _),
        (_, (codes8, rows8), _),
        _,
        (_, (codes_fp4, scale_fp4, rows_fp4, _), _),
        (_, (codes_fp, scale_fp, kinds), _),
        (_, (codes_dual, scale_dual), _),
        *_,
        (_, (codes4, scale, zero), _),
        _,
        _,
        (_, entries, _),
    ) = problems()
    x, bias = torch.randn(5, K), torch.randn(N)
    shift = torch.randint(0, 4, (K,), dtype=torch.uint8)
    return [
        (torch.ops.lowbit.cpu_a8w4, (x, codes, scales, rows, bias, G, 127, 127.0)),
        (torch.ops.lowbit.cpu_w8a8, (x, codes8, rows8, None, K)),
        (torch.ops.lowbit.cpu_weight_only, (x.bfloat16(), codes4, scale, zero, bias, N, K, 4, G)),
        (torch.ops.lowbit.cpu_fp4, (x, codes_fp4, scale_fp4, rows_fp4, bias, N, 16)),
        (torch.ops.lowbit.cpu_fp4_multi, (x, codes_fp4, scale_fp4, None, [bias[:64], None], [64, N - 64], 16)),
        (
            torch.ops.lowbit.cpu_fp_channel_multi,
            (x, codes_fp, scale_fp, kinds, torch.rand(5), [bias[:64], None], [64, N - 64], K, G),
        ),
        (torch.ops.lowbit.cpu_dual, (x, codes_dual, scale_dual, bias, N, K, G)),
        (torch.ops.lowbit.cpu_codebook, (x.bfloat16(), *entries, bias, N, K)),
        (torch.ops.lowbit.cpu_dual_multi, (x, codes_dual, scale_dual, [None, bias[64:]], [64, N - 64], K, G)),
        (
            torch.ops.lowbit.cpu_fp_shift,
            (x.bfloat16(), torch.rand(1), shift, torch.tensor([2], dtype=torch.uint8), 8, True, 16),
        ),
        (torch.ops.lowbit.cpu_a8w4_multi, (x, codes, scales, rows, [bias[:64], None], [64, N - 64], G, 7, 9.0)),
        (torch.ops.lowbit.cpu_w8a8_multi, (x, codes8, rows8, [None, bias[64:]], [64, N - 64], K)),
        (torch.ops.lowbit.cpu_weight_only_multi, (x, codes4, scale, zero, [None, None], [32, N - 32], K, 4, G)),
    ]


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("m", [1, 4, 5, 40])
def test_every_instruction_set_gives_the_same(m: int) -> None:
    lib, x = library.load(), torch.randn(m, K)
    available = [isa for number, isa in enumerate(library.ISAS) if lib.lowbit_select(number) == 0]
    try:
        (dual4, prepared4, spec4), *rest = problems()
        few_bits = (dual4, prepared4, replace(spec4, activation=Int4Token(clip=0.8)))
        for kernel, prepared, spec in [few_bits, (dual4, prepared4, spec4), *rest]:
            results = []
            for isa in available:
                library.select(lib, isa)
                results.append(kernel.matmul(x, prepared, None, spec))
            for isa, y in zip(available[1:], results[1:], strict=True):
                if isinstance(spec.activation, IntToken):
                    assert torch.equal(y, results[0]), (kernel.name, isa)
                else:
                    assert (y - results[0]).norm() < 1e-6 * results[0].norm(), (kernel.name, spec.format, isa)
    finally:
        library.select(lib, available[-1])


@needs_library
@pytest.mark.parametrize("group", [16, 96, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bfloat16_tokens_are_right_on_every_instruction_set(bits: int, group: int) -> None:
    """Tokens that vdpbf16ps multiplies as they are, in poisoned panels: rows and k that fill no unit, all numbers of tokens."""
    lib = library.load()
    available = [isa for number, isa in enumerate(library.ISAS) if lib.lowbit_select(number) == 0]
    n, k = 40, 1056 if group != -1 else 1032
    try:
        for symmetric in (True, False):
            fmt = IntGroup(bits=bits, group=group, symmetric=symmetric)
            scale = torch.rand(n, fmt.groups(k)).to(fmt.scale_dtype)
            zero = {} if symmetric else {"weight_zero": torch.randint(0, 2**bits, (n, fmt.groups(k)), dtype=torch.uint8)}
            codes = Codes(torch.randint(0, 2**bits, (n, k), dtype=torch.uint8), {"weight_scale": scale} | zero)
            fields = fmt.pack(codes)
            spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cpu")
            kernel = weight_only.WeightOnly()
            prepared = kernel.prepare(fields, spec)
            weight = fmt.dequantize(codes).double()
            for m in (1, 2, 3, 4, 5, 17, 64):
                x = torch.randn(m, k).bfloat16()
                wanted = x.double() @ weight.t()
                for isa in available:
                    library.select(lib, isa)
                    kernel.matmul(torch.full((m, k), torch.nan).bfloat16(), prepared, None, spec)  # scratch full of NaN
                    y = kernel.matmul(x, prepared, None, spec)
                    assert (y.double() - wanted).norm() < 2.5e-3 * wanted.norm(), (isa, m, symmetric)
    finally:
        library.select(lib, available[-1])


@needs_library
@pytest.mark.parametrize(("group", "k"), [(16, 1056), (48, 1008), (-1, 1035)])
def test_two_planes_are_right_on_every_instruction_set(group: int, k: int) -> None:
    """As above; k that fill no word, scales of any sign."""
    lib, fmt, n = library.load(), BinaryDual(group=group), 40
    available = [isa for number, isa in enumerate(library.ISAS) if lib.lowbit_select(number) == 0]
    scale = torch.randn(n, fmt.groups(k), 2).to(fmt.scale_dtype)
    codes = Codes(torch.randint(0, 4, (n, k), dtype=torch.uint8), {"weight_scale": scale})
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cpu")
    kernel = dual.CpuDual()
    fields = fmt.pack(codes)
    prepared = kernel.prepare(fields, spec)
    assert all(torch.equal(t, fields[name]) for name, t in kernel.restore(prepared, spec).items())
    weight = fmt.dequantize(codes).double()
    try:
        for m in (1, 2, 3, 4, 5, 17, 64):
            for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2.5e-3)):
                x = torch.randn(m, k).to(dtype)
                wanted = x.double() @ weight.t()
                for isa in available:
                    library.select(lib, isa)
                    kernel.matmul(torch.full((m, k), torch.nan).to(dtype), prepared, None, spec)  # scratch full of NaN
                    y = kernel.matmul(x, prepared, None, spec)
                    assert (y.double() - wanted).norm() < tolerance * wanted.norm(), (isa, m, dtype)
    finally:
        library.select(lib, available[-1])


@needs_library
@pytest.mark.parametrize(("books", "group", "k"), [(1, 4, 1036), (2, 8, 1048), (3, 2, 70), (1, 64, 192)])
def test_codebooks_are_right_on_every_instruction_set(books: int, group: int, k: int) -> None:
    """As above; an odd number of blocks, columns that fill no set of tables, a chunk of tokens that leaves one over."""
    lib, fmt, n = library.load(), Codebook(books=books, group=group), 72
    available = [isa for number, isa in enumerate(library.ISAS) if lib.lowbit_select(number) == 0]
    codes = random_entries(fmt, n, k)
    spec = MatmulSpec(n=n, k=k, format=fmt, activation=Unquantized(), device="cpu")
    kernel = codebook.CpuCodebook()
    fields = fmt.pack(codes)
    prepared = kernel.prepare(fields, spec)
    picked = kernel.rows(prepared, torch.tensor([70, 3]), spec)
    weight = fmt.dequantize(codes).double()
    assert torch.equal(fmt.dequantize(picked).double(), weight[[70, 3]])
    try:
        for m in (1, 2, 3, 4, 5, 17, 64, 100, *([1537] if books == 3 else [])):
            for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
                x = torch.randn(m, k).to(dtype)
                wanted = x.double() @ weight.t()
                for isa in available:
                    library.select(lib, isa)
                    kernel.matmul(torch.full((m, k), torch.nan).to(dtype), prepared, None, spec)  # scratch full of NaN
                    y = kernel.matmul(x, prepared, None, spec)
                    assert (y.double() - wanted).norm() < tolerance * wanted.norm(), (isa, m, dtype)
    finally:
        library.select(lib, available[-1])


@needs_library
@pytest.mark.parametrize("m", [1, 30, 500])
@pytest.mark.usefixtures("_threads")
def test_thread_count_does_not_change_the_result(m: int) -> None:
    x = torch.randn(m, K)
    for kernel, prepared, spec in problems():
        torch.set_num_threads(1)
        one = kernel.matmul(x, prepared, None, spec)
        torch.set_num_threads(2)
        assert torch.equal(kernel.matmul(x, prepared, None, spec), one), kernel.name


@needs_library
@pytest.mark.parametrize("k", [64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_codes_are_bit_exact(dtype: torch.dtype, k: int) -> None:
    """An identity weight lets the kernel's own token codes and scale out."""
    x = torch.randn(40, k) * torch.logspace(-8, 4, 40).unsqueeze(-1)
    x[3] = torch.arange(k) - 31.5  # many values half-way between two codes
    x[3, 0] = 127
    x[4] = 0
    x = x.to(dtype)
    spec = MatmulSpec(n=k, k=k, format=IntGroup(bits=8, group=-1, symmetric=True), activation=Int8Token(), device="cpu")
    eye = Codes((128 + torch.eye(k)).to(torch.uint8), {"weight_scale": torch.ones(k, 1)})
    kernel = w8a8.W8A8()
    y = kernel.matmul(x, kernel.prepare(spec.format.pack(eye), spec), None, spec)
    codes, scale = quantize_token(x)
    assert torch.equal(y, (codes.float() * scale.unsqueeze(-1)).to(dtype))


@needs_library
def test_matrix_units_are_left_as_torch_expects_them() -> None:
    """Both of us configure AMX tiles on the same threads; neither may see the other's."""
    x, weight = torch.randn(64, K).bfloat16(), torch.randn(N, K).bfloat16()
    wanted = nn.functional.linear(x, weight)
    for kernel, prepared, spec in problems():
        y = kernel.matmul(x, prepared, None, spec)
        assert torch.equal(nn.functional.linear(x, weight), wanted)
        assert torch.equal(kernel.matmul(x, prepared, None, spec), y)


@needs_library
def test_a_nan_token_stays_visible() -> None:
    x = torch.randn(3, K)
    x[1, 5] = float("nan")
    for kernel, prepared, spec in problems():
        y = kernel.matmul(x, prepared, None, spec)
        seen = torch.ones(spec.n, dtype=torch.bool)
        if spec.format.name == "binary_dual":  # adds a token only where a bit is set
            seen = kernel.rows(prepared, torch.arange(spec.n), spec).codes[:, 5] != 0
        assert y[1][seen].isnan().all()
        assert y[[0, 2]].isfinite().all()


@needs_library
def test_operators_pass_opcheck() -> None:
    for operator, arguments in operator_calls():
        torch.library.opcheck(operator.default, arguments)


@needs_library
def test_compile_sees_one_operator() -> None:
    x = torch.randn(3, K)
    for kernel, prepared, spec in problems():
        graphs = []

        def backend(module: torch.fx.GraphModule, _: list[Tensor], graphs: list[torch.fx.Graph] = graphs) -> object:
            graphs.append(module.graph)
            return module.forward

        torch._dynamo.reset()
        function = torch.compile(kernel.matmul, fullgraph=True, backend=backend)
        assert torch.equal(function(x, prepared, None, spec), kernel.matmul(x, prepared, None, spec))
        calls = [str(node.target) for node in graphs[0].nodes if node.op == "call_function"]
        assert calls == [f"lowbit.{kernel.name}.default"], calls


@needs_library
@pytest.mark.parametrize("m", [1, 3, 40])
def test_joined_layers_give_what_each_gives_alone(m: int) -> None:
    """Layers of different row counts, none of them whole blocks but one, with and without bias."""
    x = torch.randn(m, K)
    for kernel, whole, spec in problems():
        if isinstance(spec.format, Codebook):
            assert kernel.join([whole, whole]) is None  # each layer has codebooks of its own
            continue
        specs, prepared, biases = [], [], []
        for n in (N, 32, 7):
            specs.append(replace(spec, n=n))
            fields = {name: t[:n].contiguous() for name, t in kernel.restore(whole, spec).items()}
            prepared.append(kernel.prepare(fields, specs[-1]))
            biases.append(None if n == 32 else torch.randn(n))
        joined, parts = kernel.join(prepared)
        ys = kernel.matmul_joined(x, joined, biases, specs)
        for y, own, part, bias, one in zip(ys, prepared, parts, biases, specs, strict=True):
            assert y.is_contiguous()
            assert torch.equal(y, kernel.matmul(x, own, bias, one)), kernel.name
            assert torch.equal(y, kernel.matmul(x, part, bias, one)), kernel.name
            for name, t in kernel.restore(part, one).items():
                assert torch.equal(t.view(torch.uint8), kernel.restore(own, one)[name].view(torch.uint8)), name


@needs_library
def test_joined_layers_must_fit_their_weight() -> None:
    kernel, prepared, spec = problems()[0]
    with pytest.raises(ValueError, match="do not fit a weight of 3 blocks"):
        kernel.matmul_joined(torch.randn(1, K), prepared, [None, None], [replace(spec, n=N), replace(spec, n=N)])


def test_huge_page_memory_is_aligned_apart_and_freed() -> None:
    arena = memory.Arena()
    one, two = arena.empty(100), arena.empty(100)
    one.fill_(1)
    two.fill_(2)
    assert one.sum() == 100
    assert two.data_ptr() % memory.ALIGN == 0
    chunk = weakref.ref(arena.chunk)
    big = arena.empty(memory.CHUNK_BYTES + memory.HUGE_BYTES)  # does not fit: a chunk of its own
    big.fill_(3)
    del one, two
    assert chunk() is None
    assert memory.empty((3, 5), torch.float16).shape == (3, 5)


@needs_library
def test_backward_is_refused_not_silently_zero() -> None:
    kernel, prepared, spec = problems()[0]
    y = kernel.matmul(torch.randn(2, K, requires_grad=True), prepared, None, spec)
    with pytest.raises(RuntimeError, match="no backward pass"):
        y.sum().backward()


@needs_library
def test_wrong_input_is_refused_before_memory_is_read() -> None:
    for kernel, prepared, spec in problems():
        with pytest.raises(ValueError, match=f"contiguous \\[M, {K}\\]"):
            kernel.matmul(torch.randn(2, K - 8), prepared, None, spec)
        with pytest.raises(ValueError, match=f"contiguous \\[{N}\\]"):
            kernel.matmul(torch.randn(2, K), prepared, torch.randn(N - 1), spec)
        with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
            kernel.matmul(torch.randn(2, K).double(), prepared, None, spec)


@needs_library
@pytest.mark.usefixtures("_threads")
def test_one_thread_pool() -> None:
    """Our regions follow torch's setting, and a fresh process maps libgomp once."""
    for count in (2, 1):
        torch.set_num_threads(count)
        assert library.load().lowbit_threads() == count
    code = "from quant.kernels.cpu import library; library.load(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(set(re.findall(r"\S*libgomp\S*", maps))) == 1


@needs_library
def test_forced_instruction_set() -> None:
    code = "from quant.kernels.cpu import library; library.load(); print('loaded')"
    for wanted, answer in (
        ("portable", "loaded"),
        ("sse9", "LOWBIT_CPU_ISA=sse9 is unknown; allowed: portable, avx2, avx512, amx"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"LOWBIT_CPU_ISA": wanted}
        )
        assert answer in done.stdout + done.stderr


def test_without_a_compiler_the_reason_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = build.build_or_explain(tmp_path)
    assert reason == "no-such-compiler was not found"
    with pytest.raises(library.Unavailable, match=r"built without a C\+\+ compiler: no-such-compiler was not found"):
        library.open_library(tmp_path)


def test_an_unbuilt_checkout_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(library.Unavailable, match=r"python -m quant\.kernels\.cpu\.build"):
        library.open_library(tmp_path)


def test_without_the_library_the_kernels_refuse_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise library.Unavailable("built without a C++ compiler: none")

    monkeypatch.setattr(library, "load", missing)
    spec = MatmulSpec(n=8, k=64, format=Int4Dual(group=32), activation=Int8Token(), device="cpu")
    assert a8w4.A8W4().refuses(spec) == "built without a C++ compiler: none"
