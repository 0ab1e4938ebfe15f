"""How long a GEMM takes, from what the compiler made of its main loop: an account of issue slots. Torch-free.

An SM has four schedulers. Each issues one instruction of one warp per clock, and each has a quarter of the SM's tensor
cores, lanes and shared-memory bandwidth. kernels/mainloop_counts.json says how many instructions of every kind a warp
spends per *product*: 32 lanes, one accumulator each, one block of 128 inputs. That is 8192 operations on the tensor
cores, 4 clocks of a scheduler's share on an A100 or H100 and 8 on GA102 and AD102. The other pipes:

    issue    every instruction                                             1 clock
    fma      FFMA FMUL FADD IMAD, float16 widening                         32 lanes / FP32 lanes of a scheduler
    alu      LOP3 IADD3 SHF PRMT LEA MOV SEL ISETP ...                     2 clocks (16 lanes everywhere)
    i2f      conversions                                                   8 clocks on sm_80, 2 from sm_86 on
    shared   bytes read by LDS and LDSM, and written by copies             1/32 clock a byte

A main loop that is *overlapped* takes as long as its busiest pipe. One that is not takes turns between mma, conversion
and arithmetic, which wait for each other: tensor + i2f + fma. Then

    time = waves of tiles x K/128 blocks x products of a tile x clocks / clock rate / EFFICIENCY,  or the memory floor

Fitted: EFFICIENCY, one number, to four (the published range of a naive kernel on an A100 and on an RTX 3090). Read from
data sheets or code: everything else, so that the naive kernel's two ratios are one fit and one check. What is not
modelled (bank conflicts, latency that the warps of an SM cannot hide, first loads and stores of a tile, clocks below boost
under load, L2) is in EFFICIENCY, which is therefore no constant of nature: a kernel with a better pipeline than the
fitted one has a higher one. docs/issue_slots.md says what that means for ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from ..format.number_format import BLOCK
from ..hardware.gpus import Gpu

TABLE = Path(__file__).parents[1] / "kernels" / "analysis" / "mainloop_counts.json"
SCHEDULERS = 4
PRODUCT_OPS = 32 * BLOCK * 2  # of a warp: 32 accumulators, 128 multiply-adds
CONTROL = "naive_i2f"

FP16_SHARE = 0.85  # of peak, what cuBLAS reaches on large GEMMs (A100: about 265 of 312 TFLOPS)
MEMORY_SHARE = 0.85  # of the datasheet's bandwidth, what a streaming kernel reaches
# Of the time the account gives, what the naive kernel of arXiv 2606.08761 reaches: the one fitted number (see above).
EFFICIENCY = 0.415
# What is reached where every latency is hidden; cuBLAS's share. The upper end of every prediction.
EFFICIENCY_LIMIT = 0.85
# sm_90: measured on an H200, the mean over layers of Llama-3-8B and Llama-2-70B at M 2048 and 4096 (`apex4 bench`).
EFFICIENCY_SM90 = 0.62
# The same for 8-bit activations, M 2048, 4096 and 8192; how: docs/kernel_measurements.md, item 16.
EFFICIENCY_SM90_EIGHT_BIT = 0.695
# 8-bit activations. What the simulation does not know is taken to cost both kinds of kernel the same: EFFICIENCY times the share
# of the account that the simulation gives the 8-bit loop over what it gives the 4-bit one (docs/issue_slots.md).
EFFICIENCY_EIGHT_BIT = 0.54
# mma.sync of 8-bit integers on sm_90: clocks of an m16n8k32 over what wgmma takes for as much (measured, H100 and H200).
_MMA_SYNC_SM90 = 6.07 / 4


@dataclass(frozen=True)
class Rates:
    """Clocks that one instruction of a warp keeps a scheduler's pipe busy.

    CUDA C++ Programming Guide, throughput of native arithmetic instructions, results per clock and SM: FP32 64 on 8.0 and
    128 on 8.6, 8.9 and 9.0; 32-bit integer 64 on all; I2F 16 on 8.0 and 64 later, where it is another instruction
    (I2FP). The guide's table could not be read when this was written: the I2F figures are assumed, not verified.
    """

    fma: float
    alu: float
    i2f: float
    shared: float  # per byte


RATES = {80: Rates(2, 2, 8, 1 / 32), 86: Rates(1, 2, 2, 1 / 32), 89: Rates(1, 2, 2, 1 / 32), 90: Rates(1, 2, 2, 1 / 32)}
_FMA = ("ffma", "fmul", "fadd", "imad", "half")
_DEQUANTIZATION = ("ffma", "fmul", "i2f")  # what a group of several blocks does once


def pipe_clocks(rates: Rates, classes: Mapping[str, float], shared_bytes: float) -> dict[str, float]:
    """Clocks that instructions of these classes (sass.py) keep each pipe but the tensor cores."""
    fma, imad = sum(classes.get(name, 0) for name in _FMA), classes.get("imad", 0)
    return {
        "issue": sum(classes.values()),
        "fma": max(rates.fma * fma, 2 * imad),  # IMAD has 16 lanes everywhere
        "alu": rates.alu * classes.get("integer", 0),
        "i2f": rates.i2f * classes.get("i2f", 0),
        "shared": rates.shared * shared_bytes,
    }


@dataclass(frozen=True)
class Loop:
    """A main loop of the table; everything per product."""

    name: str
    arch: str
    tile: tuple[int, int]
    wide_groups: bool
    instructions: float
    classes: dict[str, float]
    shared_bytes: float  # read, and written by copies
    overlapped: bool
    bits: int = 4  # of activations
    mma_sync: bool = True  # not wgmma
    scale_products: float = 0.0  # tensor-core time of products of scales, over that of codes

    def clocks(self, gpu: Gpu, blocks_per_group: float = 1) -> dict[str, float]:
        """Clocks of a scheduler per product, by pipe, on this GPU."""
        rates = RATES[gpu.sm]
        # The kernel for sm_90 dequantizes every block, whatever the group.
        share = 1.0 if self.arch == "sm_90a" else 1 / blocks_per_group
        spent = {name: number * (share if name in _DEQUANTIZATION else 1) for name, number in self.classes.items()}
        pipes = pipe_clocks(rates, spent, self.shared_bytes)
        pipes["issue"] += self.instructions - sum(self.classes.values())
        return {"tensor": self._tensor_clocks(gpu)} | pipes

    def _tensor_clocks(self, gpu: Gpu) -> float:
        operations = gpu.ops_per_clock(self.bits)
        clocks = PRODUCT_OPS * SCHEDULERS / operations * (1 + self.scale_products)
        return clocks * _MMA_SYNC_SM90 if self.bits == 8 and self.arch == "sm_90a" and self.mma_sync else clocks

    def product_clocks(self, gpu: Gpu, blocks_per_group: float = 1) -> float:
        """Clocks per product of the whole loop, before EFFICIENCY."""
        clocks = self.clocks(gpu, blocks_per_group)
        busiest = max(clocks.values())
        return busiest if self.overlapped else max(busiest, clocks["tensor"] + clocks["i2f"] + clocks["fma"])


@cache
def table() -> dict[str, Any]:
    """The committed counts: {"nvrtc": ..., "kernels": [...]}; scripts/account/issue_slots makes them."""
    counts: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return counts


def arch_of(gpu: Gpu) -> str:
    return "sm_90a" if gpu.sm == 90 else f"sm_{gpu.sm}"


@cache
def loops(arch: str) -> tuple[Loop, ...]:
    """Every main loop counted for an architecture, the control's too."""
    return tuple(
        Loop(
            name=row["name"],
            arch=row["arch"],
            tile=tuple(row["tile"]),
            wide_groups=row["groups"] == "wide",
            instructions=row["instructions"] / row["products"],
            classes={name: number / row["products"] for name, number in row["classes"].items()},
            shared_bytes=(row["shared_bytes"] + row["copied_bytes"]) / row["products"],
            overlapped=row["name"] != CONTROL,
            bits=row["bits"],
            mma_sync=not any("GMMA." in opcode for opcode in row["opcodes"]),
            scale_products=_scale_products(row["opcodes"]),
        )
        for row in table()["kernels"]
        if row["arch"] == arch
    )


def _scale_products(opcodes: dict[str, int]) -> float:
    """gemm_sm90.cu: a tf32 wgmma of k 8 takes the tensor cores as long as an e4m3 one of k 32."""
    scales = sum(number for name, number in opcodes.items() if name.startswith("HGMMA.") and name.endswith(".TF32"))
    return scales / sum(number for name, number in opcodes.items() if name.startswith("QGMMA.")) if scales else 0.0


def best_loop(gpu: Gpu, blocks_per_group: float = 1, activation_bits: int = 4) -> Loop:
    """Of ours, the loop with the fewest clocks per product on this GPU: what large GEMMs should run."""
    return _best_loop(gpu, activation_bits == 4 and blocks_per_group > 1 and gpu.sm != 90, activation_bits)


@cache
def _best_loop(gpu: Gpu, wide_groups: bool, activation_bits: int) -> Loop:
    ours = [
        loop
        for loop in loops(arch_of(gpu))
        if (loop.name != CONTROL and loop.bits == activation_bits and loop.wide_groups == wide_groups)
    ]
    return min(ours, key=lambda loop: (loop.product_clocks(gpu), sum(loop.clocks(gpu).values())))


@cache
def control(gpu: Gpu) -> Loop:
    """The naive kernel, scripts/account/naive_i2f.cu. On sm_90, which has no INT4 mma, sm_89's counts stand for it."""
    arch = arch_of(gpu) if gpu.sm < 90 else "sm_89"
    return next(loop for loop in loops(arch) if loop.name == CONTROL)


def efficiency(gpu: Gpu, activation_bits: int = 4) -> float:
    if gpu.sm == 90:
        return EFFICIENCY_SM90 if activation_bits == 4 else EFFICIENCY_SM90_EIGHT_BIT
    return EFFICIENCY if activation_bits == 4 else EFFICIENCY_EIGHT_BIT


def mainloop_seconds(gpu: Gpu, loop: Loop, m: int, n: int, padded_k: int, blocks_per_group: float = 1) -> float:
    """Seconds of the arithmetic alone if every SM is busy to the end. No waves, no memory: what `cost_model` compares."""
    products = m * n * padded_k / BLOCK / 32 / SCHEDULERS  # of one scheduler, if there were one SM
    clocks = products * loop.product_clocks(gpu, blocks_per_group) / gpu.sms
    return clocks / (gpu.clock_mhz * 1e6) / efficiency(gpu, loop.bits)


def gemm_seconds(gpu: Gpu, loop: Loop, m: int, n: int, k: int, share: float | None = None) -> float:
    """Seconds of the GEMM at groups of 128, whole tiles in whole waves. `share` in the place of the fitted EFFICIENCY."""
    blocks = ceil(k / BLOCK)
    tiles = ceil(m / loop.tile[0]) * ceil(n / loop.tile[1])
    tile_clocks = loop.tile[0] * loop.tile[1] / 32 / SCHEDULERS * blocks * loop.product_clocks(gpu)
    compute = ceil(tiles / gpu.sms) * tile_clocks / (gpu.clock_mhz * 1e6) / (share or efficiency(gpu, loop.bits))
    codes = BLOCK / 2 + 4 if loop.bits == 4 else BLOCK
    moved = n * blocks * (BLOCK / 2 + 2) + m * blocks * codes + 2 * m * n
    return max(compute, moved / (gpu.memory_gbs * 1e9 * MEMORY_SHARE))
