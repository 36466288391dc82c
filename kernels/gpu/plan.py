"""From a layer and a number of tokens to the launches that compute it: the only place where programs are put together."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from quant.kernels.gpu.layout import POLICIES
from quant.kernels.gpu.program import Plan, Program, Scratch, Step, Value
from quant.kernels.gpu.tiles import BUCKETS, Tile, Variant, choose

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int8": "*i8", "int32": "*i32"}
COMPUTE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
QUANTIZE_BLOCK = 8192  # most elements per step of the activation program: rows up to it are read in one go
COMBINE_TILE = (4, 256)
DENSE_TOKENS = 256  # from so many float tokens on, unpacking once and a dense product are faster (measured on an H200)
DENSE_ROWS = 64
PLANS = (*BUCKETS[:-1], DENSE_TOKENS - 1, None)  # a plan made for so many tokens serves fewer, down to the one before
LARGE_M = 2048  # the tokens for which the plan of the last, open one is made
NO_TOKENS = 1 << 30  # rows of a grid that does not depend on the tokens
TOKEN_ALIGNMENT = 16  # elements: rows of float tokens are padded to it, so that they load 16 bytes at a time


def padded(k: int) -> int:
    """Elements of a row of float tokens of `k` features."""
    return -(-k // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One packed linear as the GPU kernels see it; all that the programs depend on, the tokens' number apart."""

    policy: str
    n: int
    k: int
    slice: int
    groups: int  # per K block
    per_row: bool = False  # one parameter word serves a whole row
    x: str = "bfloat16"  # dtype of tokens and output: float32, bfloat16, float16
    bias: str | None = None  # its dtype
    divisor: bool = False  # the tokens are divided by a vector [K] before they are quantized
    token_scale: bool = False  # of float tokens: the caller gives x_scale float32 [M], which multiplies the sums

    @property
    def variant(self) -> Variant:
        compute = "int8" if POLICIES[self.policy].integer else COMPUTE[self.x]
        return Variant(policy=self.policy, slice=self.slice, groups=self.groups, compute=compute)

    @property
    def blocks(self) -> int:
        return -(-self.k // self.variant.block)

    @property
    def width(self) -> int:
        """Elements of a row of the tokens that the GEMM reads: codes of whole blocks, or the float tokens padded with zeros."""
        if POLICIES[self.policy].integer:
            return self.blocks * self.variant.block
        return padded(self.k)


Arguments = list[tuple[str, str, str | int]]  # (name, Triton type, tensor or number)


def program(
    name: str, arguments: Arguments, constants: dict[str, Value], warps: int, stages: int, fusion: bool
) -> tuple[Program, tuple[tuple[str, str | int], ...]]:
    """The program and the binding of its arguments. A pointer to None becomes a constant; numbers count as aligned by value."""
    given = [(n, t, v) for n, t, v in arguments if v != ""]
    absent: dict[str, Value] = {n: None for n, _, v in arguments if v == ""}
    aligned = tuple(n for n, t, v in given if t[0] == "*" or (isinstance(v, int) and v % 16 == 0))
    built = Program(
        name=name,
        signature=tuple((n, t) for n, t, _ in given),
        constants=tuple({**absent, **constants}.items()),
        aligned=aligned,
        warps=warps,
        stages=stages,
        fusion=fusion,
    )
    return built, tuple((n, v) for n, _, v in given)


def output(dtype: str) -> str:
    """Triton type of y: bfloat16 is stored as its bits, see `bfloat16_bits`."""
    return "*i16" if dtype == "bfloat16" else POINTER[dtype]


def quantize_step(layer: Layer) -> Step:
    """x [M, K] -> codes int8 [M, K padded to blocks], x_scale [M]."""
    arguments: Arguments = [
        ("x_ptr", POINTER[layer.x], "x"),
        ("divisor_ptr", "*fp32", "divisor" if layer.divisor else ""),
        ("q_ptr", "*i8", "codes"),
        ("scale_ptr", "*fp32", "x_scale"),
        ("sum_ptr", "*i32", ""),
        ("K", "i32", layer.k),
        ("K_PAD", "i32", layer.width),
    ]
    block = min(QUANTIZE_BLOCK, max(256, 1 << (layer.width - 1).bit_length()))
    built, bound = program("quantize", arguments, {"BLOCK": block, "GROUP": 1}, 8, 1, False)
    return Step(program=built, arguments=bound, rows=1)


def row_scaled(bias: str | None) -> Arguments:
    """What multiplies and adds to a row's sums. bias: its dtype."""
    return [
        ("row_scale_ptr", "*fp32", "row_scale"),
        ("bias_ptr", POINTER[bias or "float32"], "bias" if bias else ""),
    ]


def epilogue(layer: Layer) -> Arguments:
    scaled = POLICIES[layer.policy].integer or layer.token_scale
    return [("x_scale_ptr", "*fp32", "x_scale" if scaled else ""), *row_scaled(layer.bias)]


def result(x: str, splits: int, sums: str = "float32") -> tuple[str, str, str | int]:
    """Where a product of tokens goes whose K is in `splits` parts: y in the dtype `x`, or partial sums."""
    return "y_ptr", POINTER[sums] if splits > 1 else output(x), "partial" if splits > 1 else "y"


def stride(name: str, value: int) -> tuple[str, str, str | int]:
    return name, "i32" if value < 2**31 else "i64", value


def gemm_step(layer: Layer, tile: Tile, splits: int, target: str) -> Step:
    """target: "cuda" takes the fragments; "hip" and "interpreter" the plain twin, the latter without bfloat16 arithmetic,
    which the interpreter gets wrong."""
    policy, variant = POLICIES[layer.policy], layer.variant
    words = policy.words(layer.groups)
    sums = "int32" if policy.integer else "float32"
    arguments: Arguments = [
        ("x_ptr", "*i8" if policy.integer else POINTER[layer.x], "codes" if policy.integer else "x"),
        ("w_ptr", "*u8", "weight"),
        ("word_ptr", "*i32", "words" if words else ""),
        *epilogue(layer),
        result(layer.x, splits, sums),
        ("M", "i32", "M"),
        ("N", "i32", layer.n),
        ("K", "i32", layer.width),
        ("X_STRIDE", "i32", layer.width),
        ("BLOCKS", "i32", layer.blocks),
        stride("W_STRIDE", policy.planes * layer.n * layer.slice),
        stride("PLANE_STRIDE", layer.n * layer.slice),
        ("WORD_STRIDE", "i32", 0 if layer.per_row else words * layer.n),
    ]
    constants = weight_constants(layer, target) | {
        "RAGGED": layer.width % variant.block != 0,
        "FEW": tile.few,
        "ON_SUM": tile.on_sum,
        "SPLIT": splits,
        "BM": tile.bm,
        "BN": tile.bn,
        "SWAP": tile.swap,
        "INLINE": target == "cuda",
    }
    built, bound = program("gemm", arguments, constants, tile.warps, tile.stages, not policy.integer)
    return Step(program=built, arguments=bound, rows=tile.bm, columns=tile.bn, splits=splits, n=layer.n)


def combine_step(sums: str, scaled: Arguments, x: str, n: int, splits: int) -> Step:
    """sums: Triton type of the partial sums; scaled: as `epilogue`; x: dtype of the output."""
    arguments: Arguments = [
        ("part_ptr", sums, "partial"),
        *scaled,
        ("y_ptr", output(x), "y"),
        ("M", "i32", "M"),
        ("N", "i32", n),
    ]
    rows, columns = COMBINE_TILE
    built, bound = program("combine", arguments, {"SPLIT": splits, "BM": rows, "BN": columns}, 4, 1, False)
    return Step(program=built, arguments=bound, rows=rows, columns=columns, n=n)


def combined(step: Step, scaled: Arguments, x: str, sums: str = "float32") -> tuple[list[Step], list[Scratch]]:
    """A product, and where it leaves partial sums what adds them. scaled: as `epilogue`; x: dtype of the output."""
    if step.splits == 1:
        return [step], []
    scratch = Scratch(name="partial", dtype=sums, per_token=step.splits * step.n)
    return [step, combine_step(POINTER[sums], scaled, x, step.n, step.splits)], [scratch]


def dense_with(step: Step, x: str, width: int) -> Plan:
    """The plan of a step that makes the weight dense [N, width] in the dtype `x`."""
    kind = "int16" if x == "bfloat16" else x
    return Plan(steps=(step,), scratch=(Scratch(name="dense", dtype=kind, fixed=step.n * width),), dense=True)


def plan_with(layer: Layer, tile: Tile, splits: int, target: str = "cuda") -> Plan:
    """The launches for given parameters."""
    steps: list[Step] = []
    scratch: list[Scratch] = []
    if POLICIES[layer.policy].integer:
        steps.append(quantize_step(layer))
        scratch.append(Scratch(name="codes", dtype="int8", per_token=layer.width))
        scratch.append(Scratch(name="x_scale", dtype="float32", per_token=1))
    sums = "int32" if POLICIES[layer.policy].integer else "float32"
    product, partial = combined(gemm_step(layer, tile, splits, target), epilogue(layer), layer.x, sums)
    return Plan(steps=(*steps, *product), scratch=(*scratch, *partial))


def weight_constants(layer: Layer, target: str) -> dict[str, Value]:
    """What the unpacking of a weight depends on."""
    policy, variant = POLICIES[layer.policy], layer.variant
    return {
        "UNPACK": layer.policy,
        "COMPUTE": "fp32" if target == "interpreter" and variant.compute == "bf16" else variant.compute,
        "PLANES": policy.planes,
        "SLICES": policy.slices,
        "SLICE": layer.slice,
        "GROUPS": policy.words(layer.groups),
        "MIXED": policy.mixed,
    }


def dense_plan(layer: Layer, target: str = "cuda") -> Plan:
    """Unpack the weight to x's dtype, [N, K padded as the tokens]; torch multiplies."""
    policy = POLICIES[layer.policy]
    words = policy.words(layer.groups)
    arguments: Arguments = [
        ("w_ptr", "*u8", "weight"),
        ("word_ptr", "*i32", "words"),
        ("row_scale_ptr", "*fp32", "row_scale"),
        ("dense_ptr", output(layer.x), "dense"),
        ("N", "i32", layer.n),
        ("K", "i32", layer.width),
        stride("W_STRIDE", policy.planes * layer.n * layer.slice),
        stride("PLANE_STRIDE", layer.n * layer.slice),
        ("WORD_STRIDE", "i32", 0 if layer.per_row else words * layer.n),
    ]
    constants = weight_constants(layer, target) | {"BN": DENSE_ROWS, "INLINE": target == "cuda"}
    built, bound = program("dequantize", arguments, constants, 4, 1, False)
    step = Step(program=built, arguments=bound, rows=NO_TOKENS, columns=DENSE_ROWS, splits=layer.blocks, n=layer.n)
    return dense_with(step, layer.x, layer.width)


def goes_dense(layer: Layer, m: int) -> bool:
    """Whether `m` tokens are worth a dense weight. float32 tokens are not: the vendor's float32 product is the slow one."""
    return m >= DENSE_TOKENS and layer.x != "float32" and not POLICIES[layer.policy].integer and not layer.token_scale


def plan_bucket(m: int) -> int | None:
    """The member of PLANS that serves `m` tokens."""
    return next((most for most in PLANS if most is not None and m <= most), None)


@functools.lru_cache(4096)
def plan(layer: Layer, m: int, arch: int, processors: int, target: str = "cuda") -> Plan:
    """The launches for `m` tokens on a device with the table of `arch` and so many multiprocessors."""
    if goes_dense(layer, m):
        return dense_plan(layer, target)
    tile, splits = choose(arch, layer.variant, m, layer.n, layer.k, processors)
    return plan_with(layer, tile, splits, target)
