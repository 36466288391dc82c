"""`gpu_a8w4`: dual-grained 4-bit weights times int8 tokens on NVIDIA GPUs, in Triton (programs in `jit/a8w4.py`).

Device layout, made by `prepare` from `int4_dual`, K cut into blocks of 2 * HALF:
    weight  uint8 [blocks * N + slack, HALF]   row b * N + n; byte j holds k = 2 * HALF * b + j (low nibble) and + HALF (high)
    words   int32 [blocks * N + slack]         bytes s_lo, b_lo, s_hi, b_hi of the groups of the two halves, b = 128 + o
    row_scale float32 [N]
Each half lies inside one group, so a nibble field of a 32-bit word has one (s, b) and meets one slice of activations: no
shuffles. A tile of rows is one contiguous run of memory. K is padded with code 0 in the last block (the activations are
zero there); the slack lets a tile that sticks out of N read without a mask. 4.25 bits per weight at HALF = 64, 4.5 at 32.

u * s + b must not leave a byte for any of the 16 codes, so 15 * s <= 255: `Int4Dual.check` guarantees it (o >= -128 and
15 * s + o <= 127 give s <= 17) and `prepare` calls it, so a layer that does not fit is an error, never a wrong number.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, register
from quant.kernels.format import Fields
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import pack_bits, unpack_bits
from quant.kernels.gpu.tiles import WIDEST, choose_tile, table_arch

MAX_K = (2**31 - 1) // (127 * 128)  # |code| <= 127 times |w8| <= 128 must add up inside int32
QUANTIZE_BLOCK = 2048  # elements per step of the activation program: 16 bytes of bfloat16 for each of 256 threads
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def half_block(group: int) -> int | None:
    """HALF: the longest of 64 and 32 that divides the group length; None when neither does (int8 MMA needs 32)."""
    return next((half for half in (64, 32) if group % half == 0), None)


def to_device_layout(fields: Mapping[str, Tensor], n: int, k: int, group: int) -> Prepared:
    """`int4_dual` fields -> (weight, words, row_scale), see the head of this file."""
    half = half_block(group)
    assert half is not None, f"group {group} has no half-block"
    blocks = -(-k // (2 * half))
    pad = blocks * 2 * half - k
    codes = torch.nn.functional.pad(unpack_bits(fields["weight_packed"], 4, k), (0, pad))
    codes = codes.view(n, blocks, 2, half).permute(1, 0, 3, 2)  # [blocks, N, half, 2]: pairs that share a byte
    weight = codes.new_zeros(blocks * n + WIDEST, half)
    weight[: blocks * n] = codes[..., 0].reshape(-1, half) | (codes[..., 1].reshape(-1, half) << 4)
    scale = fields["group_scale"].to(torch.int64)
    offset = fields["group_offset"].to(torch.int64) + 128
    of_half = torch.arange(blocks * 2, device=scale.device) * half // group
    of_half.clamp_(max=k // group - 1)  # a half of padding takes the last group
    pairs = (scale | offset << 8)[:, of_half].view(n, blocks, 2)
    unsigned = (pairs[..., 0] | pairs[..., 1] << 16).t().reshape(-1)  # [blocks * N]
    words = torch.zeros(blocks * n + WIDEST, dtype=torch.int32, device=scale.device)
    words[: blocks * n] = torch.where(unsigned < 2**31, unsigned, unsigned - 2**32).to(torch.int32)
    return weight, words, fields["row_scale"]


def from_device_layout(prepared: Prepared, n: int, k: int, group: int) -> Fields:
    """Exact inverse of `to_device_layout`."""
    weight, words, row_scale = prepared
    half = weight.shape[1]
    blocks = -(-k // (2 * half))
    rows = weight[: blocks * n].view(blocks, n, half)
    codes = torch.stack([rows & 15, rows >> 4], 2).permute(1, 0, 2, 3).reshape(n, -1)[:, :k]
    word = words[: blocks * n].view(blocks, n).t()  # [N, blocks]
    pairs = torch.stack([word & 0xFFFF, (word >> 16) & 0xFFFF], 2).reshape(n, -1)
    first = pairs[:, :: group // half][:, : k // group]  # the first half of each group
    return {
        "weight_packed": pack_bits(codes.contiguous(), 4),
        "group_scale": (first & 255).to(torch.uint8),
        "group_offset": ((first >> 8) - 128).to(torch.int8),
        "row_scale": row_scale,
    }


@functools.cache
def device_facts(index: int) -> tuple[int, int]:
    """(architecture of the table, number of multiprocessors) of CUDA device `index`."""
    facts = torch.cuda.get_device_properties(index)
    return table_arch(10 * facts.major + facts.minor), facts.multi_processor_count


def launch(
    x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int, facts: tuple[int, int]
) -> Tensor:
    """Quantize the tokens of x [M, K] and multiply: two launches, no synchronization. `facts`: see `device_facts`."""
    from quant.kernels.gpu.jit.a8w4 import matmul_tile, quantize_rows

    (m, k), n, half = x.shape, row_scale.shape[0], weight.shape[1]
    y = x.new_empty(m, n)
    if m == 0:
        return y
    blocks = (weight.shape[0] - WIDEST) // n
    k_pad = blocks * 2 * half
    codes = torch.empty(m, k_pad, dtype=torch.int8, device=x.device)
    x_scale = torch.empty(m, dtype=torch.float32, device=x.device)
    quantize_rows[(m,)](x, codes, x_scale, k, k_pad, BLOCK=QUANTIZE_BLOCK, num_warps=8, num_stages=1, enable_fp_fusion=False)
    arch, processors = facts
    tile = choose_tile(arch, half, m, n, processors)
    bf16 = y.dtype == torch.bfloat16
    matmul_tile[(-(-m // tile.bm), -(-n // tile.bn))](
        codes,
        x_scale,
        weight,
        words,
        row_scale,
        bias,
        y.view(torch.int16) if bf16 else y,
        m,
        n,
        blocks,
        k_pad,
        n * half,
        BM=tile.bm,
        BN=tile.bn,
        HALF=half,
        PAIR=group // half % 2 == 1,
        SWAP=tile.swap,
        BIAS=bias is not None,
        BF16=bf16,
        INLINE=x.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    return y


@torch.library.custom_op("lowbit::gpu_a8w4", mutates_args=(), device_types="cuda")
def gpu_a8w4(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype; the other tensors as `prepare` made them, bias [N] of any float dtype."""
    with torch.cuda.device(x.device):  # Triton launches on the current device
        return launch(x, weight, words, row_scale, bias, group, device_facts(x.get_device()))


@gpu_a8w4.register_fake
def _(x: Tensor, weight: Tensor, words: Tensor, row_scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(x.shape[0], row_scale.shape[0])


@register
class GpuA8W4(Kernel):
    """int4_dual with int8 tokens on NVIDIA GPUs of compute capability 8.0 and later."""

    name: ClassVar[str] = "gpu_a8w4"
    priority: ClassVar[int] = 20

    def refuses(self, spec: MatmulSpec) -> str | None:
        if spec.device != "cuda":
            return f"runs on cuda, not on {spec.device}"
        if not isinstance(spec.format, Int4Dual):
            return f"multiplies int4_dual, not {spec.format.name}"
        if spec.activation != "int8_token":
            return f"needs int8_token activations, not {spec.activation!r}"
        if half_block(spec.format.group) is None:
            return f"needs a group length that 32 divides, not {spec.format.group}"
        if spec.k > MAX_K:
            return f"int32 sums allow K up to {MAX_K}, not {spec.k}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if torch.version.hip:
            return "its table has no AMD architecture"
        if torch.cuda.get_device_capability() < (8, 0):
            return "needs compute capability 8.0 or later"
        return None

    def prepare(self, fields: Mapping[str, Tensor], spec: MatmulSpec) -> Prepared:
        """Raises ValueError, naming the row, when a group leaves the range that one byte can hold."""
        assert isinstance(spec.format, Int4Dual)
        spec.format.check(fields, spec.n, spec.k)
        return to_device_layout(fields, spec.n, spec.k, spec.format.group)

    def restore(self, prepared: Prepared, spec: MatmulSpec) -> Fields:
        assert isinstance(spec.format, Int4Dual)
        return from_device_layout(prepared, spec.n, spec.k, spec.format.group)

    def matmul(self, x: Tensor, prepared: Prepared, bias: Tensor | None, spec: MatmulSpec) -> Tensor:
        assert isinstance(spec.format, Int4Dual)
        assert x.dtype in DTYPES, f"x is {x.dtype}"
        y: Tensor = gpu_a8w4(x, *prepared, bias, spec.format.group)
        return y
