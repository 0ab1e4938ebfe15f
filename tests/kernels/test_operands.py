"""Quantized activations: where each code stands, and what operators refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apex4_quant.format.layouts import get_layout
from apex4_quant.kernels.index import index_function
from apex4_quant.kernels.operands import (
    FORMATS,
    TOKEN_FORMAT,
    fold_scales,
    pack_activations,
    row_stride,
    unpack_activations,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-7, 8, shape, dtype=torch.int8, generator=generator(seed))


@pytest.mark.parametrize(("format", "m", "k", "block", "byte", "value"), [
    ("sm80", 0, 0, 0, 0, 0x09), ("sm80", 0, 1, 0, 0, 0x90), ("sm80", 0, 33, 0, 16, 0x90), ("sm80", 1, 128, 1, 64, 0x09),
    ("sm80", 2, 0, 0, 128 + 16, 0x09), ("sm80", 6, 127, 0, 384 + 15, 0x90), ("sm80", 17, 32, 0, 17 * 64 + 16, 0x09),
    ("sm90", 0, 0, 0, 0, 0x87), ("sm90", 0, 17, 0, 17, 0x87), ("sm90", 1, 0, 0, 128 + 16, 0x87),
    ("sm90", 7, 127, 0, 7 * 128 + 15, 0x87), ("sm90", 9, 130, 1, 9 * 128 + 16 + 2, 0x87),
    ("s8", 0, 0, 0, 0, 0xF9), ("s8", 0, 17, 0, 17, 0xF9), ("s8", 1, 0, 0, 128 + 16, 0xF9),
    ("s8", 9, 130, 1, 9 * 128 + 16 + 2, 0xF9),
])  # fmt: skip
def test_golden_place_of_a_code(format: str, m: int, k: int, block: int, byte: int, value: int) -> None:
    codes = torch.zeros(18, 256, dtype=torch.int8)
    codes[m, k] = -7
    stored, _ = pack_activations(codes, torch.ones(18, 2), format)
    assert stored.shape == (2, 32, {"sm80": 64, "sm90": 128, "s8": 128}[format]) and stored.dtype == torch.uint8
    flat = stored.flatten(1)
    assert {(b, int(i)): int(flat[b, i]) for b in range(2) for i in flat[b].nonzero()} == {(block, byte): value}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("m", "k", "groups"), [(1, 128, 1), (16, 384, 3), (33, 512, 2), (0, 128, 1)])
def test_operands_pack_and_unpack(format: str, m: int, k: int, groups: int) -> None:
    codes, scales = random_codes(m, k), torch.rand(m, groups, generator=generator(1))
    if format == TOKEN_FORMAT:
        codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator(2))
        scales = scales[:, :1]
        groups = 1
    stored, stored_scales = pack_activations(codes, scales, format)
    assert stored_scales.shape == (groups, row_stride(m)) and stored_scales.is_contiguous() and stored.is_contiguous()
    again, scales_again = unpack_activations(stored, stored_scales, m, format)
    assert torch.equal(again, codes) and torch.equal(scales_again, scales)


def test_the_swizzle_of_sm90_is_the_128_byte_one() -> None:
    rows, chunks = np.arange(16)[:, None], np.arange(8)
    address = index_function("sm90_activation_byte")(rows, chunks)
    # wgmma's 128-byte swizzle: address bits 4..6 are those of the plain address, exclusive or bits 7..9.
    plain = 128 * rows + 16 * chunks
    assert (address == (plain ^ (plain >> 3 & 0x70))).all()


def test_folded_scales_lie_where_the_layout_has_scales() -> None:
    scale = torch.tensor([[0.5, 1.0]]).half().repeat(70, 1)
    scale[3] = torch.tensor([4.0, 1.0])
    ratio, unit = fold_scales(scale)
    assert (ratio.dtype, ratio.shape, unit.shape) == (torch.int16, (2, 2, 64), (128,))
    position = get_layout("sm90").scale_position(3)
    assert (int(ratio[0, 0, position]), int(ratio[0, 1, position])) == (4608, 1152)
    assert (int(ratio[0, 0, 0]), int(ratio[0, 1, 0])) == (2304, 4608)
    assert not ratio[1, :, get_layout("sm90").scale_position(6)].any() and not unit[70:].any()  # rows of padding
    assert torch.equal(unit[:70], torch.where(torch.arange(70) == 3, 4 / 18, 1 / 18))
