"""gpu_a8w4 without a GPU: layout, refusals, the packed step over all its inputs, and the programs in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quant.kernels.activation import quantize_token
from quant.kernels.dispatch import MatmulSpec, choose
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.gpu import ptx
from quant.kernels.gpu.a8w4 import MAX_K, GpuA8W4, gpu_a8w4
from quant.kernels.gpu.tiles import ARCHITECTURES, WIDEST, choose_tile, table_arch, tiles

KERNEL = GpuA8W4()


def spec(group: int = 64, n: int = 48, k: int = 192, device: str = "cuda", activation: str = "int8_token") -> MatmulSpec:
    return MatmulSpec(n=n, k=k, format=Int4Dual(group=group), activation=activation, device=device)


@pytest.mark.parametrize(("n", "k", "group"), [(48, 192, 64), (7, 576, 96), (33, 96, 32), (130, 256, 128), (5, 1024, 256)])
def test_restore_is_the_inverse_of_prepare(dual_layer, n, k, group):
    s = spec(group, n, k)
    fields = s.format.pack(dual_layer(n, k, group)[1])
    back = KERNEL.restore(KERNEL.prepare(fields, s), s)
    assert back.keys() == fields.keys()
    for name in fields:
        assert back[name].dtype == fields[name].dtype
        assert torch.equal(back[name], fields[name]), name


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


def test_a_group_that_leaves_a_byte_is_an_error(dual_layer):
    fields = spec().format.pack(dual_layer(48, 192, 64)[1])
    fields["group_scale"][3, 1] = 18
    fields["group_offset"][3, 1] = -128
    with pytest.raises(ValueError, match="row 3"):
        KERNEL.prepare(fields, spec())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (spec(device="cpu"), "runs on cuda, not on cpu"),
        (spec(group=48), "group length that 32 divides, not 48"),
        (spec(activation="none"), "int8_token"),
        (spec(k=MAX_K // 64 * 64 + 64), "int32"),
        (MatmulSpec(n=8, k=64, format=IntGroup(), activation="int8_token", device="cuda"), "int4_dual"),
    ],
)
def test_refusals_name_the_reason(given, reason):
    assert reason in (KERNEL.refuses(given) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_dispatch_keeps_the_reason():
    kernel, refusals = choose(spec())
    assert kernel.name != "gpu_a8w4"
    assert refusals["gpu_a8w4"]


def test_the_operator_has_a_fake():
    with FakeTensorMode():
        x = torch.empty(3, 192, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(2 * 48 + WIDEST, 64, dtype=torch.uint8, device="cuda")
        words = torch.empty(2 * 48 + WIDEST, dtype=torch.int32, device="cuda")
        y = gpu_a8w4(x, weight, words, torch.empty(48, device="cuda"), None, 64)
    assert (y.shape, y.dtype, y.device.type) == ((3, 48), torch.bfloat16, "cuda")


def test_every_size_finds_a_tile():
    for arch in ARCHITECTURES:
        for half in (64, 32):
            assert all(tile.bn <= WIDEST for tile in tiles(arch, half))
            assert tiles(arch, half)[-1].max_m is None
            for m in (1, 16, 17, 64, 65, 100_000):
                tile = choose_tile(arch, half, m, 4096, 108)
                assert tile.max_m is None or m <= tile.max_m
    assert choose_tile(80, 64, 1, 100 * 128, 100).bn > choose_tile(80, 64, 1, 1024, 100).bn, "few columns need narrow tiles"
    assert [table_arch(c) for c in (80, 86, 87, 89, 90, 100, 103, 120)] == [80, 89, 80, 89, 90, 100, 100, 89]


def packed_cases() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale, base, word): every legal (s, b) against every byte in every lane, its neighbours empty, full and mixed."""
    scale = torch.cat([torch.full((256 - 15 * s,), s) for s in range(18)])
    base = torch.cat([torch.arange(256 - 15 * s) for s in range(18)])
    byte = torch.arange(256)
    rest = torch.stack([torch.zeros_like(byte), torch.full_like(byte, 0xFFFFFFFF), byte * 2654435761 & 0xFFFFFFFF])
    words = [(rest & ~(255 << 8 * lane)) | byte << 8 * lane for lane in range(4)]
    word = torch.stack(words).flatten()  # [4 * 3 * 256]
    return scale[:, None], base[:, None], word[None]


def lanes(word: torch.Tensor) -> torch.Tensor:
    return torch.stack([word >> 8 * i & 255 for i in range(4)])


def as_int8(word: torch.Tensor) -> torch.Tensor:
    return lanes(word).to(torch.uint8).view(torch.int8)


@pytest.mark.parametrize("pair", [False, True])
def test_the_packed_step_is_exact_for_every_input(pair):
    pytest.importorskip("triton", reason="the fragment is part of a Triton program")
    from quant.kernels.gpu.jit.a8w4 import AFFINE, AFFINE_PAIR

    scale, base, word = packed_cases()
    # With `pair` the other half gets a different legal group: the list of groups, rotated.
    scale_high, base_high = (scale.roll(1234, 0), base.roll(1234, 0)) if pair else (scale, base)
    groups = scale | base << 8 | scale_high << 16 | base_high << 24
    for chunk in range(0, len(scale), 256):
        part = slice(chunk, chunk + 256)
        low, high = ptx.run((AFFINE_PAIR if pair else AFFINE).value, [word, groups[part]], 2)
        expected_low = (lanes(word) & 15) * scale[part] + base[part] - 128
        expected_high = (lanes(word) >> 4) * scale_high[part] + base_high[part] - 128
        assert torch.equal(as_int8(low), expected_low.to(torch.int8))
        assert torch.equal(as_int8(high), expected_high.to(torch.int8))


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
