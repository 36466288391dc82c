"""Every PTX fragment against the formula it stands for, over all its inputs, by evaluating the PTX. No GPU, no interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="the fragments are part of Triton programs")

from quant.kernels.gpu import codebook, dual, fp4, ptx
from quant.kernels.gpu.jit import codebook as codebook_jit
from quant.kernels.gpu.jit import dual as dual_jit
from quant.kernels.gpu.jit import e2m1, float4, float8, fragments
from quant.kernels.gpu.layout import POLICIES, spread_zero
from quant.kernels.minifloat import E2M1, EXPONENTS, Minifloat


def packed_cases() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scale, base, word): every legal (s, b) against every byte in every lane, its neighbours empty, full and mixed."""
    scale = torch.cat([torch.full((256 - 15 * s,), s) for s in range(18)])
    base = torch.cat([torch.arange(256 - 15 * s) for s in range(18)])
    return scale[:, None], base[:, None], every_byte()[None]


def every_byte() -> torch.Tensor:
    """Words [4 * 3 * 256]: every byte in every lane, its neighbours empty, full and mixed."""
    byte = torch.arange(256)
    rest = torch.stack([torch.zeros_like(byte), torch.full_like(byte, 0xFFFFFFFF), byte * 2654435761 & 0xFFFFFFFF])
    return torch.stack([(rest & ~(255 << 8 * lane)) | byte << 8 * lane for lane in range(4)]).flatten()


def lanes(word: torch.Tensor) -> torch.Tensor:
    return torch.stack([word >> 8 * i & 255 for i in range(4)])


def as_int8(word: torch.Tensor) -> torch.Tensor:
    return lanes(word).to(torch.uint8).view(torch.int8)


@pytest.mark.parametrize("pair", [False, True])
def test_the_packed_affine_step_is_exact_for_every_input(pair):
    scale, base, word = packed_cases()
    # With `pair` the other half gets a different legal group: the list of groups, rotated.
    scale_high, base_high = (scale.roll(1234, 0), base.roll(1234, 0)) if pair else (scale, base)
    groups = scale | base << 8 | scale_high << 16 | base_high << 24
    assembly = fragments.AFFINE_PAIR if pair else fragments.AFFINE
    for chunk in range(0, len(scale), 256):
        part = slice(chunk, chunk + 256)
        low, high = ptx.run(assembly.value, [word, groups[part]], 2)
        expected_low = (lanes(word) & 15) * scale[part] + base[part] - 128
        expected_high = (lanes(word) >> 4) * scale_high[part] + base_high[part] - 128
        assert torch.equal(as_int8(low), expected_low.to(torch.int8))
        assert torch.equal(as_int8(high), expected_high.to(torch.int8))


def halves(word: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The two 16-bit floats of each word, in float64: [2, ...]."""
    bits = torch.stack([word & 0xFFFF, word >> 16 & 0xFFFF])
    return torch.where(bits < 2**15, bits, bits - 2**16).to(torch.int16).view(dtype).double()


def codes_of(policy: str, planes: list[torch.Tensor]) -> list[torch.Tensor]:
    """slice -> codes [4, words] by byte of the word, read from the layout's own table of fields."""
    out = []
    for places in POLICIES[policy].fields:
        code = torch.zeros_like(lanes(planes[0]))
        for plane, start, bits, at in places:
            code |= (lanes(planes[plane]) >> at & (2**bits - 1)) << start
        out.append(code)
    return out


def plane_cases(planes: int) -> list[torch.Tensor]:
    """Words of each plane. One plane: every byte in every lane. Three: a slice reads one of the first two and the third plane,
    so every pair of bytes of those, in every lane, the other lanes and the other plane mixed."""
    if planes == 1:
        return [every_byte()]
    a, c, lane = (t.flatten() for t in torch.meshgrid(torch.arange(256), torch.arange(256), torch.arange(4), indexing="ij"))
    mixed = [(t * 2654435761 + i * 40503 + 12345) & 0xFFFFFFFF for i, t in enumerate((c + 5 * a, a + 3 * c, a ^ c))]
    first, third = ((m & ~(255 << 8 * lane)) | t << 8 * lane for m, t in zip(mixed[:2], (a, c), strict=True))
    return [torch.cat([first, mixed[2]]), torch.cat([mixed[2], first]), torch.cat([third, third])]


FLOATS = [
    ("int2", "PAIRS", 2),
    ("int3", "TRIPLES", 3),
    ("int4", "NIBBLES", 4),
]


@pytest.mark.parametrize("kind", ["FP16", "BF16"])
@pytest.mark.parametrize(("policy", "name", "bits"), FLOATS)
def test_fields_become_floats_exactly(policy, name, bits, kind):
    """Register 2i + j of a fragment holds bytes j and j + 2 of slice i (neighbours in the mixed order): 2^(p - f) + code."""
    dtype = torch.float16 if kind == "FP16" else torch.bfloat16
    assembly = getattr(fragments, f"{name}_{kind}").value
    places = getattr(fragments, f"{name}_{kind}_PLACES").value
    words = plane_cases(POLICIES[policy].planes)
    out = ptx.run(assembly, words, 2 * len(places))
    for i, codes in enumerate(codes_of(policy, words)):
        base = halves(torch.tensor(places[i][2]), dtype)[0]
        for j in (0, 1):
            assert torch.equal(halves(out[2 * i + j], dtype), base + codes[[j, j + 2]]), (i, j)


@pytest.mark.parametrize("kind", ["FP16", "BF16"])
@pytest.mark.parametrize(("policy", "name", "bits"), [*FLOATS, ("int8", "BYTES", 8)])
def test_code_minus_zero_is_exact(policy, name, bits, kind):
    """The zero point under the exponent of its slice, as `from_fields` puts it there; every code against every zero."""
    if (policy, kind) == ("int8", "BF16"):
        pytest.skip("8-bit codes for bfloat16 go through float32, tested below")
    dtype = torch.float16 if kind == "FP16" else torch.bfloat16
    code, zero = torch.arange(2**bits)[:, None], torch.arange(2**bits)[None]
    for shift, start, exponent in getattr(fragments, f"{name}_{kind}_PLACES").value:
        base = halves(torch.tensor(exponent), dtype)[0]
        word = (spread_zero(zero, bits) << 16 | 0xFFFF) << shift & 0xFFFFFFFF  # beside the bits of any scale
        operands = [word, torch.tensor((2**bits - 1) << start + 16), torch.tensor(exponent * fragments.TWICE)]
        placed = ptx.run(fragments.ZERO.value, operands, 1)[0] >> 16
        assert torch.equal(halves(placed, dtype)[0], base + zero), "not under its exponent"
        difference = (base + code).to(dtype) - halves(placed, dtype)[0].to(dtype)
        assert torch.equal(difference.double(), (code - zero).double())


def test_bytes_become_floats_exactly():
    word = every_byte()
    first, second = ptx.run(fragments.BYTES_FP16.value, [word], 2)
    assert torch.equal(torch.cat([halves(first, torch.float16), halves(second, torch.float16)]), 1024.0 + lanes(word))
    wide = torch.stack(ptx.run(fragments.BYTES_FP32.value, [word], 4)).to(torch.int32).view(torch.float32)
    assert torch.equal(wide.double(), 2.0**23 + lanes(word))
    code, zero = torch.arange(256)[:, None], torch.arange(256)[None]
    difference = (2.0**23 + code).float() - (zero | 0x4B000000).to(torch.int32).view(torch.float32)
    assert torch.equal(difference.to(torch.bfloat16).double(), (code - zero).double())


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_four_bit_floats_and_their_scales_are_exact(kind):
    """Every code in every place of a word, the other places mixed; every byte as either scale, from every byte of the word."""
    dtype, folded = (torch.float16, -14) if kind == "fp16" else (torch.bfloat16, -126)
    codes = (every_byte()[:, None] * 2654435761 ^ every_byte()[None, ::7]).flatten() & 0xFFFFFFFF
    one = torch.arange(16)[:, None, None] << 4 * torch.arange(8)[None, :, None]
    rest = codes[: 16 * 997 : 16][None, None] & ~(15 << 4 * torch.arange(8)[None, :, None])
    nibbles = (rest | one).flatten()
    signed = torch.where(nibbles < 2**31, nibbles, nibbles - 2**32).to(torch.int32)
    placed = fp4.scatter(signed.view(torch.uint8)).view(torch.int32)
    assert torch.equal(fp4.gather(placed.view(torch.uint8)).view(torch.int32), signed)
    word = placed.to(torch.int64) & 0xFFFFFFFF
    values = E2M1.decode(lanes(nibbles) & 15), E2M1.decode(lanes(nibbles) >> 4)
    out = ptx.run(e2m1.fragment(kind, 0, 2), [word, torch.zeros(1, dtype=torch.int64)], 8)
    for i, expected in enumerate(values):
        for j in (0, 1):
            got = halves(out[2 * i + j], dtype)
            assert torch.equal(got, expected[[2 * j, 2 * j + 1]].double() * 2.0**folded), (i, j)
    byte = torch.arange(8, 31 << 3)  # the exponents that occur
    scale = (1 + (byte & 7) / 8) * 2.0 ** ((byte >> 3) - 15) * (1 if kind == "fp16" else 2.0**112)
    for low in range(4):
        for high in range(4):
            scales = byte << 8 * low | (byte.flip(0) << 8 * high if high != low else 0)
            out = ptx.run(e2m1.fragment(kind, low, high), [torch.zeros_like(byte), *[scales] * 4], 8)
            for register, expected in zip(out[4:], [scale, scale, *[scale if high == low else scale.flip(0)] * 2], strict=True):
                assert torch.equal(halves(register, dtype), torch.stack([expected] * 2).double()), (low, high)


@pytest.mark.parametrize("exponents", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_searched_floats_read_as_their_values(kind, exponents):
    """Every pair of codes in a byte, in every place of a word: value * 2^(b - 1) once multiplied by `unfold`."""
    dtype, number = torch.float16 if kind == "fp16" else torch.bfloat16, Minifloat(exponents, 3 - exponents)
    word = (every_byte()[:, None] * 2654435761 ^ every_byte()[None, ::7]).flatten() & 0xFFFFFFFF
    shift = torch.tensor(7 + exponents - float4.lower(kind))
    out = ptx.run(float4.CODES.value, [word, *[shift] * 4, *[shift - 4] * 4], 4)
    for i, codes in enumerate((lanes(word) & 15, lanes(word) >> 4)):
        for j in (0, 1):
            got = halves(out[2 * i + j], dtype) * float4.unfold(kind)
            assert torch.equal(got, number.decode(codes[[j, j + 2]]).double() * 2.0 ** (number.bias - 1)), (i, j)


@pytest.mark.parametrize("exponents", EXPONENTS[8])
def test_eight_bit_floats_read_as_their_values(exponents):
    """Every code in every place of a word: value * 2^(b - 16) once multiplied by UNFOLD, which float16 holds as well."""
    number, word, shift = Minifloat(exponents, 7 - exponents), every_byte(), torch.tensor(exponents)
    out = ptx.run(float8.CODES.value, [word, *[shift] * 4, *[8 - shift] * 4], 2)
    for j in (0, 1):
        got = halves(out[j], torch.bfloat16) * float8.UNFOLD.value
        assert torch.equal(got, number.decode(lanes(word)[[j, j + 2]]).double() * 2.0 ** (number.bias - 16)), j
        assert torch.equal(got.bfloat16().double(), got)
        assert torch.equal(got.half().double(), got)


@pytest.mark.parametrize("kind", ["FP16", "BF16"])
def test_planes_of_bits_become_two_floats(kind):
    """Every int16 in both halves of a word, the other one mixed: LOW where the layout has a 0, LOW + STEP where it has a 1."""
    dtype, steps = (torch.float16 if kind == "FP16" else torch.bfloat16), getattr(dual_jit, f"STEP_{kind}").value
    half = torch.arange(2**16)
    mixed = half * 40503 & 0xFFFF
    word = torch.cat([mixed << 16 | half, half << 16 | mixed])
    out = ptx.run(getattr(dual_jit, f"PLANES_{kind}").value, [word], 16)
    for plane in (0, 1):
        for row, step in enumerate(steps):
            bit = torch.stack([word, word >> 16]) >> dual.bit_of(row, plane) & 1
            low = dual_jit.LOW if kind == "BF16" and row < dual_jit.LIFTED.value else 0.0
            got = halves(out[8 * plane + row], dtype)
            assert ((got - low) / step - bit).abs().max() <= 2**-32, row


def test_both_sides_agree_where_the_bits_are():
    assert e2m1.PLACES.value == fp4.PLACES
    assert (dual_jit.ROWS.value, dual_jit.UNIT.value, dual_jit.FIRST_BIT.value) == (dual.ROWS, dual.UNIT, dual.FIRST_BIT)
    assert codebook_jit.ROW.value == codebook.ROW


def test_unknown_opcodes_do_not_pass():
    with pytest.raises(KeyError):
        ptx.run("{ not.b32 $0, $1; }", [torch.tensor(1)], 1)


@pytest.mark.parametrize("piece", [1, 2, 4, 8])
def test_every_lane_finds_every_entry_in_its_own_copy(piece):
    """The copies of a random codebook, and the four codes of a word in each lane, from each of them."""
    row, words, lane = codebook_jit.ROW.value, max(1, piece // 2), torch.arange(32).repeat(8)
    book = torch.randint(0, 2**16, (256, max(2, piece)), generator=torch.Generator().manual_seed(piece))
    if piece == 1:
        book[:, 1] = 0
    start = torch.tensor(1024)
    memory = torch.full((256 + 64 * row,), -1)
    entry = torch.arange(256)
    values = [book[:, 2 * i] | book[:, 2 * i + 1] << 16 for i in range(words)]
    named = {"copies": start, "%laneid": lane}
    ptx.run(codebook_jit.fill(piece), [entry, *values], 1, named, memory)
    assert not (memory[256:] < 0).any(), "part of a row was left out"
    assert (memory[:256] < 0).all(), "something before the rows was overwritten"

    codes = (torch.arange(256)[:, None] + torch.arange(0, 256, 8)) % 256  # [lanes, 32]: every code in every lane
    word = sum(codes.roll(i, 1) << 8 * i for i in range(4))
    named["%laneid"] = lane[:, None].expand_as(codes)
    reserved = codebook_jit.reserve(piece)
    (_, place) = ptx.run(reserved.replace("book", "$1"), [codes], 2, named)
    out = ptx.run(codebook_jit.lookup(piece), [word], 2 * piece, {"book": place}, memory)
    for i in range(piece):
        for code in range(4):
            got = out[2 * i + code // 2] >> 16 * (code % 2) & 0xFFFF
            assert torch.equal(got, book[codes.roll(code, 1), i]), (i, code)
    at_once = 32 // words  # lanes that are served together find their copies in different banks
    banks = (place[:32, 0] - start).view(-1, at_once)
    assert all(len(set(group.tolist())) == at_once for group in banks)
