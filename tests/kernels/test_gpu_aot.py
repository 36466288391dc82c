"""What ships was compiled, counted and found without fault; a sample is compiled again here. No GPU takes part.

The tables carry the digest of the sources they were made from: a change to a program without `--update` fails the first test,
so that every shipped tile has counts of its own code although only a few are compiled in each run.
"""

import dataclasses
import re

import pytest

pytest.importorskip("triton", reason="ahead-of-time compilation needs triton")

import triton

from quant.kernels.gpu import aot, codebook, dual, fp4_native, model, sass
from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.plan import Layer, dense_plan, plan, plan_with
from quant.kernels.gpu.tiles import ARCHITECTURES, BUCKETS, read_table, tile_of

EVERY_VARIANT = {variant.key for policy in POLICIES for variant in aot.variants(policy)}
# ALU instructions per weight of the hot loop for up to 16 tokens, tile of 128 columns, on sm_80 and on sm_90: the most that a
# change may cost.
BARS = {
    "dual4/64/1/int8": (1.15, 1.15),
    "int4/64/1/fp16": (2.4, 2.4),
    "int4/64/1/bf16": (2.4, 2.4),
    "int2/64/2/fp16": (1.8, 1.8),
    "int2/64/2/bf16": (1.95, 2.1),
    "e2m1/16/1/fp16": (2.6, 2.6),
    "e2m1/16/1/bf16": (2.6, 2.6),
    "e2m1/16/2/fp16": (2.6, 2.6),
    "e2m1/16/2/bf16": (2.6, 2.6),
    "float4/64/1/fp16": (3.3, 3.3),
    "float4/64/1/bf16": (3.3, 3.5),
    "float8/128/1/bf16": (2.9, 2.9),
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_belong_to_these_sources(arch):
    table = read_table(arch)
    expected = {policy: aot.source_hash(policy) for policy in POLICIES}
    assert table["source"] == expected, "run python -m quant.kernels.gpu.aot --update"
    assert table["tiles"].keys() == EVERY_VARIANT


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_shipped_tile_is_sound(arch):
    for key, rows in read_table(arch)["tiles"].items():
        assert {row["max_m"] for row in rows} == set(BUCKETS), key
        for stored in rows:
            counts = sass.Counts(**stored["counts"])
            row = aot.Row(
                arch=arch,
                variant=aot.variant_of(key),
                tile=tile_of(stored),
                shared_bytes=stored["shared_bytes"],
                counts=counts,
                along_k=True,  # asserted when the row was made; not kept
                spills_odd=stored["spills_odd"],
            )
            assert not row.faults(), (key, stored)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("key", BARS)
def test_decode_tiles_meet_their_bars(arch, key):
    rows = [row for row in read_table(arch)["tiles"][key] if row["max_m"] == 16 and row["bn"] == 128]
    assert min(row["counts"]["alu_per_weight"] for row in rows) <= BARS[key][(80, 90).index(arch)]


SAMPLE = [
    (80, "int4/64/1/fp16"),
    (90, "int3/16/2/bf16"),
    (89, "int2/64/2/fp16"),
    (100, "dual4_pair/32/2/int8"),
    (90, "int8/32/1/fp16"),
    (80, "e2m1/16/2/bf16"),
    (100, "e2m1/16/1/fp16"),
    (89, "float4/32/1/bf16"),
    (90, "float8/128/1/bf16"),
]


@pytest.mark.parametrize(("arch", "key"), SAMPLE)
def test_stored_counts_are_those_of_the_code(arch, key):
    stored = read_table(arch)["tiles"][key][0]
    row = aot.measure(arch, aot.variant_of(key), tile_of(stored))
    assert not row.faults()
    if triton.__version__ == read_table(arch)["triton"]:
        assert dataclasses.asdict(row.counts) == stored["counts"]
        assert row.shared_bytes == stored["shared_bytes"]


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if not policy.integer])
def test_dense_weights_compile(policy):
    """Words run along K there too, 16 bytes of codes are loaded at a time, and nothing spills."""
    variants = [variant for variant in aot.variants(policy) if variant.compute != "fp32"]
    for variant, arch in zip((variants[0], variants[-1]), (90, 80), strict=True):
        (step,) = dense_plan(aot.sample_layer(variant)).steps
        built = aot.compile_program(step.program, arch)
        assert aot.packs_along_k(built.ttgir, swap=True), variant.key
        assert sass.spills(sass.disassemble(built.code)[0]) == 0


def test_ragged_layers_and_split_k_compile():
    """What the tables do not hold: masks on x, partial sums, the program that adds them, tokens with a divisor.

    K is no multiple of 16 in the first: its tokens are padded."""
    tile = tile_of(read_table(90)["tiles"]["int4/64/1/fp16"][0])
    ragged = Layer(policy="int4", n=97, k=601, slice=64, groups=1, per_row=True, x="float16", bias="float32")
    w8 = Layer(policy="bytes8", n=96, k=608, slice=128, groups=1, divisor=True)
    tile8 = tile_of(read_table(90)["tiles"]["bytes8/128/1/int8"][0])
    programs = {step.program for layer, t in ((ragged, tile), (w8, tile8)) for step in plan_with(layer, t, 2).steps}
    assert {program.name for program in programs} == {"gemm", "combine", "quantize"}
    for program in programs:
        code, _ = sass.disassemble(aot.compile_program(program, 90).code)
        assert not any(i.base in ("LDL", "STL") for i in code), program.name


@pytest.mark.parametrize(("arch", "kind", "instruction"), [(100, "nvfp4", "UTCOMMA"), (120, "mxfp4", "OMMA")])
def test_four_bit_tokens_meet_four_bit_weights_in_the_tensor_cores(arch, kind, instruction):
    """For 16 tokens too: no multiplication of unpacked numbers, no spills."""
    for step in fp4_native.plan(4096, 4096, kind, "bfloat16", None, True, 16, 1).steps:
        code, _ = sass.disassemble(aot.compile_program(step.program, arch).code)
        assert sass.spills(code) == 0
    assert {i.base for i in code if "MMA" in i.base} == {instruction}


# ALU instructions per weight, tokens up to 16: the most that a change may cost
@pytest.mark.parametrize(("arch", "books", "bar"), [(80, 1, 1.6), (90, 2, 1.2)])
def test_entries_of_codebooks_are_read_where_they_are_multiplied(arch, books, bar):
    """One load from shared memory for an entry, whole; nothing is written there but what global loads bring; no spills."""
    shape = codebook.shape_of(16, 4 * books, "bfloat16")
    program = codebook.plan(4096, 4096, books, 4 * books, "bfloat16", None, shape, 1).steps[0].program
    built = aot.compile_program(program, arch)
    code, _ = sass.disassemble(built.code)
    counts = sass.count(built.code, weights=shape.bn * codebook.CODES * 4 * books, tokens=shape.bm, warps=program.warps)
    assert counts.spills == 0
    assert counts.alu_per_weight <= bar
    trip = [i.opcode for i in sass.hot_loop(code)]
    assert not any(opcode.startswith("STS") for opcode in trip)
    assert trip.count("LDS.64" if books == 1 else "LDS.128") >= shape.bn * codebook.CODES // (32 * program.warps)


@pytest.mark.parametrize(
    ("books", "group", "x", "m"),
    [(1, 4, "bfloat16", 1), (2, 8, "bfloat16", 16), (2, 8, "bfloat16", 64), (2, 8, "float32", 64)],
)
def test_codebook_programs_get_the_shared_memory_they_need(books, group, x, m):
    """Triton asks the driver for more than 48 KB only where its own part, which the copies are not in, exceeds them."""
    shape = codebook.shape_of(m, group, x)
    program = codebook.plan(97, 4096, books, group, x, None, shape, 2).steps[0].program
    built = aot.compile_program(program, 90)
    whole = built.shared_bytes + codebook.ENTRIES * codebook.ROW
    assert whole <= codebook.UNASKED or built.shared_bytes > codebook.UNASKED
    assert whole <= min(device.shared_bytes for device in model.DEVICES.values())


@pytest.mark.parametrize(("group", "arch"), [(1, 100), (16, 80)])
def test_ragged_split_and_dense_codebooks_compile(group, arch):
    odd, shape = (97, 1008, 1, group, "float16"), codebook.shape_of(64, group, "float16")
    for step in (*codebook.plan(*odd, "float32", shape, 2).steps, *codebook.dense_plan(*odd).steps):
        assert sass.spills(sass.disassemble(aot.compile_program(step.program, arch).code)[0]) == 0, step.program.name


# ALU instructions per weight: those on integers, and with those on the sums, two multiply-adds for each token and group of 64
@pytest.mark.parametrize(("arch", "x"), [(80, "bfloat16"), (90, "float16")])
def test_planes_of_bits_are_operands_where_they_lie(arch, x):
    """Both planes of a weight for 1.2 integer instructions, 16 tokens; words of two neighbours along K, no spills."""
    program = dual.plan(4096, 4096, 64, x, None, 16, 1).steps[0].program
    built = aot.compile_program(program, arch)
    weights = dual.ROWS * dual.BU * 64
    counts = sass.count(built.code, weights=2 * weights, tokens=16, warps=program.warps)  # as the MMAs see them
    assert counts.spills == 0
    assert counts.pipes["int"] * 32 * program.warps / weights <= 1.2
    assert counts.alu * 32 * program.warps / weights <= 1.85
    assert counts.mma * 16 * 8 * 16 * program.warps == (2 * weights + (x == "bfloat16") * dual.BU * 64) * 16
    assert counts.loads["128"] >= dual.BU * 64 // (8 * 32 * program.warps)
    assert aot.packs_along_k(built.ttgir, swap=True)


def test_ragged_split_and_dense_planes_compile():
    odd = (97, 1000, -1, "float32")
    for step in (dual.plan(*odd, "float32", 8, 2).steps[0], *dual.dense_plan(97, 1000, -1, "bfloat16").steps):
        assert sass.spills(sass.disassemble(aot.compile_program(step.program, 90).code)[0]) == 0, step.program.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantization_is_compiled_without_fused_multiply_add(dtype):
    """x * (1 / scale) must be rounded before the rounding constant is added, as in the reference."""
    step = plan(Layer(policy="bytes8", n=256, k=1024, slice=128, groups=1, x=dtype), 1, 90, 132).steps[0]
    assert step.program.name == "quantize"
    code, _ = sass.disassemble(aot.compile_program(step.program, 90).code)
    rounding = [i for i in code if "12582912" in i.operands]
    assert rounding
    assert {i.base for i in rounding} <= {"FADD", "FADD2"}, rounding
    assert not any(i.base in ("LDL", "STL") for i in code)


@pytest.mark.parametrize(
    "key",
    [
        "dual4/64/1/int8",
        "dual4_pair/32/2/int8",
        "bytes8/128/1/int8",
        "int2/64/2/fp16",
        "int3/16/1/bf16",
        "int4/64/1/bf16",
        "int8/128/1/fp16",
        "e2m1/16/1/bf16",
        "e2m1/16/2/fp16",
        "float4/64/1/bf16",
        "float8/128/1/bf16",
    ],
)
def test_the_twins_compile_for_amd(key):
    """Only that they compile: `refuses` keeps AMD devices on other kernels until one has run them."""
    variant = aot.variant_of(key)
    tile = dataclasses.replace(tile_of(read_table(80)["tiles"][key][0]), warps=4, stages=2)
    step = plan_with(aot.sample_layer(variant), tile, 1, "hip").steps[-1]
    built = aot.compile_program(step.program, "gfx942")
    assert built.code
    assert "elementwise_inline_asm" not in built.ttgir


def test_interpreted_programs_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    step = plan(Layer(policy="bytes8", n=256, k=1024, slice=128, groups=1), 1, 90, 132).steps[0]
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_program(step.program, 90)


def test_words_packed_across_columns_are_seen():
    """The gate that proves that a fragment's word is four neighbours along K, on layouts of both kinds."""
    line = '%1 = tt.elementwise_inline_asm "x" %0 : tensor<64x128xi8, #blocked> -> tensor<64x128xf16, #blocked>'
    good = "#blocked = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [8, 4], warpsPerCTA = [1, 4], order = [0, 1]}>"
    bad = "#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4], warpsPerCTA = [1, 4], order = [1, 0]}>"
    assert aot.packs_along_k(f"{good}\n{line}", swap=False)
    assert not aot.packs_along_k(f"{bad}\n{line}", swap=False)
    assert aot.packs_along_k(f"{bad}\n{line}", swap=True)


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   IMMA.16832.S8.S8 R8, R4, R6, R8 ;
        /*0030*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0040*/                   SYNCS.PHASECHK P1, [UR4] ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   STL [R1], R8 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
"""


def test_the_hot_loop_leaves_out_wait_loops():
    code = [sass.Instruction(int(m[1], 16), m[2], m[3], m[4].strip()) for m in map(sass.LINE.match, LOOP.splitlines()) if m]
    assert len(code) == 10
    assert [i.opcode for i in sass.hot_loop(code)] == ["LDG.E.128", "IMMA.16832.S8.S8", "IADD3", "BRA"]
    assert sass.multiply_adds("IMMA.16832.S8.S8") == 16 * 8 * 32
    assert sass.multiply_adds("IGMMA.64x128x32.S8.S8") == 64 * 128 * 32 // 4


def test_a_known_cubin_is_read_right():
    """A kernel small enough to know: 8 tiles of 16x16x16 float16 per trip of a loop that runs over K."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def known(a_ptr, b_ptr, c_ptr, K, B: tl.constexpr):
        i, k = tl.arange(0, B), tl.arange(0, 16)
        acc = tl.zeros((B, B), tl.float32)
        for _ in range(0, K, 16):
            acc = tl.dot(tl.load(a_ptr + i[:, None] * K + k[None, :]), tl.load(b_ptr + i[None, :] * K + k[:, None]), acc)
            a_ptr += 16
            b_ptr += 16
        tl.store(c_ptr + i[:, None] * B + i[None, :], acc)

    signature = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "K": "i32", "B": "constexpr"}
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(known, signature, constexprs={"B": 64}, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4, "enable_fp_fusion": True})
    counts = sass.count(built.asm["cubin"], weights=64 * 16, tokens=64, warps=4)
    # 64 x 64 x 16 multiply-adds by 4 warps: m16n8k16 each
    assert counts.mma == 64 * 64 * 16 // (16 * 8 * 16) // 4
    assert counts.spills == 0
    assert sum(counts.pipes.values()) == counts.alu
    assert re.fullmatch(r"\d+", str(counts.instructions))
    assert counts.loads == {"128": 2}, "a and b: 64 x 16 halves each are 16 bytes per thread"
    assert counts.alu_per_weight == round(counts.alu * 32 * 4 / (64 * 16), 3)


def trip(**changes) -> model.Trip:
    base = dict(
        pipes={"int": 100, "half": 50, "float": 0, "convert": 0}, instructions=200, warps=4, registers=128, shared_bytes=32768,
        tokens=16, columns=128, block=128, bytes_per_block=8192 + 512, compute="fp16",
    )  # fmt: skip
    return model.Trip(**base | changes)


def test_the_model_follows_its_formula():
    a100 = model.DEVICES[80]
    cycles = trip().cycles(a100)
    assert cycles["int"] == 100 * 4 * 32 / 64
    assert cycles["half"] == 50 * 4 * 32 / 128
    assert cycles["issue"] == 200 * 4 / 4
    assert cycles["mma"] == 16 * 128 * 128 / 1024
    assert cycles["dram"] == pytest.approx(8704 / (2039 / 1.41 / 108))
    assert trip().resident(a100) == min(65536 // (128 * 128), 164 * 1024 // (32768 + 1024))


def test_the_model_ranks_as_it_must():
    """More instructions, more weights or more tokens never predict less; splitting K helps only where processors are idle."""
    h100 = model.DEVICES[90]
    time = trip().predicted_us(h100, 16, 4096, 4096)
    assert trip(pipes={"int": 900}, instructions=1000).predicted_us(h100, 16, 4096, 4096) > time
    assert trip().predicted_us(h100, 16, 65536, 4096) > time
    assert trip().predicted_us(h100, 4096, 4096, 4096) > time
    assert trip().predicted_us(h100, 16, 512, 16384, splits=8) < trip().predicted_us(h100, 16, 512, 16384)
    assert trip().predicted_us(h100, 16, 65536, 4096, splits=8) > trip().predicted_us(h100, 16, 65536, 4096)
