"""Which quantizer kernel runs for which input, and with what grid. Knows no torch (but for `prepack_...`) and no CUDA.

The kernels are quantize_rows.cu (no transform or the Hadamard matrix; any group size), quantize_whole_rows.cu (the same to eight
bits, with a scale a row), quantize_dense.cu (a dense matrix per block; group size 128, or a row of eight bits),
quantize_dense_sm90.cu (the same for many rows on Hopper), row_rms.cu, which quantize_dense.cu needs for RMSNorm, also of a sum, and
row_scale.cu, which it needs for eight bits. Their headers say what they do; here are the numbers that depend on shapes. None of them changes a result, but for
`product_is_faster`: a Hadamard transform as a product has its sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...format.number_format import BLOCK, CLIP_ROWS, FEEDBACK_ROWS, FEEDBACK_STEPS
from ..index import index_function

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

INPUTS = ("plain", "rms_norm", "silu_mul", "add_rms_norm")  # APEX4_INPUT is the position
NORMS = ("rms_norm", "add_rms_norm")  # of whole rows
DENSE_INPUTS = INPUTS[:3]  # what the kernels with a dense matrix read; a sum is made by row_rms.cu in front of them
FORMS = ("narrow", "resident", "long")  # APEX4_FORM, likewise
WHOLE_FORMS = ("", "resident", "long", "cluster", "stream", "few")  # APEX4_FORM of quantize_whole_rows.cu
PASSES = ("", "measure", "codes")  # APEX4_PASS, likewise
FEEDBACKS = ("", "feedback", "feedback16")  # APEX4_FEEDBACK, likewise: without, with it, and with sixteen levels
DTYPES = ("float16", "bfloat16")  # APEX4_BF16, likewise
TOKEN_FORMAT = "s8"  # that of eight bits, one scale a token
GROUPED_FORMATS = {80: "sm80", 86: "sm80", 89: "sm80", 90: "sm90"}  # that of four bits, by architecture
FORMATS = {"sm80": 80, "sm90": 90, TOKEN_FORMAT: 8}  # activation format -> APEX4_FORMAT

WARP = 32
SLICE_LANES = 8  # threads of a slice: of one block of one row
RESIDENT_SLICES, LONG_BLOCKS = 128, 1024  # MAX_THREADS / 8 and MAX_LONG_BLOCKS of quantize_rows.cu
LONG_THREADS = 512
RESIDENT_THREADS = 1536  # of a multiprocessor: 40 registers each
CTA_SLICES = 32  # 256 threads: six such CTAs fill an SM
SMALL_CTA_SLICES = 8  # where there is too little work for all SMs
CTA_ROWS = 8  # eight rows of a block are 512 or 1024 contiguous bytes of codes and one sector of scales
GRID_Y = 65535  # the largest grid in y; row tiles go on in z

WHOLE_LANES = 4  # quantize_whole_rows.cu: threads of a slice
WHOLE_SLICES, WHOLE_LONG_THREADS = (
    224,
    512,
)  # the most slices of a CTA that are kept; threads of one that reads a row again
FEW_FORMS = ("few", "cluster")
FEW_LANES, FEW_SLICES = 8, 128  # of those: threads of a slice; the most slices of a CTA
FEW_TOKENS = 64  # rows that have them (measured, H200: docs/kernel_measurements.md, item 21)
WHOLE_LEAST_SLICES, WHOLE_MOST_ROWS = 16, 8  # a CTA of short rows has several of them
CLUSTER_CTAS, CLUSTER_GRID = 8, 128  # the most CTAs that share a row, and of all rows
CLUSTER_LEAST_BLOCKS = 96  # of a row: a shorter one takes less time in one CTA than CTAs take to tell each other
CLUSTER_LEAST_CTAS = 4  # likewise, unless a CTA cannot have the row
STREAM_THREADS = {"plain": 1024, "rms_norm": 1024, "silu_mul": 896}  # of a multiprocessor: 64 registers each, or 72
STREAM_SHARED_BYTES = 227 << 10  # of an sm_90
STREAM_SLOTS = {"plain": 2 * 4, "rms_norm": 3 * 4, "silu_mul": 2 * 4}  # SLOT_BYTES / 16 of quantize_whole_rows.cu

DENSE_THREADS = 128
DENSE_CTA_ROWS = 128  # a pass of the kernels for many rows
DENSE_CTAS_PER_SM = 2
DENSE_MOST_PASSES = 16
DENSE_MATRIX_COST = 0.5  # loading the matrix, in passes: as many bytes as a pass, but from L2
FEW_ROWS = 16  # a CTA of the kernel for few rows
OWN_RMS_ROWS = 4  # rows whose RMS that kernel works out itself
FEWEST_THREADS, FEWEST_ROWS = 256, 8  # of the kernel with more warps for that
# quantize_dense_sm90.cu, by input: threads, and what is in shared memory beside the matrix, in rows of a block: those of stages;
# for RMSNorm also the gain, and what readers have on its way.
DENSE_SM90 = {"plain": (256, 2 * 128), "silu_mul": (256, 2 * 128), "rms_norm": (512, 3 * 192 + 1 + 4 * 3 * 16)}
DENSE_SM90_TOKEN_ROWS = {"plain": 2 * 128, "silu_mul": 2 * 128, "rms_norm": 2 * 128 + 1}  # to eight bits; 256 threads
DENSE_SM90_TILE_ROWS = 64  # of a warpgroup
MATRIX_CHUNKS = BLOCK * BLOCK // 8  # 16-byte units of a prepacked matrix
FEEDBACK_CHUNKS = FEEDBACK_ROWS * BLOCK // 8  # of the error feedback behind it
CLIP_CHUNKS = CLIP_ROWS * BLOCK // 8  # and of the clip ratio behind that
PRODUCT_START = 4_600_000  # picoseconds that quantize_dense_sm90.cu takes longer to start than quantize_rows.cu
BOARD_HEAD_BYTES, BOARD_POST_BYTES = 16, 8  # `Board` of quantize_dense_sm90.cu


@dataclass(frozen=True)
class QuantizeConfig:
    """One cubin. `macros` in a fixed order, so that equal configurations are equal."""

    name: str
    source: str
    entry: str
    macros: tuple[tuple[str, int], ...]

    @property
    def defines(self) -> dict[str, int]:
        return dict(self.macros)


@dataclass(frozen=True)
class QuantizePlan:
    """A launch: what `launcher.kernel` and `Kernel.launch` take, and the arguments that belong to the grid."""

    config: QuantizeConfig
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0  # dynamic
    cluster: int = 1
    rows_log2: int = 0  # quantize_rows
    blocks_per_cta: int = 0  # quantize_rows
    rows_per_cta: int = 0  # quantize_dense
    needs_board: bool = False  # quantize_dense_sm90 with RMSNorm
    needs_statistics: bool = False  # quantize_dense with RMSNorm: row_rms before it, which also adds
    needs_row_scales: bool = False  # quantize_dense to eight bits: row_scale before it

    @property
    def defines(self) -> dict[str, int]:
        return self.config.defines


@cache
def rows_config(form: str, input: str, hadamard: bool, dtype: str, format: str) -> QuantizeConfig:
    name = f"quantize_rows_{form}_{input}_{'hadamard' if hadamard else 'none'}_{dtype}_{format}"
    macros = (
        ("APEX4_FORM", FORMS.index(form)),
        ("APEX4_INPUT", INPUTS.index(input)),
        ("APEX4_HADAMARD", int(hadamard)),
        ("APEX4_BF16", DTYPES.index(dtype)),
        ("APEX4_FORMAT", FORMATS[format]),
    )
    return QuantizeConfig(name, "quantize/quantize_rows.cu", "apex4_quantize_rows", macros)


@cache
def whole_rows_config(form: str, input: str, hadamard: bool, dtype: str) -> QuantizeConfig:
    name = f"quantize_whole_rows_{form}_{input}_{'hadamard' if hadamard else 'none'}_{dtype}_s8"
    macros = (
        ("APEX4_FORM", WHOLE_FORMS.index(form)),
        ("APEX4_INPUT", INPUTS.index(input)),
        ("APEX4_HADAMARD", int(hadamard)),
        ("APEX4_BF16", DTYPES.index(dtype)),
        ("APEX4_FORMAT", FORMATS[TOKEN_FORMAT]),
    )
    return QuantizeConfig(name, "quantize/quantize_whole_rows.cu", "apex4_quantize_whole_rows", macros)


@cache
def dense_config(
    few_rows: int, input: str, dtype: str, format: str, sm_90: bool = False, feedback: str = ""
) -> QuantizeConfig:
    """`few_rows`: APEX4_FEW_ROWS. Of s8 the kernel that makes codes; `sm_90`: of the GPU, which of s8 decides, as the format sm90 says itself.
    `feedback`, one of FEEDBACKS: to four bits, with error feedback, which quantize_dense.cu alone has."""
    if feedback:
        plain = dense_config(few_rows or 1, input, dtype, format)
        name = f"quantize_dense_{('many', 'few', 'fewest')[few_rows]}_{feedback}_{input}_{dtype}_{format}"
        of_feedback = (("APEX4_FEW_ROWS", few_rows), *plain.macros[1:], ("APEX4_FEEDBACK", FEEDBACKS.index(feedback)))
        return QuantizeConfig(name, plain.source, plain.entry, of_feedback)
    wgmma = format == "sm90" or (sm_90 and format == TOKEN_FORMAT)
    kind = "many_wgmma" if wgmma and not few_rows and format == TOKEN_FORMAT else ("many", "few", "fewest")[few_rows]
    name = f"quantize_dense_{kind}_{input}_{dtype}_{format}"
    macros: tuple[tuple[str, int], ...] = (
        ("APEX4_INPUT", INPUTS.index(input)),
        ("APEX4_BF16", DTYPES.index(dtype)),
        ("APEX4_FORMAT", FORMATS[format]),
    )
    if format == TOKEN_FORMAT:
        macros = *macros, ("APEX4_PASS", PASSES.index("codes"))
    if wgmma and not few_rows:
        return QuantizeConfig(name, "quantize/quantize_dense_sm90.cu", "apex4_quantize_dense", macros)
    return QuantizeConfig(
        name, "quantize/quantize_dense.cu", "apex4_quantize_dense", (("APEX4_FEW_ROWS", few_rows), *macros)
    )


@cache
def measuring_config(codes: QuantizeConfig) -> QuantizeConfig:
    """The kernel that measures for the one that makes codes."""
    macros = {**codes.defines, "APEX4_PASS": PASSES.index("measure")}
    return QuantizeConfig(f"{codes.name}_measure", codes.source, codes.entry, tuple(macros.items()))


def dense_sm90_shared_bytes(input: str, format: str = "sm90") -> int:
    """SHARED_BYTES of quantize_dense_sm90.cu."""
    rows = DENSE_SM90_TOKEN_ROWS[input] if format == TOKEN_FORMAT else DENSE_SM90[input][1]
    return 16 * MATRIX_CHUNKS + 2 * BLOCK * rows


def board_bytes(m: int) -> int:
    """Of the memory in which thread blocks of quantize_dense_sm90.cu tell each other the RMS of m rows."""
    return BOARD_HEAD_BYTES + BOARD_POST_BYTES * m


@cache
def row_rms_config(dtype: str, adds: bool = False) -> QuantizeConfig:
    """`adds`: of a sum, which is stored."""
    input = INPUTS.index("add_rms_norm" if adds else "plain")
    macros = (("APEX4_INPUT", input), ("APEX4_BF16", DTYPES.index(dtype)), ("APEX4_FORMAT", 80))
    return QuantizeConfig(f"row_rms{'_of_sum' * adds}_{dtype}", "quantize/row_rms.cu", "apex4_row_rms", macros)


def all_configs(sm: int, dtype: str | None = None) -> list[QuantizeConfig]:
    """Every quantizer kernel of an architecture: of one input type, or of both."""
    dtypes: tuple[str, ...] = DTYPES if dtype is None else (dtype,)
    if sm < 80:
        dtypes = tuple(each for each in dtypes if each != "bfloat16")
    grouped = GROUPED_FORMATS.get(sm)
    return [
        *(() if grouped is None else _configs(grouped, dtypes)),
        *_token_configs(dtypes, sm),
        *(row_rms_config(each, adds) for each in dtypes for adds in (False, True)),
        row_scale_config(),
    ]


def _configs(format: str, dtypes: tuple[str, ...]) -> Iterator[QuantizeConfig]:
    for dtype in dtypes:
        for input in INPUTS:
            for hadamard in (False, True):
                for form in FORMS[input in NORMS :]:  # RMSNorm needs a whole row: never narrow
                    yield rows_config(form, input, hadamard, dtype, format)
            if input not in DENSE_INPUTS:
                continue
            for few_rows in (0, 1, 2) if input == "rms_norm" and format == "sm90" else (0, 1):
                yield dense_config(few_rows, input, dtype, format)
                for feedback in FEEDBACKS[1:]:
                    yield dense_config(few_rows, input, dtype, format, feedback=feedback)


def token_adds(sm: int) -> bool:
    """Whether quantize_whole_rows.cu adds on this architecture."""
    return sm >= 80


def _token_configs(dtypes: tuple[str, ...], sm: int) -> Iterator[QuantizeConfig]:
    sm_90 = sm == 90
    for dtype in dtypes:
        for input in INPUTS if token_adds(sm) else DENSE_INPUTS:
            for hadamard in (False, True):
                for form in WHOLE_FORMS[1:] if sm_90 else WHOLE_FORMS[1:3]:
                    if form != "stream" or input != "add_rms_norm":
                        yield whole_rows_config(form, input, hadamard, dtype)
            if input not in DENSE_INPUTS:
                continue
            for few_rows in (0, 1):
                codes = dense_config(few_rows, input, dtype, TOKEN_FORMAT, sm_90)
                yield from (codes, measuring_config(codes))


@lru_cache(maxsize=4096)
def choose_rows(
    m: int,
    k_blocks: int,
    blocks_per_group: int,
    *,
    input: str = "plain",
    hadamard: bool = True,
    dtype: str = "bfloat16",
    format: str = "sm80",
    sm_count: int = 132,
) -> QuantizePlan:
    """The launch of quantize_rows.cu for m rows of k_blocks blocks, groups of blocks_per_group blocks."""
    if m < 1 or k_blocks < 1 or blocks_per_group < 1 or k_blocks % blocks_per_group:
        raise ValueError(f"{m} rows of {k_blocks} blocks of {BLOCK} in groups of {blocks_per_group} blocks")
    whole_row = input in NORMS
    unit = k_blocks if whole_row else blocks_per_group  # blocks that a CTA must have together
    if unit > RESIDENT_SLICES:
        if unit > LONG_BLOCKS:
            raise UsageError(
                f"a group or a normalised row of {unit * BLOCK} input features is longer than the quantizer takes "
                f"({LONG_BLOCKS * BLOCK}): give a smaller group size"
            )
        form, rows, blocks, block = "long", 1, unit, LONG_THREADS
    else:
        form = "narrow" if unit == 1 and not whole_row else "resident"
        plenty = m * k_blocks >= 2 * sm_count * CTA_SLICES
        slices = max(unit, CTA_SLICES if plenty else SMALL_CTA_SLICES)
        rows = _power_of_two_up_to(min(m, CTA_ROWS, slices // unit))
        blocks = min(slices // rows // unit * unit, k_blocks)
        while not whole_row and blocks == k_blocks and 2 * rows * blocks <= slices and 2 * rows <= m:
            rows *= 2  # short rows: more of them
        if whole_row:
            rows = _power_of_two_up_to(min(m, slices // k_blocks))
        block = -(-rows * blocks * SLICE_LANES // WARP) * WARP
    tiles = -(-m // rows)
    grid = (-(-k_blocks // blocks), min(tiles, GRID_Y), -(-tiles // GRID_Y))
    config = rows_config(form, input, hadamard, dtype, format)
    return QuantizePlan(config, grid, block, rows_log2=rows.bit_length() - 1, blocks_per_cta=blocks)


@lru_cache(maxsize=4096)
def choose_whole_rows(
    m: int,
    k_blocks: int,
    *,
    input: str = "plain",
    hadamard: bool = True,
    aligned: bool = True,
    dtype: str = "bfloat16",
    sm_count: int = 132,
    sm_90: bool = False,
) -> QuantizePlan:
    """The launch of quantize_whole_rows.cu for m rows of k_blocks blocks, to the format s8."""
    if m < 1 or k_blocks < 1:
        raise ValueError(f"{m} rows of {k_blocks} blocks of {BLOCK}")

    def plan(form: str, grid: int, rows: int, blocks: int, shared_bytes: int = 0, cluster: int = 1) -> QuantizePlan:
        lanes = FEW_LANES if form in FEW_FORMS else WHOLE_LANES
        block = -(-rows * blocks * lanes // WARP) * WARP
        config = whole_rows_config(form, input, hadamard, dtype)
        block = min(block, WHOLE_LONG_THREADS) if form == "long" else block
        return QuantizePlan(
            config, (grid, 1, 1), block, shared_bytes, cluster, rows_log2=rows.bit_length() - 1, blocks_per_cta=blocks
        )

    if k_blocks > WHOLE_SLICES or not aligned:
        return plan("long", m, 1, k_blocks)
    if sm_90 and m <= FEW_TOKENS:
        ctas = min(CLUSTER_CTAS, _power_of_two_up_to(CLUSTER_GRID // m))
        if k_blocks >= CLUSTER_LEAST_BLOCKS and ctas >= (2 if k_blocks > FEW_SLICES else CLUSTER_LEAST_CTAS):
            return plan("cluster", m * ctas, 1, -(-k_blocks // ctas), cluster=ctas)
        if WHOLE_LEAST_SLICES <= k_blocks <= FEW_SLICES:
            return plan("few", m, 1, k_blocks)
    rows = 1
    while 2 * rows <= min(m, WHOLE_MOST_ROWS) and rows * k_blocks < WHOLE_LEAST_SLICES:
        rows *= 2
    tiles = -(-m // rows)
    resident = plan("resident", tiles, rows, k_blocks)
    if input == "add_rms_norm":
        return resident
    shared = 16 * STREAM_SLOTS[input] * resident.block
    ctas = sm_count * min(STREAM_THREADS[input] // resident.block, STREAM_SHARED_BYTES // (shared + 4096))
    # Where two CTAs fit a multiprocessor, one works while the other waits, which takes less time (docs/kernel_measurements.md).
    if sm_90 and ctas == sm_count and tiles >= 2 * ctas:
        return plan("stream", ctas, rows, k_blocks, shared_bytes=shared)
    return resident


def _power_of_two_up_to(limit: int) -> int:
    return 1 << max(limit, 1).bit_length() - 1


@lru_cache(maxsize=4096)
def choose_dense(
    m: int,
    k_blocks: int,
    *,
    input: str = "plain",
    aligned: bool = True,
    dtype: str = "bfloat16",
    format: str = "sm80",
    sm_count: int = 132,
    sm_90: bool = False,
    feedback: str = "",
) -> QuantizePlan:
    """The launch of quantize_dense.cu for m rows of k_blocks blocks. Unaligned rows: only the kernel for few rows reads them.

    To eight bits (format s8) of the kernel that makes codes; the one that measures has the same. `sm_90`: see `dense_config`.
    Of a sum (add_rms_norm) what comes after row_rms.cu: see `dense_adds`.
    """
    if m < 1 or k_blocks < 1:
        raise ValueError(f"{m} rows of {k_blocks} blocks of {BLOCK}")
    adds = input == "add_rms_norm"
    if adds:
        input = "rms_norm"
    runs = -(-m // DENSE_CTA_ROWS)
    slots = DENSE_CTAS_PER_SM * sm_count
    # With RMSNorm on Hopper thread blocks of the same rows wait for each other: all are there at the same time, one on a
    # multiprocessor.
    together = input == "rms_norm" and format == "sm90" and not feedback
    # To eight bits the kernel for few rows takes longer: with three quarters of the GPU busy it loses (docs/kernel_measurements.md, item 17).
    enough = 3 * sm_count // 4 if format == TOKEN_FORMAT and sm_90 else sm_count
    if not aligned or m <= FEW_ROWS or runs * k_blocks < enough or (together and k_blocks > sm_count):
        rows = FEW_ROWS
        if -(-m // rows) > GRID_Y:
            raise UsageError(
                f"{m} rows that do not start on 16 bytes are more than the quantizer takes: use fewer tokens"
            )
    elif together:
        tiles = -(-m // DENSE_SM90_TILE_ROWS)
        rows = DENSE_SM90_TILE_ROWS * -(-tiles // min(sm_count // k_blocks, tiles))
    else:

        def cost(passes: int) -> float:
            return -(-(-(-runs // passes) * k_blocks) // slots) * (passes + DENSE_MATRIX_COST)

        least = -(-runs // GRID_Y)
        rows = DENSE_CTA_ROWS * min(range(least, max(least, min(DENSE_MOST_PASSES, runs)) + 1), key=cost)
    grid = k_blocks, -(-m // rows), 1
    if input == "rms_norm" and format == "sm90" and not adds and rows == FEW_ROWS and _more_warps_sum(m, k_blocks):
        return QuantizePlan(
            dense_config(2, input, dtype, format, feedback=feedback), grid, FEWEST_THREADS, rows_per_cta=rows
        )
    eight_bit = format == TOKEN_FORMAT
    config = dense_config(int(rows == FEW_ROWS), input, dtype, format, sm_90, feedback)
    if config.source == "quantize/quantize_dense.cu" or eight_bit:
        few = rows == FEW_ROWS
        statistics = input == "rms_norm" and (m > OWN_RMS_ROWS or eight_bit or adds)
        threads, shared = DENSE_THREADS, 0
        if config.source != "quantize/quantize_dense.cu":
            threads, shared = DENSE_SM90["plain"][0], dense_sm90_shared_bytes(input, format)
        return QuantizePlan(
            config, grid, threads, shared,
            rows_per_cta=rows, needs_statistics=statistics, needs_row_scales=eight_bit and not few,
        )  # fmt: skip
    if adds:
        raise ValueError(f"the kernel for {m} rows of a norm works out sums of squares, not of rows")
    shared = dense_sm90_shared_bytes(input)
    return QuantizePlan(config, grid, DENSE_SM90[input][0], shared, rows_per_cta=rows, needs_board=together)


def dense_adds(m: int, k_blocks: int, *, aligned: bool, format: str, sm_count: int, feedback: str = "") -> bool:
    """Whether a dense transform of RMSNorm(x + residual) has row_rms.cu in front, which adds: not many rows on Hopper, of 4 bits,
    unless there is feedback."""
    if feedback:
        return True
    few = choose_dense(m, k_blocks, input="rms_norm", aligned=aligned, format=format, sm_count=sm_count)
    return format != "sm90" or few.rows_per_cta == FEW_ROWS


def _more_warps_sum(m: int, k_blocks: int) -> bool:
    """Where that is faster, measured on an H100 with K 2048 to 8192."""
    return m <= FEWEST_ROWS if k_blocks >= 64 else k_blocks >= 16 and 1 < m <= 4


@lru_cache(maxsize=4096)
def product_is_faster(m: int, k_blocks: int, *, input: str, aligned: bool, format: str, sm_count: int) -> bool:
    """Whether to multiply by the Hadamard matrix (choose_dense) rather than to add and subtract (choose_rows); groups of 128.

    Where many rows are normalised on Hopper: choose_rows' kernel then has too many instructions, and for long rows too few
    CTAs on a multiprocessor. The numbers are fitted to times of an H100, K 4096 to 16384.
    """
    measured = 32 <= k_blocks <= RESIDENT_SLICES
    if input != "rms_norm" or format != "sm90" or not aligned or not measured or k_blocks > sm_count:
        return False
    # Picoseconds for a row of a block: rows at the same time on a multiprocessor; CTAs of the other kernel on the GPU, each
    # of which takes as long as memory or as its own instructions.
    resident = max(1, RESIDENT_THREADS // (SLICE_LANES * k_blocks))
    ctas = sm_count // k_blocks * k_blocks
    saved = 135 + 110 / resident - max(122 + 0.42 * k_blocks, 16_200 / ctas)
    return m * k_blocks * saved > PRODUCT_START


@lru_cache(maxsize=4096)
def choose_row_rms(m: int, *, dtype: str = "bfloat16", adds: bool = False) -> QuantizePlan:
    return QuantizePlan(row_rms_config(dtype, adds), (m, 1, 1), 512 if adds else 256)


@cache
def row_scale_config() -> QuantizeConfig:
    macros = (("APEX4_INPUT", 0), ("APEX4_BF16", 0), ("APEX4_FORMAT", FORMATS[TOKEN_FORMAT]))
    return QuantizeConfig("row_scale_s8", "quantize/row_scale.cu", "apex4_row_scale", macros)


@lru_cache(maxsize=4096)
def choose_row_scales(m: int) -> QuantizePlan:
    """The launch of row_scale.cu."""
    return QuantizePlan(row_scale_config(), (-(-m // WARP), 1, 1), 256)


@cache
def fragment_order() -> NDArray[np.int64]:
    """int64 [16384]: which element (row * 128 + column) of a block's matrix stands where in its prepacked form."""
    import numpy as np  # not for `apex4 kernels list`

    column_in, column_out = index_function("dense_input"), index_function("dense_output")
    byte = index_function("dense_fragment_byte")
    order = np.full(BLOCK * BLOCK, -1)
    pair, tile, lane, odd, half, e = np.ix_(*(np.arange(size) for size in (4, 16, 32, 2, 2, 2)))
    # mma.m16n8k16: register `half` of B holds k = 2 q + 8 half and the next one of column n = lane / 4.
    k, n = 2 * (lane & 3) + 8 * half + e, lane >> 2
    where = byte(pair, tile, lane) // 2 + 4 * odd + 2 * half + e
    order[where] = column_in(2 * pair + odd, k) * BLOCK + column_out(tile, n)
    return order


@cache
def feedback_order() -> NDArray[np.int64]:
    """int64 [7168]: which element of G (row * 128 + column, both in step order) stands where in its prepacked form."""
    import numpy as np

    column_out, byte = index_function("dense_output"), index_function("feedback_fragment_byte")
    column = np.arange(BLOCK)
    place = np.empty(BLOCK, dtype=np.int64)  # of a column in step order
    place[np.argsort(column // 4 % FEEDBACK_STEPS * BLOCK + column)] = column
    order = np.full(FEEDBACK_ROWS * BLOCK, -1)
    lane, odd, half, e = np.ix_(*(np.arange(size) for size in (WARP, 2, 2, 2)))
    for step in range(1, FEEDBACK_STEPS):
        for pair in range(step):
            # As in `fragment_order`; k counts the columns of tiles 2 step and 2 step + 1.
            row = place[column_out(2 * step + half, 2 * (lane & 3) + e)]
            where = byte(step, pair, lane) // 2 + 4 * odd + 2 * half + e
            order[where] = row * BLOCK + place[column_out(2 * pair + odd, lane >> 2)]
    return order


def prepack_matrix(matrix: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """T [KB, 128, 128], T with feedback [KB, 184, 128] or with clip ratios too [KB, 185, 128], as the checkpoint has it ->
    [KB, 16384], [KB, 23552] or [KB, 23680] as quantize_dense.cu reads it, of `dtype` (that of x)."""
    import torch

    from ...format.feedback import block_clips_of, clip_row, feedback_of, transform_of

    packed = _ordered(transform_of(matrix), fragment_order())
    feedback = feedback_of(matrix)
    if feedback is not None:
        packed = torch.cat((packed, prepack_feedback(feedback)), 1)
    clips = block_clips_of(matrix)
    if clips is not None:
        packed = torch.cat((packed, clip_row(clips).flatten(1)), 1)
    return packed.to(dtype or matrix.dtype).contiguous()


def prepack_feedback(feedback: torch.Tensor) -> torch.Tensor:
    """G [KB, 128, 128] in step order -> [KB, 7168] as kernels read it."""
    return _ordered(feedback, feedback_order())


def _ordered(matrices: torch.Tensor, order: NDArray[np.int64]) -> torch.Tensor:
    import torch

    return matrices.flatten(1).index_select(1, torch.from_numpy(order).to(matrices.device))
