"""Which quantizer runs for which input: every grid covers every row and block once, and what no kernel does is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apex4_quant.errors import UsageError
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.quantize.configs import (
    DENSE_INPUTS,
    INPUTS,
    NORMS,
    QuantizePlan,
    choose_dense,
    choose_row_scales,
    choose_rows,
    choose_whole_rows,
    dense_sm90_shared_bytes,
    product_is_faster,
)
from apex4_quant.kernels.quantize.launch import rows_are_aligned, run_quantize

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = (128, 200, 384, 1000, 4096, 11008, 14336, 16384, 16512, 28672, 53248)
ROWS = (1, 2, 3, 7, 16, 17, 100, 2048, 8192)


def covered(plan: QuantizePlan, m: int, k_blocks: int) -> np.ndarray:
    """How many slices of quantize_rows (NARROW, RESIDENT) have each (row, block): from the grid and the index functions."""
    slices = np.arange(plan.block // 8)
    rows = index_function("rows_slice_row")(slices, plan.rows_log2)
    blocks = index_function("rows_slice_block")(slices, plan.rows_log2)
    count = np.zeros((m, k_blocks), int)
    tiles = np.arange(plan.grid[1] * plan.grid[2])[:, None, None] << plan.rows_log2
    spans = np.arange(plan.grid[0])[:, None] * plan.blocks_per_cta
    row, block = np.broadcast_arrays(tiles + rows, spans + blocks)
    active = (row < m) & (blocks < plan.blocks_per_cta) & (block < k_blocks)
    np.add.at(count, (row[active], block[active]), 1)
    return count


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("k", WIDTHS)
def test_a_grid_of_rows_covers_every_slice_once(k: int, input: str) -> None:
    k_blocks = -(-k // 128)
    for blocks_per_group in {1, 2, 3, 8, k_blocks}:
        if k_blocks % blocks_per_group:
            continue
        for m in ROWS:
            plan = choose_rows(m, k_blocks, blocks_per_group, input=input)
            form = plan.config.name.split("_")[2]
            unit = k_blocks if input in NORMS else blocks_per_group
            assert plan.blocks_per_cta % unit == 0 or plan.blocks_per_cta == k_blocks
            assert plan.grid[1] <= 65535 and plan.block % 32 == 0
            if form == "long":
                assert unit > 128 and plan.rows_log2 == 0 and plan.block <= 512
                assert plan.grid[0] * plan.blocks_per_cta == k_blocks and plan.grid[1] * plan.grid[2] == m
                continue
            assert plan.block <= {"narrow": 256, "resident": 1024}[form]
            assert (form == "narrow") == (unit == 1 and input not in NORMS)
            assert (plan.blocks_per_cta << plan.rows_log2) * 8 <= plan.block
            if m * k_blocks <= 2**16:
                assert (covered(plan, m, k_blocks) == 1).all()


def test_more_row_tiles_than_a_grid_has_in_y() -> None:
    plan = choose_rows(200_000, 40, 40)  # one row a CTA
    assert plan.rows_log2 == 0 and plan.grid == (1, 65535, 4)
    assert 65535 * 4 >= 200_000


def test_plans_refuse_what_the_kernels_cannot_do() -> None:
    with pytest.raises(UsageError, match="smaller group size"):
        choose_rows(1, 1025, 1025)
    with pytest.raises(ValueError, match="groups of 3 blocks"):
        choose_rows(1, 4, 3)
    with pytest.raises(UsageError, match="use fewer tokens"):
        choose_dense(2**21, 32, aligned=False)
    with pytest.raises(ValueError, match="groups of 128, not 256"):
        run_quantize(
            0, codes=0, scales=0, x=0, m=1, k=256, k_blocks=2, m_stride=16, ldx=256, dtype="float16", format="sm80",
            stream=0, sm_count=1, blocks_per_group=2, transform="dense",
        )  # fmt: skip


@pytest.mark.parametrize("k", WIDTHS)
def test_a_grid_of_the_dense_kernel_covers_every_row_once(k: int) -> None:
    k_blocks = -(-k // 128)
    for m in (*ROWS, 131072):
        for aligned in (True, False):
            plan = choose_dense(m, k_blocks, aligned=aligned)
            few = plan.defines["APEX4_FEW_ROWS"]
            assert plan.block == 128 and plan.grid[0] == k_blocks and plan.grid[1] <= 65535
            assert plan.rows_per_cta == 16 if few else plan.rows_per_cta % 128 == 0
            assert (plan.grid[1] - 1) * plan.rows_per_cta < m <= plan.grid[1] * plan.rows_per_cta
            assert few or aligned
            assert few or m > 16
    assert choose_dense(8192, 32).defines["APEX4_FEW_ROWS"] == 0


@pytest.mark.parametrize("input", DENSE_INPUTS)
@pytest.mark.parametrize("k", WIDTHS)
def test_a_grid_of_the_dense_kernel_for_hopper(k: int, input: str) -> None:
    k_blocks, sm_count = -(-k // 128), 132
    for m in (*ROWS, 700, 4100, 131072):
        plan = choose_dense(m, k_blocks, input=input, format="sm90", sm_count=sm_count)
        assert plan.grid[0] == k_blocks
        assert (plan.grid[1] - 1) * plan.rows_per_cta < m <= plan.grid[1] * plan.rows_per_cta
        if plan.config.source == "quantize/quantize_dense.cu":
            few = 2 if input == "rms_norm" and (m <= 8 if k_blocks >= 64 else k_blocks >= 16 and m in (2, 3)) else 1
            assert plan.defines["APEX4_FEW_ROWS"] == few and plan.block == 128 * few
            assert not plan.needs_board and plan.shared_bytes == 0
            assert plan.needs_statistics == (input == "rms_norm" and few == 1 and m > 4)
            assert -(-m // 128) * k_blocks < sm_count or m <= 16 or (input == "rms_norm" and k_blocks > sm_count)
            continue
        assert plan.config.source == "quantize/quantize_dense_sm90.cu" and plan.needs_board == (input == "rms_norm")
        assert plan.rows_per_cta % (64 if plan.needs_board else 128) == 0
        if plan.needs_board:  # all thread blocks there at once
            assert plan.grid[0] * plan.grid[1] <= sm_count and plan.block == 512
        ctas = 1 if plan.needs_board else 2
        assert ctas * (plan.shared_bytes + 1024 + 128) <= 228 * 1024


def test_where_a_hadamard_transform_is_a_product() -> None:
    """As measured on an H100: the least of these numbers of rows, by K; what is chosen is a kernel that takes it."""
    rows = (16, 256, 512, 1024, 2048, 4096, 8192, 16384, 1 << 20)
    how = {"input": "rms_norm", "aligned": True, "format": "sm90", "sm_count": 132}
    least = {4096: 8192, 5120: 8192, 7168: 4096, 8192: 4096, 12288: 4096, 14336: 1024, 16384: 1024}
    for k in (128, 1024, 2048, *least, 6144, 10240, 16512, 28672):
        chosen = [m for m in rows if product_is_faster(m, k // 128, **how)]
        assert chosen == [m for m in rows if m >= least.get(k, 1 << 21)], (k, chosen)
        for m in chosen:
            assert choose_dense(m, k // 128, input="rms_norm", format="sm90").needs_board
    for other in ({"input": "plain"}, {"input": "silu_mul"}, {"aligned": False}, {"format": "sm80"}, {"sm_count": 63}):
        assert not product_is_faster(1 << 20, 64, **(how | other))


@pytest.mark.parametrize("input", DENSE_INPUTS)
@pytest.mark.parametrize("k", WIDTHS)
def test_a_grid_of_whole_rows_covers_every_slice_once(k: int, input: str) -> None:
    k_blocks, sm_count = -(-k // 128), 132
    for m in (*ROWS, 20000):
        for aligned, sm_90 in ((True, False), (True, True), (False, True)):
            plan = choose_whole_rows(m, k_blocks, input=input, aligned=aligned, sm_count=sm_count, sm_90=sm_90)
            form, rows = plan.config.name.split("_")[3], 1 << plan.rows_log2
            assert plan.block % 32 == 0 and plan.grid[1:] == (1, 1)
            if form == "long":
                assert (not aligned or k_blocks > 224) and plan.grid[0] == m and rows == 1 and plan.block <= 512
                continue
            lanes = 8 if form in ("few", "cluster") else 4
            assert aligned and plan.block <= (1024 if lanes == 8 else 896)
            assert rows * plan.blocks_per_cta * lanes <= plan.block < rows * plan.blocks_per_cta * lanes + 32
            if form == "cluster":  # each CTA has its part of the blocks of one row
                assert sm_90 and plan.grid[0] == m * plan.cluster <= sm_count and 1 < plan.cluster <= 8 and rows == 1
                assert (plan.cluster - 1) * plan.blocks_per_cta < k_blocks <= plan.cluster * plan.blocks_per_cta
                continue
            tiles = -(-m // rows)
            assert plan.blocks_per_cta == k_blocks and plan.cluster == 1
            if form == "stream":  # all there at once, by registers and by shared memory
                ctas = -(-plan.grid[0] // sm_count)
                registers = 72 if input == "silu_mul" else 64
                assert sm_90 and plan.grid[0] * 2 <= tiles and ctas * plan.block * registers <= 65536
                assert ctas * (plan.shared_bytes + 4 * 3 * 224 + 1024) <= 228 << 10
            else:
                assert form == "resident" or (form == "few" and sm_90 and rows == 1 and m <= 64)
                assert plan.grid[0] == tiles and not plan.shared_bytes
            if m * k_blocks <= 2**14:
                slices = np.arange(plan.block // lanes)
                row = index_function("rows_slice_row")(slices, plan.rows_log2) + np.arange(tiles)[:, None] * rows
                block = np.broadcast_to(index_function("rows_slice_block")(slices, plan.rows_log2), row.shape)
                active, count = (row < m) & (block < k_blocks), np.zeros((m, k_blocks), int)
                np.add.at(count, (row[active], block[active]), 1)
                assert (count == 1).all()


@pytest.mark.parametrize("input", DENSE_INPUTS)
def test_dense_transforms_to_eight_bits_on_hopper(input: str) -> None:
    for m, k_blocks in ((1, 32), (16, 224), (512, 32), (8192, 32), (8192, 224)):
        plan = choose_dense(m, k_blocks, input=input, format="s8", sm_90=True)
        assert not plan.needs_board and plan.defines["APEX4_PASS"] == 2
        assert plan.needs_statistics == (input == "rms_norm")
        assert plan.needs_row_scales == (plan.rows_per_cta != 16) == (m > 16)
        if m > 16:
            assert plan.config.source == "quantize/quantize_dense_sm90.cu" and plan.block == 256
            assert plan.rows_per_cta % 128 == 0 and plan.shared_bytes == dense_sm90_shared_bytes(input, "s8")
            assert 2 * (plan.shared_bytes + 1024) <= 228 << 10
        assert choose_dense(m, k_blocks, input=input, format="s8").config.source == "quantize/quantize_dense.cu"
    assert choose_dense(384, 32, input=input, format="s8", sm_90=True).rows_per_cta == 16, "too few thread blocks"
    # The format of other GPUs on this one, as checks have it: the kernel with a board is that of sm90 alone.
    assert choose_dense(8192, 32, input=input, format="sm80", sm_90=True).config.source == "quantize/quantize_dense.cu"
    assert choose_row_scales(100).grid == (4, 1, 1)


def test_warps_of_a_cluster_have_room_for_what_they_find() -> None:
    source = (ROOT / "apex4_quant" / "kernels" / "cuda" / "quantize" / "quantize_whole_rows.cu").read_text()
    assert "MAX_WARPS = LANES * MOST_SLICES / 32 + 8;" in source and "MOST_SLICES = 224;" in source
    plans = [choose_whole_rows(m, k_blocks, sm_90=True) for m in (1, 32, 64) for k_blocks in range(1, 225)]
    assert {plan.cluster for plan in plans} == {1, 2, 4, 8}
    assert max(plan.cluster * plan.block // 32 for plan in plans) <= 8 * 224 // 32 + 8


def test_alignment_is_of_addresses_strides_and_width() -> None:
    assert rows_are_aligned(4096, (256, 4096), (512, 8192))
    assert not rows_are_aligned(4097, (256, 4104))
    assert not rows_are_aligned(4096, (258, 4096))
    assert not rows_are_aligned(4096, (256, 4096), (512, 4100))
