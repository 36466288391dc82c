"""`gpu_fp4_native`: MXFP4 and NVFP4 weights times tokens of the same kind, in the FP4 tensor cores of sm_100, 103 and 120.

    y[m, n] = row_scale[n] * sum_g s_x[m, g] * s_w[n, g] * sum_{k in g} e2m1(q[m, k]) * e2m1(code[n, k]) + bias[n]

row_scale is 1, or 1 / (D_w D_x) of the divisors of nvfp4. Weights stay as they are stored. Written without such a GPU: the
programs are interpreted in the tests and compiled for both architectures; tiles follow from the number of tokens by rule, none
has been timed. Bundles do not hold these programs; where one is in use `gpu_fp4` serves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.fp4_block import BLOCKS, Fp4Block
from quant.kernels.gpu import deployed, launch
from quant.kernels.gpu.plan import POINTER, Arguments, combined, program, result, row_scaled
from quant.kernels.gpu.program import Plan, Scratch, Step, Value

TOKENS_BLOCK = 2048  # elements of a token per program
BN, BK = 128, 256  # rows of the tensor core's tile; 128 bytes of a row of codes
BM = (16, 32, 64, 128)  # the smallest that holds the tokens, or the last
MOST_SPLITS = 8


def tokens_step(k: int, kind: str, x: str, four_six: bool) -> Step:
    """x [M, K] -> q [M, K / 2], q_scale [M, K / G]."""
    arguments: Arguments = [
        ("x_ptr", POINTER[x], "x"),
        ("divisor_ptr", "*fp32", "divisor" if kind == "nvfp4" else ""),
        ("q_ptr", "*u8", "q"),
        ("scale_ptr", "*u8", "q_scale"),
        ("K", "i32", k),
    ]
    constants: dict[str, Value] = {"BLOCK": TOKENS_BLOCK, "GROUP": BLOCKS[kind], "FOUR_SIX": four_six}
    built, bound = program("fp4_tokens", arguments, constants, 4, 1, False)
    return Step(program=built, arguments=bound, rows=1, columns=TOKENS_BLOCK, n=k)


@functools.lru_cache(1024)
def plan(n: int, k: int, kind: str, x: str, bias: str | None, four_six: bool, bm: int, splits: int) -> Plan:
    """The launches of a weight [N, K] and tokens of dtype `x`, `bm` of them at a time, K in `splits` parts."""
    group = BLOCKS[kind]
    scaled = row_scaled(bias)
    arguments: Arguments = [
        ("q_ptr", "*u8", "q"),
        ("q_scale_ptr", "*u8", "q_scale"),
        ("w_ptr", "*u8", "weight"),
        ("w_scale_ptr", "*u8", "scale"),
        *scaled,
        result(x, splits),
        ("M", "i32", "M"),
        ("N", "i32", n),
        ("K", "i32", k),
    ]
    built, bound = program("fp4_gemm", arguments, {"GROUP": group, "SPLIT": splits, "BM": bm, "BN": BN, "BK": BK}, 4, 3, True)
    step = Step(program=built, arguments=bound, rows=bm, columns=BN, splits=splits, n=n)
    steps, partial = combined(step, [("x_scale_ptr", "*fp32", ""), *scaled], x)
    scratch = [Scratch(name="q", dtype="uint8", per_token=k // 2), Scratch(name="q_scale", dtype="uint8", per_token=k // group)]
    return Plan(steps=(tokens_step(k, kind, x, four_six), *steps), scratch=(*scratch, *partial))


def parts(m: int, n: int, k: int, processors: int) -> tuple[int, int]:
    """(tokens of a tile, parts of K): parts only as far as tiles leave processors idle."""
    bm = next((most for most in BM if m <= most), BM[-1])
    tiles = -(-m // bm) * -(-n // BN)
    return bm, max(1, min(MOST_SPLITS, processors // tiles, -(-k // BK)))


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    divisor: Tensor | None,
    bias: Tensor | None,
    four_six: bool,
    processors: int,
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; tensors as `prepare` makes them. On CPU tensors the programs must be interpreted."""
    n, (m, k) = len(weight), x.shape
    y = x.new_empty(m, n)
    if m == 0:
        return y
    kind = "mxfp4" if divisor is None else "nvfp4"
    bias_type = None if bias is None else launch.dtype_name(bias.dtype)
    steps = plan(n, k, kind, launch.dtype_name(x.dtype), bias_type, four_six, *parts(m, n, k, processors))
    tensors = {"weight": weight, "scale": scale, "row_scale": row_scale}
    tensors |= {"divisor": divisor} if divisor is not None else {}
    return launch.compute(steps, x, bias, tensors, y)


@torch.library.custom_op("lowbit::gpu_fp4_native", mutates_args=(), device_types="cuda")
def gpu_fp4_native(
    x: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, divisor: Tensor | None, bias: Tensor | None, four_six: bool
) -> Tensor:
    """As `multiply`, on x's device."""
    _, processors = launch.device_facts(x.get_device())
    return multiply(x, weight, scale, row_scale, divisor, bias, four_six, processors)


@gpu_fp4_native.register_fake
def _(
    x: Tensor, weight: Tensor, scale: Tensor, row_scale: Tensor, divisor: Tensor | None, bias: Tensor | None, four_six: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register
class GpuFp4Native(Kernel):
    """fp4_block with tokens of its own kind on GPUs with FP4 tensor cores: compute capability 10.0, 10.3 and 12.x.

    prepared: weight uint8 [N, K / 2], scale uint8 [N, K / G], row_scale float32 [N]; for nvfp4 then D_x [1] and D_w [1].
    """

    name: ClassVar[str] = "gpu_fp4_native"
    priority: ClassVar[int] = 30

    def refuses(self, spec: MatmulSpec) -> str | None:
        if not isinstance(spec.format, Fp4Block):
            return f"multiplies fp4_block, not {spec.format.name}"
        if spec.activation.name != spec.format.kind:
            return f"takes {spec.format.kind} tokens with {spec.format.kind} weights, not {spec.activation}"
        if reason := spec.format.refuses(spec.n, spec.k) or launch.device_refuses(spec):
            return reason
        if torch.cuda.get_device_capability() < (10, 0):
            return "needs the FP4 tensor cores of compute capability 10.0 or later"
        if not deployed.has_triton() or deployed.on(torch.cuda.current_device()) is not None:
            return "is not in deployment bundles"
        return None

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        scale = fields["weight_scale"].clone().view(torch.uint8)
        row_scale = torch.ones(spec.n, device=scale.device)
        if not isinstance(spec.activation, NvFp4):
            return fields["weight_packed"].clone(), scale, row_scale
        tokens, whole = fields["input_global_scale"].clone(), fields["weight_global_scale"].clone()
        return fields["weight_packed"].clone(), scale, row_scale / (tokens * whole), tokens, whole

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        weight, scale, _, *divisors = prepared
        fields = {"weight_packed": weight.clone(), "weight_scale": scale.clone()}
        if not divisors:
            return fields
        fields["weight_scale"] = fields["weight_scale"].view(torch.float8_e4m3fn)
        return fields | {"input_global_scale": divisors[0].clone(), "weight_global_scale": divisors[1].clone()}

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        weight, scale, row_scale, *divisors = prepared
        four_six = isinstance(spec.activation, NvFp4) and spec.activation.four_six
        y: Tensor = gpu_fp4_native(x, weight, scale, row_scale, divisors[0] if divisors else None, bias, four_six)
        return y
