"""A linear of very few tokens as one kernel, that quantizes its own input: which shapes get it, and its launch. Torch-free.

The kernels are apex4_linear of cuda/gemm/gemm_sm90_decode.cu and gemm_sm90_decode_s8.cu: x or SiLU(gate) * up, the Hadamard
transform, groups of 128. What their thread blocks do with their tiles is what the GEMMs for 8 tokens do, so that choose_gemm and
choose_sm90_s8 decide about it. With 4-bit activations results are those of quantizer and GEMM, bit for bit. With 8 bits they are
but for codes on a tie: the quantizer adds in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from ...format.layout_name import KERNEL_TILE_N
from ...format.number_format import BLOCK, CODE_MAX, round_up
from ..quantize.configs import DTYPES, FORMATS, INPUTS, NORMS, TOKEN_FORMAT
from ..runtime.launcher import Kernel, Launch, Number
from .configs import DECODE_PARTS, SHARED_LIMITS, GemmPlan, PlanSource, choose_gemm, plan_source
from .sm90_s8_configs import Sm90S8Plan, choose_sm90_s8, few_tokens_shared_bytes

FUSED_INPUTS = ("plain", "silu_mul")  # RMSNorm needs sums over rows first: in a model that cost more (measured, H100)
FUSED_INPUTS_S8 = INPUTS  # the whole row is read anyway
MOST_TOKENS = 3  # more take the thread blocks longer than a kernel in front of them (measured, H100)
SLICES = 64  # of quantize_tokens.cuh: blocks of tokens that are quantized at a time
MOST_ROUNDS = 3  # of these, likewise
TILE_M, STAGES = 8, 10
# Of 8-bit activations: tokens, and passes of quantize_whole_tokens.cuh, in which a thread block transforms all of a token's inputs
# (measured, H200: docs/kernel_measurements.md, item 17). Passes are unrolled, and each is as much code to fetch.
MOST_TOKENS_S8, MOST_ROUNDS_S8 = 2, 2
_SLICES_OF_WARP = 4  # of quantize_whole_tokens.cuh
_OUTPUTS = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class FusedConfig:
    """One cubin: `input` is one of FUSED_INPUTS, or FUSED_INPUTS_S8, `dtype` that of x and y."""

    input: str
    dtype: str

    activation_bits = 4
    source = "gemm/gemm_sm90_decode.cu"
    entry = "apex4_linear"

    @property
    def name(self) -> str:
        return f"sm90_linear_{self.input}_{self.dtype}"

    @cached_property
    def shared_bytes(self) -> int:
        """Of struct Shared; the kernel asserts it."""
        stage = round_up(DECODE_PARTS * (KERNEL_TILE_N * BLOCK // 2 + 2 * KERNEL_TILE_N) + 16, 128)
        output = TILE_M * KERNEL_TILE_N * (2 + 4 * DECODE_PARTS) + 16
        return round_up(STAGES * stage + output, 128)

    @cached_property
    def defines(self) -> dict[str, int]:
        bf16 = int(self.dtype == "bfloat16")
        return {
            "TILE_M": TILE_M, "PARTS": DECODE_PARTS, "STAGES": STAGES, "SHARED_BYTES": self.shared_bytes, "OUT_BF16": bf16,
            "QUANTIZES": 1, "APEX4_INPUT": INPUTS.index(self.input), "APEX4_HADAMARD": 1, "APEX4_BF16": bf16,
            "APEX4_FORMAT": 90,
        }  # fmt: skip


@dataclass(frozen=True)
class FusedS8Config(FusedConfig):
    """The same for 8-bit activations, with `rounds` passes over the tokens."""

    rounds: int = 1

    activation_bits = 8
    source = "gemm/gemm_sm90_decode_s8.cu"

    @property
    def name(self) -> str:
        return f"sm90_s8_linear{self.rounds}_{self.input}_{self.dtype}"

    @cached_property
    def shared_bytes(self) -> int:
        return few_tokens_shared_bytes(TILE_M, STAGES, 0)

    @cached_property
    def defines(self) -> dict[str, int]:
        return super().defines | {"APEX4_FORMAT": FORMATS[TOKEN_FORMAT], "ROUNDS": self.rounds, "TILES": 1}


@cache
def fused_config(input: str, dtype: str) -> FusedConfig:
    return FusedConfig(input, dtype)


@cache
def fused_s8_config(input: str, dtype: str, rounds: int) -> FusedS8Config:
    return FusedS8Config(input, dtype, rounds)


def all_configs(sm: int) -> list[FusedConfig]:
    if sm != 90:
        return []
    of_eight_bits = [
        fused_s8_config(input, dtype, rounds)
        for dtype in DTYPES
        for input in FUSED_INPUTS_S8
        for rounds in range(1, MOST_ROUNDS_S8 + 1)
    ]
    return [*(fused_config(input, dtype) for dtype in DTYPES for input in FUSED_INPUTS), *of_eight_bits]


@dataclass(frozen=True)
class FusedPlan:
    config: FusedConfig
    gemm: GemmPlan | Sm90S8Plan  # grid and cluster

    @property
    def own_blocks(self) -> int:
        """Blocks of inputs that a thread block multiplies: whole stages."""
        return -(-self.gemm.k_blocks // (DECODE_PARTS * self.gemm.cluster)) * DECODE_PARTS

    @property
    def shared_bytes(self) -> int:
        """With the scales and codes of its tokens. 128 bytes more: the last core matrix has eight rows whatever m is."""
        if isinstance(self.gemm, Sm90S8Plan):
            return self.config.shared_bytes + self.own_blocks * self.gemm.m * BLOCK
        return self.config.shared_bytes + self.own_blocks * (4 * TILE_M + self.gemm.m * BLOCK) + 128


def choose_fused(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, input: str, dtype: str, source: PlanSource | None = None
) -> FusedPlan | None:
    """The plan of a linear with the Hadamard transform and groups of 128, or None: quantizer and GEMM apart.

    `source`: see choose_gemm. Where APEX4_GEMM names another tile nothing is fused.
    """
    if sm != 90 or not 1 <= m <= MOST_TOKENS or input not in FUSED_INPUTS:
        return None
    chosen = choose_gemm(sm, sm_count, m, n, k_blocks, 1, _OUTPUTS[dtype], source=source)
    if chosen.config.tile_m != TILE_M:
        return None
    plan = FusedPlan(fused_config(input, dtype), chosen)
    fits = plan.shared_bytes <= SHARED_LIMITS[sm][0] and m * plan.own_blocks <= MOST_ROUNDS * SLICES
    return plan if fits else None


def choose_fused_s8(
    sm: int, sm_count: int, m: int, n: int, k_blocks: int, input: str, dtype: str, source: PlanSource | None = None
) -> FusedPlan | None:
    """As `choose_fused`, of 8-bit activations; groups of 128 all the same."""
    if sm != 90 or not 1 <= m <= MOST_TOKENS_S8 or input not in FUSED_INPUTS_S8:
        return None
    chosen = choose_sm90_s8(sm, sm_count, m, n, k_blocks, 1, _OUTPUTS[dtype], source or plan_source())
    if chosen.config.tile_m != TILE_M:
        return None
    rounds = -(-m * round_up(k_blocks, _SLICES_OF_WARP) // SLICES)
    if rounds > MOST_ROUNDS_S8:
        return None
    plan = FusedPlan(fused_s8_config(input, dtype, rounds), chosen)
    return plan if plan.shared_bytes <= SHARED_LIMITS[sm][0] else None


class FusedShape(NamedTuple):
    """All that a launch depends on but pointers, named as in QuantizerShape of quantize/launch.py."""

    device: int
    sm: int
    sm_count: int
    m: int
    n: int
    k: int
    k_blocks: int
    ldx: int
    ld_second: int
    aligned: bool
    dtype: str
    input: str
    clip: float
    source: PlanSource
    activation_bits: int
    eps: float = 0.0
    gain_offset: bool = False


@lru_cache(maxsize=4096)
def fused_launch(kernel: Callable[..., Kernel], shape: FusedShape) -> Launch | None:
    """The kernel of a shape with all but its pointers, which are y, x, second, w_packed, w_scale, with 8-bit
    activations w_unit, and bias, and of a sum residual and total; None: see above.

    `kernel` is launcher.kernel.
    """
    _, sm, sm_count, m, n, k, k_blocks, ldx, ld_second, aligned, dtype, input, clip, source, bits, eps, gain_offset = (
        shape
    )
    choose = choose_fused_s8 if bits == 8 else choose_fused
    plan = choose(sm, sm_count, m, n, k_blocks, input, dtype, source)
    if plan is None:
        return None
    config, grid = plan.config, plan.gemm
    numbers = (m, n, k, k_blocks, ldx, ld_second, n, -(-n // KERNEL_TILE_N))
    clips = [] if bits == 8 else [c_float(clip / CODE_MAX)]
    of_norm: list[Number] = [c_float(eps), c_float(1 / k), c_int(gain_offset)] if input in NORMS else []
    pointers = (7 if bits == 8 else 6) + 2 * (input == "add_rms_norm")
    return kernel(config.source, config.entry, config.defines, shape.device).bind(
        grid.grid,
        128 * DECODE_PARTS + 32,  # one warp copies
        pointers,
        [*map(c_int, numbers), *clips, c_int(aligned), *of_norm],
        shared_bytes=plan.shared_bytes,
        cluster=grid.cluster,
        programmatic=True,
    )
