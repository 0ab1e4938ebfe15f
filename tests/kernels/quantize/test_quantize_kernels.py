"""The quantizer kernels without a GPU: compiled for every architecture, their machine code looked at, and their own source
run on a CPU against the float64 reference (tests/cuda_on_cpu)."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apex4_quant.format.feedback import clip_row, feedback_of, step_order
from apex4_quant.kernels import reference
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.quantize import configs as quantize_configs
from apex4_quant.kernels.quantize.configs import (
    FEEDBACKS,
    INPUTS,
    all_configs,
    board_bytes,
    choose_row_rms,
    dense_config,
    feedback_order,
    fragment_order,
    prepack_matrix,
    rows_config,
    whole_rows_config,
)
from apex4_quant.kernels.runtime import launcher

from ... import cuda_on_cpu
from ...kernel_cases import quantize as kernel_cases
from ..conftest import compiled

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


Case = kernel_cases.Case

# ---- index functions ------------------------------------------------------------------------------------------------


def test_octets_of_a_row_fill_it() -> None:
    for format, row_bytes, octet_bytes in (("sm80", 64, 4), ("sm90", 128, 8)):
        octet, chunk = index_function(f"{format}_octet_byte"), index_function(f"{format}_activation_byte")
        for row in range(9):
            starts = [chunk(row, i) + byte for i in range(row_bytes // 16) for byte in range(0, 16, octet_bytes)]
            assert [octet(row, k) for k in range(0, 128, 8)] == starts
            assert all(octet(row, k) ^ row_bytes // 2 == octet(row, k + 64) for k in range(0, 64, 8))
        assert sorted(index_function(f"{format}_octet_nibble")(e) for e in range(8)) == list(range(8))


def test_lanes_of_a_slice_cover_the_block() -> None:
    assert [index_function("rows_column")(lane) for lane in range(8)] == list(range(0, 128, 16))
    transformed = index_function("rows_transformed_column")
    assert [transformed(lane, half) for half in range(2) for lane in range(8)] == list(range(0, 128, 8))


def test_lanes_of_a_whole_row_cover_its_blocks() -> None:
    lane, part = np.arange(32)[:, None], np.arange(2)
    for slices, columns in (
        (index_function("whole_slice")(lane) + 0 * part, index_function("whole_column")(lane, part)),
        (
            index_function("whole_transformed_slice")(lane, part),
            index_function("whole_transformed_column")(lane) + 0 * part,
        ),
    ):
        assert sorted((slices * 128 + columns).flatten()) == list(range(0, 8 * 128, 16))


def test_eight_lanes_of_a_whole_row_cover_its_blocks() -> None:
    fn, lane, part = index_function, np.arange(32)[:, None], np.arange(2)
    columns = fn("few_slice")(lane) * 128 + fn("few_column")(lane, part)
    assert sorted(columns.flatten()) == list(range(0, 4 * 128, 8))
    assert sorted((fn("few_slice")(lane) * 128 + fn("rows_column")(lane)).flatten()) == list(range(0, 4 * 128, 16))
    after = fn("few_transformed_slice")(lane) * 128 + fn("whole_transformed_column")(lane)
    assert sorted(after.flatten()) == list(range(0, 4 * 128, 16))


def test_lanes_read_what_others_have_copied() -> None:
    """quantize_whole_rows, STREAM: columns and slots of copies and reads agree, and eight lanes read all banks at a time."""
    fn, lane, copied = index_function, np.arange(32), {}
    for copy in range(4):
        slots = fn("whole_copy_slot")(lane, copy)
        assert sorted(slots) == list(range(32))
        slice_, column = fn("whole_slice")(lane), fn("whole_copy_column")(lane, copy)
        copied.update({(copy, slot): place for slot, *place in zip(slots, slice_, column, strict=True)})
    for part, octet in np.ndindex(2, 2):
        copies, slots = fn("whole_read_copy")(lane, part), fn("whole_read_slot")(lane, octet)
        wanted = np.stack((fn("whole_slice")(lane), fn("whole_column")(lane, part) + 8 * octet), 1)
        assert [copied[place] for place in zip(copies, slots, strict=True)] == wanted.tolist()
        assert all(len(set(slots[first : first + 8] % 8)) == 8 for first in range(0, 32, 8))


def test_product_and_additions_are_the_hadamard_matrix() -> None:
    """quantize_whole_rows in NumPy: A's signs over four bits of the column, mma by the PTX tables, additions over three bits."""
    rng = np.random.default_rng(0)
    fn = index_function
    k_in, m_out = fn("whole_product_input")(np.arange(16)), fn("whole_product_output")(np.arange(16))
    signs = 1 - 2 * (np.bitwise_count(m_out[:, None] & k_in) & 1).astype(int)
    lane = np.arange(32)
    g, q = lane >> 2, lane & 3
    for lanes, kind in ((4, "whole"), (8, "few")):
        words, slices = 32 // lanes, 32 // lanes
        x = rng.integers(-9, 10, (slices, 128))
        y = np.zeros((slices, 128), int)
        d = np.zeros((32, words, 2, 2), int)  # lane, word, row half, n's lowest bit
        for word in range(words):
            b = np.zeros((16, 8), int)
            for part, odd in np.ndindex(2, 2):
                b[2 * q + 8 * part + odd, g] = x[
                    fn(f"{kind}_slice")(lane), fn(f"{kind}_column")(lane, part) + 2 * word + odd
                ]
            product = signs @ b
            for half, e in np.ndindex(2, 2):
                d[:, word, half, e] = product[g + 8 * half, 2 * q + e]
        for bit in (1, 2, 4)[: words.bit_length() - 1]:
            for word in range(words):
                if not word & bit:
                    d[:, word], d[:, word | bit] = d[:, word] + d[:, word | bit], d[:, word] - d[:, word | bit]
        if lanes == 8:  # of bit 3
            d = np.stack((d.sum(-1), d[..., 0] - d[..., 1]), -1)
        for e, word, odd in np.ndindex(2, words, 2):
            column = fn("whole_transformed_column")(lane) + 2 * word + odd
            if lanes == 4:
                y[fn("whole_transformed_slice")(lane, e), column] = d[:, word, odd, e]
            else:
                y[fn("few_transformed_slice")(lane), column + 8 * e] = d[:, word, odd, e]
        hadamard = 1 - 2 * (np.bitwise_count(np.arange(128)[:, None] & np.arange(128)) & 1).astype(int)
        assert (y == x @ hadamard).all()


def test_prepacked_order_is_a_permutation() -> None:
    assert sorted(fragment_order()) == list(range(128 * 128))
    matrix = torch.randn(3, 128, 128).half()
    packed = prepack_matrix(matrix, torch.bfloat16)
    assert packed.shape == (3, 16384) and packed.dtype == torch.bfloat16 and packed.is_contiguous()
    assert torch.equal(packed[1, :8], matrix[1].flatten()[torch.from_numpy(fragment_order()[:8])].bfloat16())


def test_feedback_lies_behind_the_matrix() -> None:
    """In the order of fragments: 16 columns whose errors are known, to 8 columns that are left, as mma.m16n8k16 reads B."""
    order = feedback_order()
    places = torch.arange(128) // 16
    below = (places[:, None] > places[None, :]).flatten().nonzero().flatten()
    assert sorted(order) == below.tolist()
    fn, of_step = index_function, step_order().numpy()
    lane, e = np.arange(32)[:, None], np.arange(2)
    for step, tile in ((1, 0), (5, 7), (7, 13)):
        for half in (0, 1):
            where = fn("feedback_fragment_byte")(step, tile >> 1, lane) // 2 + 4 * (tile & 1) + 2 * half + e
            row, column = np.divmod(order[where], 128)
            assert (of_step[row] == fn("dense_output")(2 * step + half, 2 * (lane & 3) + e)).all()
            assert (of_step[column] == fn("dense_output")(tile, lane >> 2)).all()
    matrix = torch.randn(2, 184, 128).half()
    packed = prepack_matrix(matrix)
    assert packed.shape == (2, 16384 + 7168) and torch.equal(packed[:, :16384], prepack_matrix(matrix[:, :128]))
    feedback = feedback_of(matrix)
    assert torch.equal(packed[1, 16384:], feedback[1].flatten()[torch.from_numpy(order)])
    with_clips = torch.cat((matrix, clip_row(torch.tensor([1.25, 0.75]).half())), 1)
    assert torch.equal(prepack_matrix(with_clips)[:, :-128], packed)
    assert [row.tolist() for row in prepack_matrix(with_clips)[:, -128:]] == [[1.25] + [0] * 127, [0.75] + [0] * 127]


def test_renamed_mma_is_the_product() -> None:
    """quantize_dense in NumPy, lane by lane: words loaded, fragments by the PTX tables, columns a lane ends with."""
    rng = np.random.default_rng(0)
    x, matrix = rng.integers(-9, 10, (16, 128)), rng.integers(-9, 10, (128, 128))
    packed = matrix.reshape(-1)[fragment_order()]
    fn = index_function
    lane, r, q = np.arange(32), np.arange(32) >> 2, np.arange(32) & 3
    y = np.zeros((16, 128), int)
    for tile in range(16):
        total = np.zeros((16, 8), int)
        for step in range(8):
            a, b = np.zeros((16, 16), int), np.zeros((16, 8), int)
            start = fn("dense_fragment_byte")(step >> 1, tile, lane) // 2 + 4 * (step & 1)
            for i, p in np.ndindex(2, 2):  # register half, element of the pair
                word = fn("dense_piece_word")(step, i)
                column = fn("dense_piece_column")(step >> 1, lane) + 2 * word + p
                k = 2 * q + 8 * i + p
                assert (column == fn("dense_input")(step, k)).all()
                for rows in (r, r + 8):
                    a[rows, k] = x[rows, column]
                b[k, r] = packed[start + 2 * i + p]
            total += a @ b
        n = 2 * q[:, None] + np.arange(2)
        for rows in (r, r + 8):
            y[rows[:, None], fn("dense_output")(tile, n)] = total[rows[:, None], n]
    assert (y == x @ matrix).all()
    first = fn("dense_output")(np.arange(16)[:, None], 2 * q[:4][None])  # a lane's columns are consecutive
    assert (first == 32 * q[:4] + 2 * np.arange(16)[:, None]).all()


def test_core_matrices_are_those_of_wgmma() -> None:
    """K-major, without swizzle: eight columns by 16 bytes along k stand together, at the strides of the descriptor."""
    word = index_function("dense_core_word")
    step, k, n = np.ix_(np.arange(8), np.arange(16), np.arange(128))
    lane = 4 * (n & 7) + (k >> 1 & 3)  # which has k and n in its B register k >> 3 of tile n >> 3
    byte = 4 * word(step, n >> 3, k >> 3, lane) + 2 * (k & 1)
    k_stride, n_stride = 4 * word(0, 0, 1, 0), 4 * word(0, 1, 0, 0)
    at = 4 * word(step, 0, 0, 0) + k_stride * (k >> 3) + n_stride * (n >> 3) + 16 * (n & 7) + 2 * (k & 7)
    assert (byte == at).all() and sorted(byte.flatten()) == list(range(0, 2 * 128 * 128, 2))


# ---- the correctly rounded quotient ---------------------------------------------------------------------------------


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma of float32s with one rounding. The product is exact in float64; a sum that would be rounded twice is repaired."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    at_middle = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    total = np.where(at_middle & (lost != 0), np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)
    return total.astype(np.float32)


def quotient_codes_differ(mantissas: np.ndarray, largest: int = 7) -> int:
    """For scales of these mantissas and every float32 next to a tie of codes up to `largest`: how often the code of ExactQuotient,
    or ExactCode, is not rint(t / s)."""
    scale = (0x3F800000 | mantissas).astype(np.uint32).view(np.float32)
    reciprocal = (np.float32(1) / scale).astype(np.float32)
    wrong = 0
    for tie in np.arange(0.5, largest, dtype=np.float32):
        nearest = (tie * scale.astype(np.float64)).astype(np.float32)
        for step in range(-3, 4):
            t = (nearest.view(np.int32) + step).view(np.float32)
            q0 = t * reciprocal
            q1 = fused(fused(-q0, scale, t), reciprocal, q0)
            wrong += int((np.rint(q1) != np.rint(t / scale)).sum())
    return wrong


def test_one_correction_makes_the_quotient_round_as_a_division_does() -> None:
    rng = np.random.default_rng(0)
    ends = np.concatenate([np.arange(2048), 2**23 - 1 - np.arange(2048)])
    assert quotient_codes_differ(np.concatenate([ends, rng.integers(0, 2**23, 60_000)])) == 0
    assert quotient_codes_differ(np.concatenate([ends, rng.integers(0, 2**23, 4_000)]), 127) == 0


def test_the_scale_of_a_token_is_a_correctly_rounded_division() -> None:
    """`token_scale_of`, of every mantissa: float32(absmax / 127)."""
    absmax = (np.arange(2**23) | 0x3F800000).astype(np.uint32).view(np.float32)
    reciprocal, code_max = np.float32(1) / np.float32(127), np.float32(127)
    near = absmax * reciprocal
    quotient = fused(
        fused(-near, np.broadcast_to(code_max, near.shape), absmax), np.broadcast_to(reciprocal, near.shape), near
    )
    assert (quotient == absmax / code_max).all()


# ---- machine code ---------------------------------------------------------------------------------------------------


THREADS_AND_CTAS = {
    "narrow": (256, 6),
    "resident": (1024, 1),
    "long": (512, 1),
    "many": (128, 2),
    "few": (128, 2),
    "fewest": (256, 1),
}


@pytest.mark.parametrize("sm", [75, 80, 86, 89, 90, 100, 120])
def test_every_kernel_compiles_without_a_word_and_without_spills(sm: int) -> None:
    configs = all_configs(sm)
    assert len({config.name for config in configs}) == len(configs)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda config: compiled(config, sm), configs))
    for config, result in zip(configs, results, strict=True):
        assert result.warnings == "", config.name
        resources = result.resources
        if sm < 100:  # later ones have no kernel of their own
            assert resources.spill_store_bytes == resources.spill_load_bytes == resources.stack_bytes == 0, config.name
        assert resources.spill_store_bytes <= 32, config.name
        # CTAs that are to share an SM's 65,536 registers
        threads, ctas = THREADS_AND_CTAS.get(config.name.split("_")[2], (256, 4))
        if config.source == "quantize/quantize_dense_sm90.cu":
            threads, ctas = (512, 1) if "rms_norm" in config.name and "s8" not in config.name else (256, 2)
        if config.source == "quantize/quantize_whole_rows.cu":
            threads, ctas = {"long": (512, 1), "stream": (896, 1), "few": (1024, 1), "cluster": (1024, 1)}.get(
                config.name.split("_")[3], (896 if sm < 90 or "add_rms_norm" in config.name else 1024, 1)
            )
        ctas -= "stream_rms_norm_none" in config.name
        assert -(-resources.registers // 8) * 8 * threads * ctas <= 65536, config.name


def opcodes(cubin: bytes, folder: Path) -> Counter[str]:
    packages = importlib.util.find_spec("nvidia")
    folders = [Path(root) / "cu13" / "bin" for root in (packages.submodule_search_locations or ())] if packages else []
    tool = next((str(each / "nvdisasm") for each in folders if (each / "nvdisasm").is_file()), shutil.which("nvdisasm"))
    if tool is None:
        pytest.skip("nvdisasm is not installed")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool, "-c", str(path)], check=True, capture_output=True, text=True).stdout
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text))


@pytest.mark.parametrize(
    ("sm", "format", "store"), [(80, "sm80", "STG.E"), (86, "sm80", "STG.E"), (90, "sm90", "STG.E.64")]
)
def test_machine_code_of_the_row_quantizer(sm: int, format: str, store: str, tmp_path: Path) -> None:
    counts = opcodes(compiled(rows_config("narrow", "plain", True, "bfloat16", format), sm).cubin, tmp_path)
    assert counts["LDG.E.128"] == 2  # sixteen columns
    assert counts["STG.E"] + counts["STG.E.64"] == 3 and counts[store] >= 2  # two octets of codes and the scale
    assert counts["SHFL.BFLY"] == 3 * 8 + 3  # halves swapped three times, then the largest
    assert counts["FADD"] + counts["FFMA"] >= 7 * 16
    assert counts["FFMA.SAT"] == 16
    assert not any(name.startswith(("LDL", "STL", "BAR", "F2I", "I2F")) for name in counts)


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_machine_code_of_the_whole_row_quantizer(sm: int, tmp_path: Path) -> None:
    counts = opcodes(compiled(whole_rows_config("resident", "plain", True, "bfloat16"), sm).cubin, tmp_path)
    assert sum(count for name, count in counts.items() if name.startswith("HMMA.16816.F32")) == 8
    assert counts["LDG.E.128"] == 4 and counts["STG.E.128"] == 2
    assert (
        counts["SHFL.BFLY"] == 2 * 3 + 5
    )  # of the two slices' largest values; and of the row's: none in the transform
    assert counts["FADD"] <= 3 * 32 + 4 and counts["PRMT"] >= 2 * 12
    assert not any(name.startswith(("LDL", "STL", "F2I", "I2F")) for name in counts)


@pytest.mark.parametrize(("sm", "format"), [(80, "sm80"), (86, "sm80"), (89, "sm80"), (90, "sm90")])
def test_machine_code_of_the_dense_quantizer(sm: int, format: str, tmp_path: Path) -> None:
    def hmma(counts: Counter[str]) -> int:
        return sum(count for name, count in counts.items() if name.startswith("HMMA.16816.F32"))

    many = opcodes(compiled(dense_config(False, "plain", "bfloat16", format), sm).cubin, tmp_path)
    copies = sum(count for name, count in many.items() if name.startswith("LDGSTS"))
    if format == "sm80":
        assert hmma(many) == 2 * 16 * 8  # row tiles, column tiles, steps
        assert many["LDS.128"] == 16 * 4  # a fragment is read once for two products of each of two row tiles
        assert many["LDG.E.128"] == 2 * 16  # the first rows and the next ones
        assert many["STG.E.128"] == 4
        assert copies == 16
    else:
        assert hmma(many) == 0 and many["HGMMA.64x128x16.F32.BF16"] == 8
        assert many["LDS.128"] == 8 and copies == 3 * 8  # two rows; for two stages, and again in the loop
        assert many["LDG.E.128"] == 8  # the matrix
        assert many["STG.E.128"] == 4
        assert many["WARPGROUP.ARRIVE"] == 1  # no product waits for the one before
    few = opcodes(compiled(dense_config(True, "plain", "bfloat16", format), sm).cubin, tmp_path)
    assert hmma(few) == 4 * 8
    feedback = [
        opcodes(compiled(dense_config(rows, "plain", "bfloat16", format, feedback=kind), sm).cubin, tmp_path)
        for kind in FEEDBACKS[1:]
        for rows in (0, 1)
    ]
    assert [hmma(counts) for counts in feedback] == [2 * (16 * 8 + 56), 4 * 8 + 4 * 2 + 3 * 8] * 2
    for counts in (many, few, *feedback):
        assert not any(name.startswith(("LDL", "STL", "F2I", "I2F")) for name in counts)


# ---- the kernels' own source on a CPU -------------------------------------------------------------------------------


def variants(base: Any) -> list[Any]:
    few = replace(base, m=5, k=200)
    return [
        few,
        replace(base, m=20, k=600, clip=1.0 if base.format == "s8" or base.transform == "feedback16" else 0.9, seed=1),
        replace(base, m=37, k=333, seed=2),
        replace(base, m=1, k=128, seed=3),
        replace(few, padding=24),
        replace(few, padding=8, offset=1),
        *(replace(few, data=data, seed=4) for data in ("extreme", "zero", "nan", "infinity", "ties")),
    ]


ROWS_80 = Case(1, 1, format="sm80", dtype="bfloat16")
ROWS_90 = Case(1, 1, format="sm90", dtype="float16")
ROWS_S8 = Case(1, 1, group="channel", format="s8", dtype="bfloat16")
FEW_S8 = replace(ROWS_S8, m=2, k=2144, sm_90=True)
DENSE_S8 = replace(ROWS_S8, transform="dense")
DENSE_S8_90 = replace(DENSE_S8, m=300, k=1000, sm_90=True)
DENSE_80, DENSE_90 = replace(ROWS_80, transform="dense"), replace(ROWS_90, transform="dense")
FEEDBACK_80, FEEDBACK_90 = replace(ROWS_80, transform="feedback"), replace(ROWS_90, transform="feedback")
SIXTEEN_80, SIXTEEN_90 = replace(ROWS_80, transform="feedback16"), replace(ROWS_90, transform="feedback16")
FAMILIES: dict[str, list[Any]] = {
    "hadamard, sm80": variants(ROWS_80),
    "hadamard, sm90": variants(ROWS_90),
    "none, sm80": variants(replace(ROWS_80, transform="none")),
    "none, sm90": variants(replace(ROWS_90, transform="none")),
    "groups": [replace(ROWS_80, m=9, k=1100, group=384), replace(ROWS_80, m=3, k=2000, group="channel", data="nan")],
    "silu": variants(replace(ROWS_90, input="silu_mul")),
    "silu, groups": [replace(ROWS_80, input="silu_mul", m=9, k=1100, group=256, seed=5)],
    "rms": [*variants(replace(ROWS_80, input="rms_norm")), replace(ROWS_80, input="rms_norm", m=11, k=1400, group="channel")],
    "rms, none": [replace(ROWS_90, input="rms_norm", transform="none", m=6, k=900, gain_offset=offset) for offset in (False, True)],
    "add, rms": [
        *variants(replace(ROWS_90, input="add_rms_norm")),
        replace(ROWS_80, input="add_rms_norm", m=11, k=1400, group="channel", gain_offset=True),
    ],
    "long, add, rms": [replace(ROWS_90, m=2, k=17000, group=group, input="add_rms_norm") for group in (128, "channel")],
    "long": [replace(ROWS_80, m=2, k=17000, group="channel"), replace(ROWS_80, m=2, k=16520, group="channel", data="infinity")],
    "long, rms": [replace(ROWS_90, m=2, k=17000, group=group, input="rms_norm") for group in (128, "channel")],
    "dense, few rows": [*variants(DENSE_80), replace(DENSE_80, shared_matrix=True, m=3, k=256)],
    "dense, many rows": [replace(DENSE_90, m=150, k=640), replace(DENSE_90, m=300, k=1000), replace(DENSE_90, m=150, k=640, data="nan")],
    "dense, many rows, sm80": [replace(DENSE_80, m=161, k=520, clip=0.9), replace(DENSE_80, m=161, k=520, input="add_rms_norm", sm_90=True)],
    "dense, rms, more warps": [
        *(replace(DENSE_90, m=m, k=8104, input="rms_norm", gain_offset=m > 4, seed=m) for m in (1, 2, 3, 5, 8)),
        replace(DENSE_90, m=3, k=4098, input="rms_norm", padding=1, dtype="bfloat16"),
    ],
    "dense, rms": [replace(DENSE_90, m=m, k=520, input="rms_norm", gain_offset=m > 16) for m in (7, 140)],
    "dense, rms on a board": [
        *(replace(DENSE_90, m=m, k=504, input="rms_norm", gain_offset=m > 200, dtype=dtype)
          for m, dtype in ((140, "float16"), (321, "bfloat16"))),
        replace(DENSE_90, m=700, k=128, input="rms_norm", data="nan"),
        replace(DENSE_90, m=400, k=2504, input="rms_norm", shared_matrix=True),
    ],
    "eight bits": variants(ROWS_S8),
    "eight bits, none": variants(replace(ROWS_S8, transform="none", dtype="float16")),
    "eight bits, silu": variants(replace(ROWS_S8, input="silu_mul", dtype="float16")),
    "eight bits, rms": [*variants(replace(ROWS_S8, input="rms_norm")), replace(ROWS_S8, input="rms_norm", m=3, k=4096, gain_offset=True)],
    "eight bits, add, rms": [
        *variants(replace(ROWS_S8, input="add_rms_norm")),
        replace(ROWS_S8, input="add_rms_norm", transform="none", m=40, k=4096, gain_offset=True, dtype="float16", sm_90=True),
    ],
    "eight bits, few rows": [
        *(replace(ROWS_S8, m=m, k=k, input=input, transform=transform, dtype=dtype, gain_offset=m == 1, sm_90=True, seed=m)
          for m, k, transform, dtype in ((1, 2048, "hadamard", "bfloat16"), (3, 4000, "none", "float16")) for input in INPUTS),
        *(replace(ROWS_S8, m=2, k=2144, transform=transform, dtype=dtype, sm_90=True, data=data)
          for data in ("extreme", "zero", "nan", "infinity", "ties")
          for transform, dtype in (("hadamard", "bfloat16"), ("none", "float16"))),
        replace(ROWS_S8, m=2, k=11008, input="silu_mul", padding=8, sm_90=True),
    ],
    "eight bits, long": [replace(ROWS_S8, m=2, k=29000, input=input) for input in INPUTS],
    "eight bits, many rows": [
        *(replace(ROWS_S8, m=65, k=k, input=input, sm_90=True, data=data)
          for k, input, data in ((16520, "plain", "normal"), (16640, "rms_norm", "nan"), (18000, "silu_mul", "normal"))),
        replace(ROWS_S8, m=65, k=16512, input="rms_norm", transform="none", dtype="float16", gain_offset=True, padding=8, sm_90=True),
    ],
    "eight bits, dense": [
        *variants(DENSE_S8), replace(DENSE_S8, m=3, k=1504, shared_matrix=True),
        *(replace(DENSE_S8, m=m, k=520, input=input) for m in (4, 7, 140) for input in INPUTS[1:]),
        *(replace(DENSE_S8, m=150, k=640, data=data) for data in ("normal", "nan")),
    ],
    "eight bits, dense, sm90": [replace(DENSE_S8, m=300, k=1000, input=input, gain_offset=True, sm_90=True) for input in INPUTS],
    "dense, add, rms": [
        *variants(replace(DENSE_90, input="add_rms_norm")), *(replace(DENSE_90, m=m, k=8104, input="add_rms_norm") for m in (1, 8)),
        *(replace(DENSE_80, m=m, k=520, input="add_rms_norm", gain_offset=True) for m in (3, 140)),
    ],
    "feedback, few rows": [*variants(FEEDBACK_80), *variants(FEEDBACK_90)],
    "feedback, many rows": [replace(FEEDBACK_80, m=161, k=520, clip=0.9), *(replace(FEEDBACK_90, m=150, k=640, data=data) for data in ("normal", "nan"))],
    "sixteen levels, few rows": [*variants(SIXTEEN_80), *variants(SIXTEEN_90)],
    "sixteen levels, many rows": [
        replace(base, m=m, k=k, data=data) for base, m, k in ((SIXTEEN_80, 161, 520), (SIXTEEN_90, 150, 640)) for data in ("normal", "nan", "ties")
    ],
    "sixteen levels, fused": [
        *(replace(base, m=m, k=520, input=input, gain_offset=m > 16) for base in (SIXTEEN_80, SIXTEEN_90) for m in (7, 140)
          for input in INPUTS[1:]),
        replace(SIXTEEN_90, m=3, k=8104, input="rms_norm"),
    ],
    "feedback, fused": [
        *(replace(base, m=m, k=520, input=input, gain_offset=m > 16) for base in (FEEDBACK_80, FEEDBACK_90) for m in (7, 140)
          for input in INPUTS[1:]),
        replace(FEEDBACK_90, m=3, k=8104, input="rms_norm"),
    ],
    "dense, silu": [replace(DENSE_80, m=m, k=520, input="silu_mul") for m in (7, 140)],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_equal_the_reference(family: str, cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    for case in FAMILIES[family]:
        assert kernel_cases.check(case, CPU) == [], case


def test_a_board_serves_one_launch_after_the_other(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is posted on it is, bit for bit, what row_rms.cu works out; what was posted before is not taken for it.

    On a CPU one CTA runs after the other: all but the last find rows that nobody has posted, and work them out themselves.
    """
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    board, k = torch.zeros(board_bytes(1100) // 8, dtype=torch.int64), 248
    for launch, m in enumerate((1100, 500, 640), 1):
        case = replace(DENSE_90, m=m, k=k, input="rms_norm", seed=launch)
        monkeypatch.setattr(kernel_cases, "board", lambda m, device: board)
        assert kernel_cases.check(case, CPU) == [], case
        assert board[:2].view(torch.int32).tolist() == [launch, 0, 0, 0]
        posts = board[2 : 2 + m].view(torch.int32).unflatten(0, (m, 2))
        assert (posts[:, 1] == launch).all()
        x, expected = kernel_cases.make_operands(case, CPU).x, torch.empty(m)
        plan = choose_row_rms(m, dtype=case.dtype)
        kernel = cpu_launcher.kernel(plan.config.source, plan.config.entry, plan.config.defines, 0)
        numbers = (*map(ctypes.c_int, (m, k, x.stride(0))), ctypes.c_float(kernel_cases.EPS), ctypes.c_int(1))
        kernel.bind(plan.grid, plan.block, 2, numbers)(0, expected.data_ptr(), x.data_ptr())
        assert torch.equal(posts[:, 0].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_the_check_expects_what_the_reference_says(
    transform: str, monkeypatch: pytest.MonkeyPatch, cpu_launcher: Any
) -> None:
    """kernel_cases/quantize.py computes its expectation itself, with bounds: here the project's reference has the last word."""
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    case = replace(ROWS_80, m=33, k=512, transform=transform, clip=0.9, seed=9)
    operands = kernel_cases.make_operands(case, CPU)
    stored, scales, wrong = kernel_cases.run(case, operands)
    codes, expected_scales = reference.quantize_activation(operands.x, 128, clip=0.9, hadamard=transform == "hadamard")
    assert wrong == []
    torch.testing.assert_close(scales[:, :33].t().double(), expected_scales, rtol=1e-6, atol=0)
    difference = (kernel_cases.decode(stored, 33, "sm80") - codes).abs()
    assert int(difference.max()) <= 1 and float((difference > 0).double().mean()) < 1e-3


OCTET_OF_LANE = "dense_output(WARP_TILES * warp, 2 * (lane & 3));  // the first of this lane's eight"

MUTATIONS: dict[str, tuple[tuple[str, str, str], Any]] = {
    "chunk order": (("index.cuh", "(k >> 1 ^ 16 * (row >> 1 & 3))", "(k >> 1 ^ 16 * (row & 3))"), ROWS_80),
    "factor": (("quantize_slice.cuh", "0.08838834764831845f", "0.0883885f"), ROWS_80),
    "clamp": (("quantize.cuh", "fmaxf(q1, -7.0f)", "fmaxf(q1, -8.0f)"), replace(ROWS_80, transform="none")),
    "floor": (("quantize.cuh", "0x1p-100f", "0x1p-101f"), replace(ROWS_80, data="zero")),
    "negative code": (("quantize.cuh", "one * 7u", "one * 3u"), replace(ROWS_90, transform="none")),
    "nibble": (("index.cuh", "2 * (element & 3) + (element >> 2)", "element"), ROWS_90),
    "shuffle": (("quantize_slice.cuh", "lane & bit ? -1.0f : 1.0f", "lane & bit ? 1.0f : -1.0f"), ROWS_80),
    "sign": (("quantize_slice.cuh", "if (lane & 4) quantized", "if (lane & 2) quantized"), ROWS_90),
    "moved columns": (("index.cuh", "8 * (lane & 7) + 64 * half", "16 * (lane & 7) + 8 * half"), ROWS_90),
    "tie": (("quantize.cuh", "fmaf(fmaf(-q0, scale, t), reciprocal, q0)", "q0"), replace(ROWS_90, transform="none", data="ties", m=128)),
    "mma word": (("index.cuh", "2 * (step & 1) + half)", "(step & 1) + 2 * half)"), DENSE_80),
    "warp's columns": (("quantize_dense.cu", f"{OCTET_OF_LANE}\n    unsigned char*", f"{OCTET_OF_LANE}\n    unsigned char*".replace("WARP_TILES * ", "")),
                       replace(DENSE_80, m=16)),
    "warp's columns, eight bits": (("quantize_dense.cu", f"{OCTET_OF_LANE}\n    *reinterpret", f"{OCTET_OF_LANE}\n    *reinterpret".replace("WARP_TILES * ", "")),
                                   replace(DENSE_S8, m=16)),
    "passes": (("quantize_dense.cu", "first += CTA_ROWS)", "first += 2 * CTA_ROWS)"), replace(DENSE_80, m=300, k=1000)),
    "passes, sm90": (("quantize_dense_sm90.cu", "first += STEP_ROWS", "first += 2 * STEP_ROWS"), replace(DENSE_90, m=300, k=1000)),
    "passes backwards": (("quantize_dense_sm90.cu", "BACKWARDS ? from >= start", "BACKWARDS ? from > start"), DENSE_S8_90),
    "the last pass": (("quantize_dense_sm90.cu", "(end - start - 1) / PASS_ROWS * PASS_ROWS", "0"), DENSE_S8_90),
    "core matrix": (("quantize_dense_sm90.cu", "= b.z,", "= b.x,"), replace(DENSE_90, m=300, k=1000)),
    "stores together": (("quantize_dense.cuh", "odd ? packed[i] : packed[4 + i], 1", "odd ? packed[4 + i] : packed[i], 1"), replace(DENSE_90, m=300, k=1000)),
    "more warps' rows": (("quantize_dense.cu", "i < RMS_WARPS; i += rows", "i < RMS_WARPS / 2; i += rows"), replace(DENSE_90, m=3, k=4200, input="rms_norm")),
    "column of a post": (("quantize_dense_sm90.cu", "start + 8 * (32 * w + lane)", "start + 8 * (16 * w + lane)"),
                         replace(DENSE_90, m=400, k=504, input="rms_norm")),
    "feedback's columns": (("index.cuh", "(step * (step - 1) >> 1) + pair", "(step * (step + 1) >> 1) + pair"), replace(FEEDBACK_80, m=150)),
    "feedback's columns, few rows": (("index.cuh", "(step * (step - 1) >> 1) + pair", "(step * (step - 1) >> 1) + (pair ^ 1)"), FEEDBACK_90),
    "errors of a step": (("quantize_feedback.cuh", "errors.word[2 * tile + half]", "errors.word[tile + 2 * half]"), FEEDBACK_80),
    "sign of an error": (("quantize_feedback.cuh", "(code - ROUND_BIASED) - value", "value - (code - ROUND_BIASED)"), replace(FEEDBACK_80, m=150)),
    "errors of other warps": (("quantize_dense.cu", "if (turn > 0) errors_of_steps", "if (turn > 1) errors_of_steps"), replace(FEEDBACK_80, m=16)),
    "octets": (("quantize_dense.cu", "packed[i] + OCTET_WORDS * (step / 2)", "packed[i] + OCTET_WORDS * (3 - step / 2)"), replace(FEEDBACK_90, m=150)),
    "sixteenth level": (("quantize_feedback.cuh", "? -8.0f : -7.0f", "? -7.0f : -7.0f"), SIXTEEN_80),
    "sixteenth level, byte": (("quantize.cuh", "magnitude & 0x0f0f0f0fu", "magnitude & 0x07070707u"), SIXTEEN_90),
    "sixteenth level, upper byte": (("quantize.cuh", "magnitude >> 4 & 0x0f0f0f0fu", "magnitude >> 4 & 0x07070707u"), SIXTEEN_90),
    "sign of a scale": (("quantize_feedback.cuh", "| ~largest << 31", "| largest << 31"), SIXTEEN_80),
    "which value is the largest": (("quantize_dense.cuh", "__funnelshift_l(__float_as_uint(value), __float_as_uint(value), 1)", "__float_as_uint(value) << 1"), SIXTEEN_80),
    "a block's clip": (("quantize_feedback.cuh", "0.125f * low_of", "0.124f * low_of"), SIXTEEN_90),
    "a block's clip, where": (("quantize_dense.cu", "fragments + COPIED_CHUNKS)", "fragments + COPIED_CHUNKS - 1)"), replace(SIXTEEN_80, m=150)),
    "a block's clip, few rows": (("quantize_dense.cu", "fragments + MATRIX_CHUNKS + FEEDBACK_CHUNKS)", "matrix + MATRIX_CHUNKS + FEEDBACK_CHUNKS)"), replace(SIXTEEN_80, m=16)),
    "signs": (("index.cuh", "(k & 1) + 16 * (k >> 1 & 3)", "(k & 1) + 16 * (k >> 2 & 3)"), ROWS_S8),
    "byte": (("quantize_s8.cuh", "__byte_perm(c, d, 0x0040)", "__byte_perm(d, c, 0x0040)"), ROWS_S8),
    "scale's quotient": (("quantize_s8.cuh", "? quotient : near", "? near * 1.000001f : near"), replace(ROWS_S8, transform="none", data="ties", m=128)),
    "tie, eight bits": (("quantize_s8.cuh", "fmaf(fmaf(-q0, scale, t), reciprocal, q0) + ROUND", "q0 + ROUND"),
                        replace(ROWS_S8, transform="none", data="ties", dtype="float16", m=128)),
    "sixteen columns": (("index.cuh", "8 * (lane >> 2 & 1) + 16 * (lane & 3)", "8 * (lane & 1) + 16 * (lane & 3)"), FEW_S8),
    "a row's squares": (("quantize_whole_rows.cu", "value = lane < warps ? of_warps[lane] : 0.0f;", "value = of_warps[0];"),
                        replace(FEW_S8, input="rms_norm")),
    "a row's largest of its warps": (("quantize_whole_rows.cu", "largest_of_warp(lane < warps ?", "largest_of_warp(lane < 1 ?"), FEW_S8),
    "a row's largest": (("quantize_whole_rows.cu", "if (mask >> rows_log2) value", "if (mask >> rows_log2 > 1) value"), ROWS_S8),
    "stage": (("quantize_whole_rows.cu", "copy_tile(stage, tile + STAGES * step)", "copy_tile(stage, tile + step)"),
              replace(ROWS_S8, m=65, k=16520, sm_90=True)),
    "row scale": (("row_scale.cu", "i < WARPS; ++i) absmax", "i < WARPS / 2; ++i) absmax"), replace(DENSE_S8, m=150, k=1000)),
    "stored sum": (("quantize_slice.cuh", "store_octet(total, pairs + 4,", "store_octet(total, pairs,"),
                   replace(ROWS_80, input="add_rms_norm")),
    "stored sum, eight bits": (("quantize_whole_rows.cu", "add_octet(pairs[part] + 4 * octet, others[part] + 4 * octet);", ""),
                               replace(ROWS_S8, input="add_rms_norm")),
    "a sum's root": (("row_rms.cu", "store_octet(total_row, pairs, column, k, true, aligned);\n  });", "store_octet(total_row, pairs, column, k, true, aligned);\n    add_octet(pairs, others);\n  });"),
                     replace(DENSE_90, input="add_rms_norm")),
    "mean": (("quantize_rows.cu", "inverse_rms_of(sum_of_slice(row_squares), one_over_k, eps);", "inverse_rms_of(sum_of_slice(row_squares), 1.0f / (128 * k_blocks), eps);"),
             replace(ROWS_80, input="rms_norm")),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_constant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch, cpu_launcher: Any) -> None:
    edit, base = MUTATIONS[name]
    case = replace(
        base,
        m=20 if base.m == 1 else base.m,
        k=584 if base.k == 1 else base.k,
        clip=1.0 if base.data == "ties" or base.format == "s8" or base.transform == "feedback16" else 0.9,
    )
    monkeypatch.setattr(launcher, "kernel", cpu_launcher.kernel)
    assert kernel_cases.check(case, CPU) == []
    monkeypatch.setattr(launcher, "kernel", cuda_on_cpu.CpuLauncher([edit]).kernel)
    try:
        assert kernel_cases.check(case, CPU) != []
    except cuda_on_cpu.KernelFault:
        assert name.startswith("warp's columns")  # which then are not aligned


def test_configurations_are_named_after_the_header() -> None:
    text = (ROOT / "apex4_quant" / "kernels" / "cuda" / "quantize" / "quantize.cuh").read_text()
    rows = (ROOT / "apex4_quant" / "kernels" / "cuda" / "quantize" / "quantize_rows.cu").read_text()

    def number(source: str, name: str) -> int:
        return int(re.search(rf"#define APEX4_{name} (\d+)", source)[1])

    assert [number(text, input.upper()) for input in INPUTS] == [0, 1, 2, 3]
    assert [number(rows, form.upper()) for form in quantize_configs.FORMS] == [0, 1, 2]
    assert f"MAX_LONG_BLOCKS = {quantize_configs.LONG_BLOCKS};" in rows
    assert f"GRID_Y = {quantize_configs.GRID_Y};" in rows
