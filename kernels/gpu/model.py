"""A cost model for tiles: every figure it gives is predicted, none is measured. On an H200 times were up to twice as long.

One trip of the hot loop keeps each pipe of a multiprocessor busy for (its instructions or bytes) / (its rate); the busiest one
bounds the trip. Programs that share a multiprocessor add up; one alone is bounded by how fast its own warps can issue. The
rates are data-sheet peaks (conversion rate: the CUDA guide's figure for 7.x). Differences under 20 % mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

THREADS = 32
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 48  # 64 on 8.0, 9.0 and 10.0; the smaller number serves all
ISSUE_CYCLES = 2  # assumed: between two instructions of one warp
FILL_CYCLES = 2000  # assumed: launch, first loads from DRAM, epilogue
COMBINE_US = 3.0  # assumed: the second launch that a split K costs


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peaks of one product per architecture; lanes and multiply-adds are per multiprocessor and clock."""

    name: str
    processors: int
    ghz: float
    dram_gb_per_s: float
    mma16: int  # multiply-adds of 16-bit operands; twice that for 8 bits, half for tf32
    int_lanes: int
    half_lanes: int  # instructions on pairs
    float_lanes: int
    convert_lanes: int
    shared_bytes: int  # per program
    shared_bytes_sm: int


DEVICES = {
    80: Device(
        name="A100", processors=108, ghz=1.41, dram_gb_per_s=2039, mma16=1024, int_lanes=64, half_lanes=128, float_lanes=64,
        convert_lanes=16, shared_bytes=163 * 1024, shared_bytes_sm=164 * 1024,
    ),
    89: Device(
        name="L40S", processors=142, ghz=2.52, dram_gb_per_s=864, mma16=512, int_lanes=64, half_lanes=64, float_lanes=128,
        convert_lanes=16, shared_bytes=99 * 1024, shared_bytes_sm=100 * 1024,
    ),
    90: Device(
        name="H100 SXM", processors=132, ghz=1.83, dram_gb_per_s=3350, mma16=2048, int_lanes=64, half_lanes=128,
        float_lanes=128, convert_lanes=16, shared_bytes=227 * 1024, shared_bytes_sm=228 * 1024,
    ),
    100: Device(
        name="B200", processors=148, ghz=1.85, dram_gb_per_s=8000, mma16=4096, int_lanes=64, half_lanes=128,
        float_lanes=128, convert_lanes=16, shared_bytes=227 * 1024, shared_bytes_sm=228 * 1024,
    ),
}  # fmt: skip
OPERAND_RATE = {"int8": 2.0, "fp16": 1.0, "bf16": 1.0, "fp32": 1 / 6}  # float32 tokens: three tf32 products at half rate


@dataclass(frozen=True, kw_only=True)
class Trip:
    """What one trip of the hot loop of one program costs, from its machine code."""

    pipes: Mapping[str, int]  # ALU instructions per warp: int, half, float, convert
    instructions: int  # per warp
    warps: int
    registers: int
    shared_bytes: int
    tokens: int  # BM
    columns: int  # BN
    block: int  # BK
    bytes_per_block: float  # weights and parameters of [BN, BK]
    compute: str

    def cycles(self, device: Device) -> dict[str, float]:
        """Pipe -> cycles for which a multiprocessor is busy with one trip of one program."""
        lanes = {
            "int": device.int_lanes,
            "half": device.half_lanes,
            "float": device.float_lanes,
            "convert": device.convert_lanes,
        }
        busy = {pipe: self.pipes.get(pipe, 0) * self.warps * THREADS / rate for pipe, rate in lanes.items()}
        busy["issue"] = self.instructions * self.warps / 4
        busy["mma"] = self.tokens * self.columns * self.block / (device.mma16 * OPERAND_RATE[self.compute])
        busy["dram"] = self.bytes_per_block / (device.dram_gb_per_s / device.ghz / device.processors)
        return busy

    def resident(self, device: Device) -> int:
        """Programs that fit on one multiprocessor."""
        by_registers = REGISTERS_PER_SM // (self.registers * THREADS * self.warps)
        by_shared = device.shared_bytes_sm // (self.shared_bytes + 1024)
        return max(1, min(by_registers, by_shared, WARPS_PER_SM // self.warps))

    def predicted_us(self, device: Device, m: int, n: int, k: int, splits: int = 1, processors: int | None = None) -> float:
        """Predicted time of the product [m, k] x [n, k] in microseconds."""
        processors = processors or device.processors
        programs = -(-m // self.tokens) * -(-n // self.columns) * splits
        trips = math.ceil(math.ceil(k / self.block) / splits)
        each = -(-programs // processors)
        resident = self.resident(device)
        busiest = max(self.cycles(device).values())
        waves = -(-each // resident)
        together = min(each, resident)
        cycles = waves * (FILL_CYCLES + trips * max(self.instructions * ISSUE_CYCLES, together * busiest))
        partials = 0.0 if splits == 1 else COMBINE_US + 8e-3 * splits * m * n / device.dram_gb_per_s
        return float(cycles / device.ghz / 1000 + partials)


def from_row(row: Mapping[str, Any], compute: str, block: int, bytes_per_block: float) -> Trip:
    """The trip of a table row as `tune` writes it."""
    counts = row["counts"]
    return Trip(
        pipes=counts["pipes"],
        instructions=counts["instructions"],
        warps=row["warps"],
        registers=counts["registers"],
        shared_bytes=row["shared_bytes"],
        tokens=row["bm"],
        columns=row["bn"],
        block=block,
        bytes_per_block=bytes_per_block,
        compute=compute,
    )
