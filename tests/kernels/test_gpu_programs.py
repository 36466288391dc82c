"""The GPU kernels without a GPU: layouts, refusals, the choice of tiles, operators, and the programs in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quant.kernels.activation import Activation
from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.activations.int_token import Int8Token, quantize_token
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.none import Unquantized
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.dispatch import MatmulSpec, choose
from quant.kernels.format import Codes
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.codebook import Codebook
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu import launch, tiles
from quant.kernels.gpu.a8w4 import GpuA8W4, gpu_a8w4
from quant.kernels.gpu.codebook import GpuCodebook, gpu_codebook
from quant.kernels.gpu.dual import GpuDual, gpu_dual
from quant.kernels.gpu.fp4 import GpuFp4, gpu_fp4
from quant.kernels.gpu.fp4_native import GpuFp4Native
from quant.kernels.gpu.fp_channel import GpuFpChannel
from quant.kernels.gpu.launch import MAX_K
from quant.kernels.gpu.layout import POLICIES, WIDEST, from_words, pack_weight, to_words, unpack_weight
from quant.kernels.gpu.plan import DENSE_ROWS, DENSE_TOKENS, Layer, plan
from quant.kernels.gpu.w8a8 import DIVISOR, GpuW8A8, gpu_w8a8
from quant.kernels.gpu.wna16 import GpuWnA16, gpu_wna16
from quant.kernels.minifloat import E2M1, EXPONENTS

KERNEL = GpuA8W4()
INT8, FLOAT = Int8Token(), Unquantized()
W8 = IntGroup(bits=8, group=-1, symmetric=True)


def spec(group: int = 64, n: int = 48, k: int = 192, device: str = "cuda", activation: Activation = INT8) -> MatmulSpec:
    return MatmulSpec(n=n, k=k, format=Int4Dual(group=group), activation=activation, device=device)


def int_spec(
    fmt: IntGroup | FpChannel, n: int = 48, k: int = 192, activation: Activation = FLOAT, device: str = "cuda"
) -> MatmulSpec:
    return MatmulSpec(n=n, k=k, format=fmt, activation=activation, device=device)


def int_codes(fmt: IntGroup, n: int, k: int) -> Codes:
    generator = torch.Generator().manual_seed(n + k)
    params = {"weight_scale": torch.randn(n, fmt.groups(k), generator=generator).to(fmt.scale_dtype)}
    if not fmt.symmetric:
        params["weight_zero"] = torch.randint(0, 2**fmt.bits, (n, fmt.groups(k)), generator=generator, dtype=torch.uint8)
    return Codes(torch.randint(0, 2**fmt.bits, (n, k), generator=generator, dtype=torch.uint8), params)


def codebook_spec(group: int = 4, activation: Activation = FLOAT, device: str = "cuda") -> MatmulSpec:
    return MatmulSpec(n=48, k=192, format=Codebook(books=2, group=group), activation=activation, device=device)


def planes_spec(group: int, n: int = 48, k: int = 192, activation: Activation = FLOAT, device: str = "cuda") -> MatmulSpec:
    return MatmulSpec(n=n, k=k, format=BinaryDual(group=group), activation=activation, device=device)


def planes_fields(s: MatmulSpec) -> dict[str, torch.Tensor]:
    generator, fmt = torch.Generator().manual_seed(s.n + s.k), s.format
    scale = torch.randn(s.n, fmt.groups(s.k), 2, generator=generator).to(fmt.scale_dtype)
    codes = torch.randint(0, 4, (s.n, s.k), generator=generator, dtype=torch.uint8)
    return fmt.pack(Codes(codes, {"weight_scale": scale}))


def assert_restored(kernel, fields, s):
    back = kernel.restore(kernel.prepare(fields, s), s)
    assert back.keys() == fields.keys()
    for name in fields:
        assert back[name].dtype == fields[name].dtype
        assert torch.equal(back[name], fields[name]), name


@pytest.mark.parametrize(("n", "k", "group"), [(48, 192, 64), (7, 576, 96), (33, 96, 32), (130, 256, 128), (5, 1024, 256)])
def test_restore_is_the_inverse_of_prepare(dual_layer, n, k, group):
    s = spec(group, n, k)
    assert_restored(KERNEL, s.format.pack(dual_layer(n, k, group)[1]), s)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(33, 384, 128), (7, 576, 96), (20, 320, 64), (5, 96, 32), (9, 200, -1)])
def test_restore_is_the_inverse_of_prepare_for_int_group(n, k, group, bits, symmetric):
    fmt = IntGroup(bits=bits, group=group, symmetric=symmetric)
    assert_restored(GpuWnA16(), fmt.pack(int_codes(fmt, n, k)), int_spec(fmt, n, k))


def fp4_spec(kind: str, n: int = 48, k: int = 192, activation: Activation = FLOAT, device: str = "cuda") -> MatmulSpec:
    return MatmulSpec(n=n, k=k, format=Fp4Block(kind=kind), activation=activation, device=device)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), [(33, 96), (130, 256), (7, 1056)])
def test_restore_is_the_inverse_of_prepare_for_fp4(n, k, kind, zeros):
    """Every code and, for nvfp4, every scale; blocks that count as zeros keep their bytes."""
    generator = torch.Generator().manual_seed(n + k)
    s = fp4_spec(kind, n, k)
    fields = s.format.pack(s.format.nearest(torch.randn(n, k, generator=generator)))
    fields["weight_packed"] = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale = fields["weight_scale"].view(torch.uint8)
    if kind == "nvfp4":
        scale.copy_(torch.randint(1, 127, scale.shape, generator=generator))
    if zeros:
        scale[3, 1] = 0
    assert_restored(GpuFp4(), fields, s)
    assert len(GpuFp4().prepare(fields, s)) == 3 + (kind == "nvfp4") + 2 * zeros
    picked = torch.tensor([5, 3, 3])
    rows, whole = GpuFp4().rows(GpuFp4().prepare(fields, s), picked, s), s.format.unpack(fields, n, k)
    assert torch.equal(rows.codes, whole.codes[picked])
    assert torch.equal(rows.params["weight_scale"].view(torch.uint8), scale[picked])
    if kind == "nvfp4":
        tokens = {"input_global_scale": torch.tensor([48.0])}
        assert_restored(GpuFp4(), fields | tokens, fp4_spec(kind, n, k, NvFp4()))


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_the_fp4_layout_means_the_same_weights(kind):
    """Read the bits as the head of `jit/e2m1.py` describes them, in plain loops."""
    s = fp4_spec(kind, 3, 160)
    fields = s.format.pack(s.format.nearest(torch.randn(3, 160, generator=torch.Generator().manual_seed(1))))
    weight, words, row_scale, *_ = GpuFp4().prepare(fields, s)
    expected = s.format.dequantize(s.format.unpack(fields, 3, 160))
    per_block = 8 if kind == "nvfp4" else 4
    for row in range(3):
        for column in range(160):
            block, inside = divmod(column, 128)
            slice_, j = divmod(inside, 16)
            word = int(weight.view(torch.int32)[(4 * block + slice_ // 2) * 3 + row, j // 4]) & 0xFFFFFFFF
            low, sign = ((9, 15), (6, 13), (3, 12), (0, 14))[2 * (slice_ % 2) + j % 4 // 2]
            code = word >> low + 16 * (j % 2) & 7 | (word >> sign + 16 * (j % 2) & 1) << 3
            index = slice_ * per_block // 8
            byte = int(words[(block * per_block // 4 + index // 4) * 3 + row]) >> 8 * (index % 4) & 255
            scale = (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3) - 15)
            value = (1 - 2 * (code >> 3)) * float(E2M1.magnitudes[code & 7])
            assert value * scale * 2.0**-14 * float(row_scale[row]) == pytest.approx(float(expected[row, column]), rel=1e-6)


@pytest.mark.parametrize("activation", [MxFp4(), NvFp4(four_six=True)], ids=str)
def test_four_bit_tensor_cores_keep_the_stored_bytes(monkeypatch, activation):
    """Layers of their own tokens only, on GPUs that have them; a row's scale undoes both divisors."""
    s = fp4_spec(activation.name, 33, 96, activation)
    fields = s.format.pack(s.format.nearest(torch.randn(33, 96))) | activation.fit(torch.ones(1, 96), torch.full((96,), 3.0))
    assert_restored(GpuFp4Native(), fields, s)
    divisor = fields.get("weight_global_scale", torch.ones(1)) * fields.get("input_global_scale", torch.ones(1))
    assert torch.equal(GpuFp4Native().prepare(fields, s)[2], torch.ones(33) / divisor)
    monkeypatch.setattr(launch, "device_refuses", lambda spec: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability, served in (((9, 0), False), ((10, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert (GpuFp4Native().refuses(s) is None) == served
    assert "tokens with" in (GpuFp4Native().refuses(fp4_spec(activation.name)) or "")


CHANNELS = [(4, e, *size) for e in EXPONENTS[4] for size in ((33, 384, 128), (7, 576, 96), (20, 320, 64), (9, 200, -1))]
CHANNELS += [(8, e, 9, 200, -1) for e in EXPONENTS[8]]


@pytest.mark.parametrize(("bits", "exponents", "n", "k", "group"), CHANNELS)
def test_restore_is_the_inverse_of_prepare_for_fp_channel(bits, exponents, n, k, group):
    generator = torch.Generator().manual_seed(n + k)
    fmt, tokens = FpChannel(bits=bits, group=group), FpShift()
    scale = torch.rand(n, fmt.groups(k), generator=generator).to(fmt.scale_dtype) + 0.01
    fields = fmt.pack(
        Codes(torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8), fmt.params(scale, exponents))
    )
    s = MatmulSpec(n=n, k=k, format=fmt, activation=FLOAT, device="cuda")
    assert_restored(GpuFpChannel(), fields, s)
    picked = torch.tensor([5, 3, 3])
    rows, whole = GpuFpChannel().rows(GpuFpChannel().prepare(fields, s), picked, s), fmt.unpack(fields, n, k)
    assert torch.equal(fmt.dequantize(rows), fmt.dequantize(whole)[picked])
    shifted = fields | tokens.stored(torch.tensor(0.5), torch.randint(0, 16, (k,), generator=generator), 4)
    assert_restored(GpuFpChannel(), shifted, MatmulSpec(n=n, k=k, format=fmt, activation=tokens, device="cuda"))


def test_codebooks_are_restored_and_read_row_by_row():
    generator, s = torch.Generator().manual_seed(1), codebook_spec()
    codes = torch.randint(0, 256, (s.n, s.k // 4, 2), generator=generator, dtype=torch.uint8)
    book = torch.randn(2, 256, 4, generator=generator).half()
    fields = s.format.pack(Codes(codes, {"codebook": book, "weight_scale": torch.rand(s.n, 1, generator=generator)}))
    assert_restored(GpuCodebook(), fields, s)
    rows = torch.tensor([5, 0])
    picked = GpuCodebook().rows(GpuCodebook().prepare(fields, s), rows, s)
    assert torch.equal(s.format.dequantize(picked), s.format.dequantize(s.format.unpack(fields, s.n, s.k))[rows])


@pytest.mark.parametrize(("n", "k", "group"), [(33, 384, 128), (130, 576, 96), (200, 320, 64), (9, 201, -1)])
def test_planes_are_restored_and_read_row_by_row(n, k, group):
    s = planes_spec(group, n, k)
    fields = planes_fields(s)
    assert_restored(GpuDual(), fields, s)
    rows = torch.tensor([5, n - 1, 5])
    picked = GpuDual().rows(GpuDual().prepare(fields, s), rows, s)
    assert torch.equal(s.format.dequantize(picked), s.format.dequantize(s.format.unpack(fields, n, k))[rows])


@pytest.mark.parametrize("group", [96, -1])
def test_the_layout_of_planes_means_the_same_weights(group):
    """Read the bits as the head of the kernel file describes them, in plain loops."""
    s = planes_spec(group, 140, 96)
    fields = planes_fields(s)
    weight, words, _ = GpuDual().prepare(fields, s)
    expected, span = s.format.dequantize(s.format.unpack(fields, s.n, s.k)), weight.shape[1]
    pairs = words.view(torch.float32 if group == -1 else torch.float16).view(-1, 2)
    for row in range(s.n):
        i, r, j = row // 128, row // 16 % 8, row % 16
        for column in range(s.k):
            at = column // span
            element = int(weight[at * 32 + 16 * i + j, column % span])
            first, second = element >> r + 7 & 1, element >> (r + 7 ^ 8) & 1
            a1, a2 = pairs[(0 if group == -1 else at) * 256 + 128 * i + 16 * r + j].float()
            assert first * a1 + second * a2 == expected[row, column]
    assert len(weight) == -(-s.k // span) * 32 + 32, "a tile that sticks out of N would read past the end"


def test_w8a8_keeps_its_divisor():
    fields = W8.pack(int_codes(W8, 33, 200))
    s = int_spec(W8, 33, 200, Int8Token())
    assert_restored(GpuW8A8(), fields, s)
    assert_restored(GpuW8A8(), fields | {DIVISOR: torch.rand(200)}, s)


@pytest.mark.parametrize(("n", "k", "group"), [(5, 192, 64), (3, 576, 96), (4, 256, 128)])
def test_the_device_layout_means_the_same_integers(dual_layer, n, k, group):
    """Read the bytes as the head of the kernel file describes them, in plain loops."""
    s = spec(group, n, k)
    codes = dual_layer(n, k, group)[1]
    weight, words, _ = KERNEL.prepare(s.format.pack(codes), s)
    half = weight.shape[1]
    expected = s.format.integers(codes)
    for row in range(n):
        for column in range(k):
            block, inside = divmod(column, 2 * half)
            high, j = divmod(inside, half)
            byte = int(weight[block * n + row, j])
            word = int(words[block * n + row]) & 0xFFFFFFFF
            scale, base = word >> 16 * high & 255, word >> 16 * high + 8 & 255
            code = byte >> 4 if high else byte & 15
            assert code * scale + base - 128 == expected[row, column]
    assert weight.shape[0] == words.shape[0]
    assert weight.shape[0] >= -(-k // (2 * half)) * n + WIDEST - 1, "a tile that sticks out of N would read past the end"


@pytest.mark.parametrize("name", POLICIES)
def test_no_two_fields_of_a_layout_share_a_bit(name):
    """Slices are recovered one by one, whatever the others hold; mixed layouts keep neighbours in bytes 0 and 2."""
    policy = POLICIES[name]
    slice_ = policy.blockings[0][0]
    n, k = 3, policy.slices * slice_ + 8
    codes = torch.randint(0, 2**policy.bits, (n, k), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    weight = pack_weight(codes, policy, slice_)
    assert torch.equal(unpack_weight(weight, policy, n, k), codes)
    assert weight.shape[1] % 16 == 0
    one = torch.zeros(n, k, dtype=torch.uint8)
    one[1, 1] = 1
    where = pack_weight(one, policy, slice_).nonzero()
    assert where.tolist() == [[1, 2 if policy.mixed else 1]]


def test_words_keep_all_32_bits():
    values = torch.tensor([[0, 2**32 - 1], [2**31, 7]])
    assert torch.equal(from_words(to_words(values), 2), values)


def test_a_group_that_leaves_a_byte_is_an_error(dual_layer):
    fields = spec().format.pack(dual_layer(48, 192, 64)[1])
    fields["group_scale"][3, 1] = 18
    fields["group_offset"][3, 1] = -128
    with pytest.raises(ValueError, match="row 3"):
        KERNEL.prepare(fields, spec())


@pytest.mark.parametrize(
    ("kernel", "given", "reason"),
    [
        (KERNEL, spec(device="cpu"), "runs on cuda, not on cpu"),
        (KERNEL, spec(group=48), "group length that 32 divides, not 48"),
        (KERNEL, spec(activation=Unquantized()), "int8_token"),
        (KERNEL, spec(k=MAX_K // 64 * 64 + 64), "int32"),
        (KERNEL, int_spec(IntGroup(), activation=Int8Token()), "int4_dual"),
        (GpuWnA16(), int_spec(IntGroup(), device="cpu"), "runs on cuda, not on cpu"),
        (GpuWnA16(), int_spec(IntGroup(group=48)), "group length that 32 divides, not 48"),
        (GpuWnA16(), int_spec(IntGroup(), activation=Int8Token()), "float tokens"),
        (GpuWnA16(), spec(), "int_group"),
        (GpuFp4(), fp4_spec("nvfp4", device="cpu"), "runs on cuda, not on cpu"),
        (GpuFp4(), fp4_spec("nvfp4", activation=Int8Token()), "float or nvfp4 tokens"),
        (GpuFp4(), fp4_spec("mxfp4", activation=NvFp4()), "float or mxfp4 tokens"),
        (GpuFp4(), spec(), "fp4_block"),
        (GpuCodebook(), codebook_spec(device="cpu"), "runs on cuda, not on cpu"),
        (GpuCodebook(), codebook_spec(group=6), "power of two, not 6"),
        (GpuCodebook(), codebook_spec(activation=Int8Token()), "float tokens"),
        (GpuCodebook(), spec(), "codebook, not int4_dual"),
        (GpuFpChannel(), int_spec(FpChannel(bits=8, group=64)), "one scale per row, not groups of 64"),
        (GpuFpChannel(), int_spec(FpChannel(), activation=Int8Token()), "float tokens or those of fp_shift"),
        (GpuDual(), planes_spec(64, device="cpu"), "runs on cuda, not on cpu"),
        (GpuDual(), planes_spec(48), "group length that 32 divides, not 48"),
        (GpuDual(), planes_spec(64, activation=Int8Token()), "float tokens"),
        (GpuDual(), spec(), "binary_dual, not int4_dual"),
        (GpuW8A8(), int_spec(W8, activation=Int8Token(), device="cpu"), "runs on cuda, not on cpu"),
        (GpuW8A8(), int_spec(IntGroup(bits=8, group=-1), activation=Int8Token()), "symmetric"),
        (GpuW8A8(), int_spec(W8), "int8_token"),
        (GpuW8A8(), int_spec(W8, k=MAX_K + 1, activation=Int8Token()), "int32"),
    ],
)
def test_refusals_name_the_reason(kernel, given, reason):
    assert reason in (kernel.refuses(given) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_dispatch_keeps_the_reason():
    for given, name in (
        (spec(), "gpu_a8w4"),
        (int_spec(IntGroup()), "gpu_wna16"),
        (int_spec(W8, activation=Int8Token()), "gpu_w8a8"),
        (fp4_spec("nvfp4"), "gpu_fp4"),
        (codebook_spec(), "gpu_codebook"),
        (planes_spec(64), "gpu_dual"),
    ):
        kernel, refusals = choose(given)
        assert not kernel.name.startswith("gpu")
        assert refusals[name]


def test_the_operators_have_fakes():
    with FakeTensorMode():
        x = torch.empty(3, 192, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(2 * 48 + WIDEST, 64, dtype=torch.uint8, device="cuda")
        words = torch.empty(2 * 48 + WIDEST, dtype=torch.int32, device="cuda")
        scale = torch.empty(48, device="cuda")
        outputs = [
            gpu_a8w4(x, weight, words, scale, None, 64),
            gpu_wna16(x, weight, words, scale, scale, 4, 64),
            gpu_w8a8(x, weight, scale, torch.empty(192, device="cuda"), None),
            gpu_fp4(x, weight, words, scale, None, "nvfp4"),
            gpu_codebook(x, torch.empty(1, 2, 48, 32, dtype=torch.uint8, device="cuda"), scale, scale, scale, None),
            gpu_dual(x, torch.empty(128, 64, dtype=torch.int16, device="cuda"), words, scale, None, 64),
        ]
    assert all((y.shape, y.dtype, y.device.type) == ((3, 48), torch.bfloat16, "cuda") for y in outputs)


def layers():
    for name, policy in POLICIES.items():
        for slice_, groups in policy.blockings:
            for x in ("bfloat16",) if policy.integer else ("float32", "bfloat16", "float16"):
                yield Layer(policy=name, n=1000, k=1536, slice=slice_, groups=groups, x=x)


def test_every_layer_finds_launches_on_every_architecture():
    for arch in tiles.ARCHITECTURES:
        for layer in layers():
            for m in (1, 16, 17, 64, 65, 100_000):
                chosen = plan(layer, m, arch, 108)
                steps = chosen.steps
                if chosen.dense:
                    assert m >= DENSE_TOKENS
                    assert [step.grid(m) for step in steps] == [(1, -(-layer.n // DENSE_ROWS), layer.blocks)]
                    continue
                assert m < DENSE_TOKENS or layer.x == "float32" or POLICIES[layer.policy].integer
                gemm = next(step for step in steps if step.program.name == "gemm")
                assert gemm.columns <= WIDEST
                assert all(grid >= 1 for step in steps for grid in step.grid(m))
                assert gemm.grid(m)[0] * gemm.rows >= m
                assert gemm.grid(m)[1] * gemm.columns >= layer.n
                assert (gemm.splits > 1) == (steps[-1].program.name == "combine")
                if gemm.splits > 1:
                    assert -(-layer.blocks // gemm.splits) * (gemm.splits - 1) < layer.blocks, "a part of K without blocks"


def test_the_choice_depends_on_few_tokens_only_through_their_bucket():
    variant = Layer(policy="int4", n=512, k=8192, slice=64, groups=1, x="float16").variant
    for low, high in ((1, 16), (17, 64)):
        assert len({tiles.choose(90, variant, m, 512, 8192, 132) for m in range(low, high + 1)}) == 1
    assert tiles.choose(90, variant, 16, 512, 8192, 132)[1] > 1, "few columns and a long K leave processors idle"
    assert tiles.choose(90, variant, 4096, 512, 8192, 132)[1] == 1
    assert [tiles.table_arch(c) for c in (80, 86, 87, 89, 90, 100, 103, 120)] == [80, 89, 80, 89, 90, 100, 100, 89]


def test_programs_in_the_interpreter():
    """A process of its own: Triton decides at import whether its programs are interpreted."""
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        str(here / "gpu_interpreted.py"),
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=here.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_reference_quantization_rounds_half_to_even():
    """What the program is compared with: the tie rule itself, so that both cannot drift together."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_token(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]
