"""Layouts: golden bytes, the closed form, ragged shapes, and simulations of the lane mappings of mma (sm_80) and wgmma."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apex4_quant.errors import UsageError
from apex4_quant.format.layouts import LAYOUTS, S8, SM90, Layout, get_layout
from apex4_quant.kernels import reference
from apex4_quant.kernels.index import index_function

NAMES = ("rowmajor", "sm80", "sm90")
N_SIZES = (1, 7, 63, 64, 65, 200)
K_SIZES = (128, 384, 1152)

# One row of 128 codes as 16 octets, and each octet's four bytes written out by hand, the lower nibble first.
OCTETS: tuple[tuple[tuple[int, ...], str], ...] = (
    ((1, 2, 3, 4, 5, 6, 7, 0), "21436507"),
    ((-1, -2, -3, -4, -5, -6, -7, 0), "efcdab09"),
    ((0, 0, 0, 0, 0, 0, 0, 0), "00000000"),
    ((7, 7, 7, 7, -7, -7, -7, -7), "77779999"),
    ((1, 0, 0, 0, 0, 0, 0, 0), "01000000"),
    ((0, 1, 0, 0, 0, 0, 0, 0), "10000000"),
    ((0, 0, 2, 0, 0, 0, 0, 0), "00020000"),
    ((0, 0, 0, 2, 0, 0, 0, 0), "00200000"),
    ((0, 0, 0, 0, 3, 0, 0, 0), "00000300"),
    ((0, 0, 0, 0, 0, 3, 0, 0), "00003000"),
    ((0, 0, 0, 0, 0, 0, 4, 0), "00000004"),
    ((0, 0, 0, 0, 0, 0, 0, 4), "00000040"),
    ((-1, 0, 0, 0, 0, 0, 0, 0), "0f000000"),
    ((0, -1, 0, 0, 0, 0, 0, 0), "f0000000"),
    ((5, -5, 0, 0, 0, 0, 6, -6), "b50000a6"),
    ((-7, 7, -6, 6, -5, 5, -4, 4), "796a5b4c"),
)
ROW = [code for codes, _ in OCTETS for code in codes]
# Octet o is k = 8 o: lane quarter q = o % 4 holds, in this order, (s, h) = (0,0), (0,1), (1,0), (1,1), that is
# octets q, q + 4, q + 8, q + 12.
SM80_ROW_HEX = (
    "21436507" "01000000" "00000300" "0f000000"
    "efcdab09" "10000000" "00003000" "f0000000"
    "00000000" "00020000" "00000004" "b50000a6"
    "77779999" "00200000" "00000040" "796a5b4c"
)  # fmt: skip

# fmt: off
SM80_SCALE_ROWS = [
    0, 1, 8, 9, 16, 17, 24, 25, 32, 33, 40, 41, 48, 49, 56, 57,
    2, 3, 10, 11, 18, 19, 26, 27, 34, 35, 42, 43, 50, 51, 58, 59,
    4, 5, 12, 13, 20, 21, 28, 29, 36, 37, 44, 45, 52, 53, 60, 61,
    6, 7, 14, 15, 22, 23, 30, 31, 38, 39, 46, 47, 54, 55, 62, 63,
]
# fmt: on


@pytest.fixture(params=NAMES)
def layout(request: pytest.FixtureRequest) -> Layout:
    return get_layout(request.param)


def random_codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * n + k + seed)
    return torch.randint(-7, 8, (n, k), dtype=torch.int8, generator=generator)


def random_scales(n: int, groups: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * n + groups + seed)
    return (torch.rand(n, groups, generator=generator) * 0.01 + 1e-4).half()


def tile_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., bytes] -> raw nibbles [..., 2 * bytes], the lower one first."""
    return torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)


def test_the_layouts_are_the_three_documented() -> None:
    assert tuple(LAYOUTS) == NAMES
    assert [get_layout(name).tile_n for name in NAMES] == [1, 64, 64]
    with pytest.raises(UsageError, match=r"'sm100'.*rowmajor, sm80, sm90"):
        get_layout("sm100")


def test_golden_bytes_rowmajor() -> None:
    codes = torch.zeros(3, 256, dtype=torch.int8)
    codes[1, 128:] = torch.tensor(ROW)
    packed = get_layout("rowmajor").pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, 64)
    assert bytes(packed[1, 1].tolist()).hex() == "".join(text for _, text in OCTETS)
    packed[1, 1] = 0
    assert not packed.any()


@pytest.mark.parametrize(
    ("n", "tile", "first_byte"),
    [(0, 0, 0), (1, 0, 64), (7, 0, 448), (8, 0, 512), (9, 0, 576), (63, 0, 4032), (64, 1, 0), (69, 1, 320)],
)
def test_golden_bytes_sm80(n: int, tile: int, first_byte: int) -> None:
    codes = torch.zeros(70, 256, dtype=torch.int8)
    codes[n, 128:] = torch.tensor(ROW)
    packed = get_layout("sm80").pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 2, 4096)
    assert bytes(packed[tile, 1, first_byte : first_byte + 64].tolist()).hex() == SM80_ROW_HEX
    packed[tile, 1, first_byte : first_byte + 64] = 0
    assert not packed.any()


@pytest.mark.parametrize(
    ("n", "k", "byte", "value"),
    [
        (0, 0, 0, 0x09), (0, 1, 0, 0x90), (0, 7, 3, 0x90), (0, 8, 16, 0x09), (0, 32, 4, 0x09), (0, 64, 8, 0x09),
        (0, 127, 63, 0x90), (3, 21, 3 * 64 + 2 * 16 + 2, 0x90), (63, 127, 4095, 0x90), (40, 96, 5 * 512 + 12, 0x09),
    ],
)  # fmt: skip
def test_golden_single_code_sm80(n: int, k: int, byte: int, value: int) -> None:
    codes = torch.zeros(64, 128, dtype=torch.int8)
    codes[n, k] = -7
    packed = get_layout("sm80").pack(codes).flatten()
    assert {i: int(packed[i]) for i in packed.nonzero().flatten().tolist()} == {byte: value}


def test_golden_word_sm90() -> None:
    """k = 0..3 of the rows 0 and 8 in one 32-bit word, worked out by hand from the bit diagram of docs/format.md."""
    codes = torch.zeros(64, 128, dtype=torch.int8)
    codes[0, :4] = torch.tensor([1, -2, 3, -4])
    codes[8, :4] = torch.tensor([-5, 6, -7, 0])
    packed = get_layout("sm90").pack(codes).flatten()
    assert bytes(packed[:4].tolist()).hex() == "51ea738c"
    assert not packed[4:].any()


@pytest.mark.parametrize(
    ("n", "k", "stored"),
    [
        (0, 0, {0: 0x87}), (0, 3, {3: 0x87}), (8, 0, {0: 0x70, 1: 0x08}), (8, 3, {3: 0x70, 0: 0x08}),
        (1, 0, {64: 0x87}), (0, 4, {16: 0x87}), (0, 16, {4: 0x87}), (0, 32, {8: 0x87}), (0, 64, {2048: 0x87}),
        (16, 0, {512: 0x87}), (55, 127, {4095: 0x87}), (63, 127, {4095: 0x70, 4092: 0x08}),
        (29, 86, {2048 + 512 + 16 * 21 + 4 + 2: 0x70, 2048 + 512 + 16 * 21 + 4 + 3: 0x08}),
    ],
)  # fmt: skip
def test_golden_single_code_sm90(n: int, k: int, stored: dict[int, int]) -> None:
    codes = torch.zeros(70, 256, dtype=torch.int8)
    codes[n, 128 + k] = -7
    packed = get_layout("sm90").pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 2, 4096)
    tile = packed[0, 1]
    assert {i: int(tile[i]) for i in tile.nonzero().flatten().tolist()} == stored
    assert int(packed.count_nonzero()) == len(stored)


def test_golden_word_s8() -> None:
    """A word for each row: nibbles 1 -2 3 -4, then -5 6 -7 0, and the other half k 16 to 19; two's complement."""
    codes = torch.zeros(64, 128, dtype=torch.int8)
    codes[0, :4] = torch.tensor([1, -2, 3, -4])
    codes[0, 16:20] = torch.tensor([0, 0, 5, -6])
    codes[8, :4] = torch.tensor([-5, 6, -7, 0])
    packed = S8.pack(codes).flatten()
    assert bytes(packed[:8].tolist()).hex() == "e1c300a5" + "6b090000"
    assert not packed[8:].any()


def test_s8_holds_the_words_of_sm90_in_another_order_and_is_not_stored() -> None:
    codes, scales = random_codes(200, 384), random_scales(200, 3)
    packed = S8.pack(codes)
    assert torch.equal(S8.unpack(packed, 200), codes) and torch.equal(S8.pack_scales(scales), SM90.pack_scales(scales))
    for n, k in ((0, 0), (13, 77), (63, 127)):  # of two words: one for each row, and not one for each half of k
        pair, nibble = divmod(SM90.nibble(n, k), 16)
        half, element, row = nibble // 8, nibble // 2 % 4, nibble % 2
        assert S8.nibble(n, k) == 16 * pair + 8 * row + 4 * half + element
    assert not S8.has_forbidden_code(packed) and "s8" not in LAYOUTS
    packed[0, 0, 0] = 0x18
    assert S8.has_forbidden_code(packed)


def test_golden_scale_order() -> None:
    scales = (torch.arange(64)[:, None] + torch.tensor([[0.0, 128.0]])).half()  # n + 128 g
    stored = get_layout("sm80").pack_scales(scales)
    assert stored.dtype == torch.float16 and stored.shape == (1, 2, 64)
    assert stored[0, 0].tolist() == SM80_SCALE_ROWS
    assert stored[0, 1].tolist() == [n + 128 for n in SM80_SCALE_ROWS]
    stored = get_layout("sm90").pack_scales(scales)
    assert stored[0, 0, :16].tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert stored[0, 1, 48:].tolist() == [128 + 48 + n for n in stored[0, 0, :16].tolist()]
    stored = get_layout("rowmajor").pack_scales(scales)
    assert stored.shape == (64, 2, 1)
    assert stored.squeeze(-1).tolist() == [[n, n + 128] for n in range(64)]


def test_padding_rows_are_zero_codes_and_the_smallest_scale() -> None:
    sm80 = get_layout("sm80")
    packed = sm80.pack(torch.full((65, 128), 7, dtype=torch.int8))
    assert packed.shape == (2, 1, 4096)
    assert (packed[0] == 0x77).all() and (packed[1, 0, :64] == 0x77).all() and not packed[1, 0, 64:].any()
    stored = sm80.pack_scales(torch.ones(65, 1, dtype=torch.float16))
    assert (stored[0] == 1).all()
    assert stored[1, 0].tolist() == [1.0] + [2.0**-24] * 63


@pytest.mark.parametrize("k", K_SIZES)
@pytest.mark.parametrize("n", N_SIZES)
def test_pack_and_unpack_are_inverse(layout: Layout, n: int, k: int) -> None:
    codes, scales = random_codes(n, k), random_scales(n, k // 128)
    packed, stored = layout.pack(codes), layout.pack_scales(scales)
    tiles = -(-n // layout.tile_n)
    assert packed.shape == layout.packed_shape(n, k) == (tiles, k // 128, layout.tile_n * 64)
    assert stored.shape == layout.scale_shape(n, k // 128) == (tiles, k // 128, layout.tile_n)
    assert packed.is_contiguous() and stored.is_contiguous()
    unpacked, restored = layout.unpack(packed, n), layout.unpack_scales(stored, n)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)
    assert restored.dtype == torch.float16 and torch.equal(restored, scales)


def test_pack_takes_transposed_and_wide_integers(layout: Layout) -> None:
    codes = random_codes(65, 128)
    assert torch.equal(layout.pack(codes.t().contiguous().t()), layout.pack(codes))
    assert torch.equal(layout.pack(codes.long()), layout.pack(codes))


def test_closed_form_is_where_pack_puts_things(layout: Layout) -> None:
    ids = torch.arange(layout.tile_n * 128).reshape(layout.tile_n, 128)
    where = torch.zeros(layout.tile_n * 128, dtype=torch.long)  # position -> id, found bit by bit
    for bit in range(13):
        plane = (ids >> bit & 1).to(torch.int8)
        where |= tile_nibbles(layout.pack(plane)[0, 0]).long() << bit
    for n in range(layout.tile_n):
        for k in range(128):
            assert int(where[layout.nibble(n, k)]) == n * 128 + k
    stored = layout.pack_scales(torch.arange(layout.tile_n)[:, None].half())[0, 0]
    assert [int(stored[layout.scale_position(n)]) for n in range(layout.tile_n)] == list(range(layout.tile_n))


def test_closed_form_of_sm80_is_the_written_one() -> None:
    sm80 = get_layout("sm80")
    for j in range(8):
        for lane in range(32):
            for s in range(2):
                for h in range(2):
                    for i in range(8):
                        n, k = 8 * j + lane // 4, 64 * s + 32 * h + 8 * (lane % 4) + i
                        byte = 512 * j + 16 * lane + 8 * s + 4 * h + i // 2
                        assert sm80.nibble(n, k) == 2 * byte + i % 2
            for e in range(2):
                n = 8 * j + 2 * (lane % 4) + e
                assert sm80.scale_position(n) == 16 * (lane % 4) + 2 * j + e


def test_closed_form_of_sm90_is_the_written_one() -> None:
    sm90 = get_layout("sm90")
    weight_byte, scale_position = index_function("sm90_weight_byte"), index_function("sm90_scale_position")
    for c, w, lane, u in np.ndindex(2, 4, 32, 2):
        n = 16 * w + 8 * u + lane // 4
        for s, h, i in np.ndindex(2, 2, 4):
            k = 64 * c + 32 * s + 16 * h + 4 * (lane % 4) + i
            byte = 2048 * c + 512 * w + 16 * lane + 8 * s + 4 * h + i
            assert sm90.nibble(n, k) == 2 * byte + u
            assert byte == weight_byte(c, w, lane) + 8 * s + 4 * h + i
        assert sm90.scale_position(n) == 16 * w + 2 * (lane // 4) + u == scale_position(w, lane) + u


# The fragments of mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32, from the PTX ISA's tables. [lane, element].
LANE = np.arange(32)[:, None]
GROUP_ID, TIG = LANE >> 2, LANE & 3
A_I, B_I, C_I = np.arange(32)[None], np.arange(16)[None], np.arange(4)[None]
A_ROW = GROUP_ID + np.where((A_I < 8) | ((A_I >= 16) & (A_I < 24)), 0, 8)
A_COL = TIG * 8 + (A_I & 7) + np.where(A_I >= 16, 32, 0)
B_ROW = TIG * 8 + (B_I & 7) + np.where(B_I >= 8, 32, 0)
B_COL = GROUP_ID + 0 * B_I
C_ROW = GROUP_ID + np.where(C_I >= 2, 8, 0)
C_COL = TIG * 2 + (C_I & 1)


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One warp's D = A B + C on fragments a [32, 32], b [32, 16], c [32, 4]."""
    full_a, full_b = np.zeros((16, 64), np.int32), np.zeros((64, 8), np.int32)
    full_a[A_ROW, A_COL] = a
    full_b[B_ROW, B_COL] = b
    return c + (full_a @ full_b)[C_ROW, C_COL]


def simulate(
    codes_a: np.ndarray, scale_a: np.ndarray, packed: np.ndarray, scale_w: np.ndarray, out_features: int
) -> tuple[np.ndarray, np.ndarray]:
    """A warp-by-warp GEMM on the stored sm80 tensors -> integer sums [M, N, G] and y float64 [M, N]."""
    m, groups = scale_a.shape
    tiles_n, blocks, _ = packed.shape
    m_pad = -(-m // 16) * 16
    activations = np.zeros((m_pad, codes_a.shape[1]), np.int32)
    activations[:m] = codes_a
    token_scale = np.zeros((m_pad, groups))
    token_scale[:m] = scale_a
    sums = np.full((m_pad, tiles_n * 64, groups), -(10**9))  # anything not stored to shows
    y = np.full((m_pad, tiles_n * 64), np.nan)
    for m0 in range(0, m_pad, 16):
        for tile in range(tiles_n):
            for j in range(8):
                total = np.zeros((32, 4))
                rows, cols = m0 + C_ROW, tile * 64 + j * 8 + C_COL
                for g in range(groups):
                    accumulator = np.zeros((32, 4), np.int32)
                    for block in range(g * blocks // groups, (g + 1) * blocks // groups):
                        lanes = packed[tile, block, 512 * j : 512 * (j + 1)].reshape(32, 16)  # one 128-bit load each
                        for step in range(2):
                            registers = lanes[:, 8 * step : 8 * step + 8]
                            nibbles = np.stack((registers & 15, registers >> 4), -1).reshape(32, 16).astype(np.int32)
                            b = np.where(nibbles >= 8, nibbles - 16, nibbles)
                            a = activations[m0 + A_ROW, block * 128 + step * 64 + A_COL]
                            accumulator = mma(a, b, accumulator)
                    owned = scale_w[tile, g].reshape(4, 16)[TIG[:, 0]]  # 16 consecutive float16s per lane
                    scale = owned[:, 2 * j : 2 * j + 2][LANE, C_I & 1].astype(np.float64)
                    sums[rows, cols, g] = accumulator
                    total += token_scale[rows, g] * scale * accumulator
                y[rows, cols] = total
    return sums[:m, :out_features], y[:m, :out_features]


def test_the_fragment_tables_cover_each_operand_once() -> None:
    assert len(set(zip(A_ROW.flat, A_COL.flat, strict=True))) == 16 * 64
    assert len(set(zip(B_ROW.flat, B_COL.flat, strict=True))) == 64 * 8
    assert len(set(zip(C_ROW.flat, C_COL.flat, strict=True))) == 16 * 8


@pytest.mark.parametrize(
    ("m", "n", "k", "group"),
    [(1, 1, 128, 128), (17, 63, 128, 128), (35, 100, 384, 128), (5, 130, 512, 256), (16, 65, 384, 384)],
)
def test_mma_lanes_read_what_pack_wrote(m: int, n: int, k: int, group: int) -> None:
    sm80 = get_layout("sm80")
    codes_a, codes_w = random_codes(m, k, seed=1), random_codes(n, k, seed=2)
    scale_a, scale_w = random_scales(m, k // group, seed=3).double() * 1.2345, random_scales(n, k // group, seed=4)
    packed, stored = sm80.pack(codes_w), sm80.pack_scales(scale_w)
    sums, y = simulate(codes_a.numpy(), scale_a.numpy(), packed.numpy(), stored.numpy(), n)
    assert torch.equal(torch.from_numpy(sums).long(), reference.group_sums(codes_a, codes_w, group))
    expected = reference.linear(codes_a, scale_a, codes_w, scale_w)
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


# The register fragments of wgmma.mma_async.m64nNk32 (8 bit) from the PTX ISA: A is four registers of four elements per
# lane of each of four warps, D repeats an 8 x 8 pattern. [warp, lane, element].
WARP_ID, WG_LANE, WG_A_I = np.arange(4)[:, None, None], np.arange(32)[None, :, None], np.arange(16)[None, None]
WG_A_ROW = 16 * WARP_ID + (WG_LANE >> 2) + 8 * (WG_A_I >> 2 & 1)
WG_A_COL = 4 * (WG_LANE & 3) + (WG_A_I & 3) + 16 * (WG_A_I >> 3)
MASK = np.uint32(0x87878787)


def e4m3_integer(values: np.ndarray) -> np.ndarray:
    """Bytes s0000mmm, subnormal e4m3 numbers (-1)^s m 2^-9, times 2^9."""
    assert not (values & 0x78).any()
    return np.where(values & 0x80, -1, 1) * (values & 7).astype(np.int32)


def test_the_wgmma_fragment_covers_its_operand_once() -> None:
    assert len(set(zip(*(part.flat for part in np.broadcast_arrays(WG_A_ROW, WG_A_COL)), strict=True))) == 64 * 32


@pytest.mark.parametrize(
    ("m", "n", "k", "group"), [(1, 1, 128, 128), (9, 63, 128, 128), (8, 100, 384, 128), (5, 130, 512, 256)]
)
def test_wgmma_lanes_read_what_pack_wrote(m: int, n: int, k: int, group: int) -> None:
    """Two 128-bit reads per lane and block, two masks per word: y^T = W x^T, one warpgroup per tile of 64 features."""
    sm90, f = get_layout("sm90"), index_function
    codes_a, codes_w = random_codes(m, k, seed=1), random_codes(n, k, seed=2)
    scale_a, scale_w = random_scales(m, k // group, seed=3).double() * 1.2345, random_scales(n, k // group, seed=4)
    packed, stored = sm90.pack(codes_w).numpy(), sm90.pack_scales(scale_w).numpy()
    columns = -(-m // 8) * 8  # the N of wgmma
    x = np.zeros((columns, k), np.int32)
    x[:m] = codes_a.numpy()
    token_scale = np.zeros((columns, k // group))
    token_scale[:m] = scale_a.numpy()
    y = np.full((columns, packed.shape[0] * 64), np.nan)
    lanes = np.arange(32)
    for tile in range(packed.shape[0]):
        out = np.zeros((64, columns))
        for block in range(k // 128):
            sums = np.zeros((64, columns), np.int32)
            for half in range(2):
                start = f("sm90_weight_byte")(half, np.arange(4)[:, None], lanes)[..., None]
                words = packed[tile, block][start + np.arange(16)].view("<u4")  # [warp, lane, 2 s + h]
                for step in range(2):
                    registers = np.empty((4, 32, 4), np.uint32)
                    for h in range(2):
                        word = words[..., 2 * step + h]
                        registers[..., 2 * h] = word & MASK
                        registers[..., 2 * h + 1] = (word >> np.uint32(4) | word << np.uint32(28)) & MASK
                    a = np.zeros((64, 32), np.int32)
                    a[WG_A_ROW, WG_A_COL] = e4m3_integer(registers.view(np.uint8))
                    first = 128 * block + 64 * half + 32 * step
                    sums += a @ x[:, first : first + 32].T
            for warp in range(4):
                for u in range(2):
                    rows = 16 * warp + f("accumulator_row")(lanes, u)
                    scale = stored[tile, block * 128 // group][f("sm90_scale_position")(warp, lanes) + u]
                    for e in range(2):
                        for j in range(0, columns, 8):
                            cols = j + f("accumulator_column")(lanes, e)
                            out[rows, cols] += token_scale[cols, block * 128 // group] * scale * sums[rows, cols]
        y[:, 64 * tile : 64 * (tile + 1)] = out.T
    expected = reference.linear(codes_a, scale_a, codes_w, scale_w)
    got = torch.from_numpy(y[:m, :n])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_tensor_parallel_shards_are_plain_slices(layout: Layout) -> None:
    n, k = 3 * 64, 5 * 128
    codes, scales = random_codes(n, k), random_scales(n, k // 128)
    packed, stored = layout.pack(codes), layout.pack_scales(scales)
    t = layout.tile_n
    for start, stop in ((0, 64), (64, 192), (128, 192)):
        part, part_scale = packed[start // t : stop // t], stored[start // t : stop // t]
        assert torch.equal(layout.unpack(part, stop - start), codes[start:stop])
        assert torch.equal(layout.unpack_scales(part_scale, stop - start), scales[start:stop])
        assert torch.equal(part, layout.pack(codes[start:stop]))
        assert torch.equal(part_scale, layout.pack_scales(scales[start:stop]))
    for start, stop in ((0, 1), (1, 3), (2, 5)):
        part, part_scale = packed[:, start:stop], stored[:, start:stop]
        assert torch.equal(layout.unpack(part, n), codes[:, 128 * start : 128 * stop])
        assert torch.equal(layout.unpack_scales(part_scale, n), scales[:, start:stop])
        assert torch.equal(part, layout.pack(codes[:, 128 * start : 128 * stop]))


@pytest.mark.parametrize("code", [8, -8, 127, -127, -128])
def test_pack_rejects_codes_out_of_range(layout: Layout, code: int) -> None:
    codes = random_codes(65, 128)
    codes[64, 127] = code
    with pytest.raises(ValueError, match=r"\[-7, 7\]"):
        layout.pack(codes)


def test_pack_rejects_wide_integers_out_of_range(layout: Layout) -> None:
    for code in (256, -256, 2**31):
        with pytest.raises(ValueError, match=r"\[-7, 7\]"):
            layout.pack(torch.full((1, 128), code, dtype=torch.int64))


@pytest.mark.parametrize("k", [1, 64, 127, 129, 200])
def test_pack_rejects_ragged_k(layout: Layout, k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} is not a multiple of 128"):
        layout.pack(torch.zeros(4, k, dtype=torch.int8))


@pytest.mark.parametrize("name", ["rowmajor", "sm80"])
def test_forbidden_code_in_either_nibble_and_nothing_else(name: str) -> None:
    layout = get_layout(name)
    for value in range(256):
        expected = value & 15 == 8 or value >> 4 == 8
        assert layout.has_forbidden_code(torch.tensor([[[value]]], dtype=torch.uint8)) is expected
    packed = layout.pack(random_codes(70, 256))
    assert not layout.has_forbidden_code(packed)
    for bad in (0x81, 0x18, 0x88):
        damaged = packed.clone()
        damaged.view(-1)[-17] = bad
        assert layout.has_forbidden_code(damaged)


@pytest.mark.parametrize("position", range(4))
def test_forbidden_code_of_sign_and_magnitude_is_the_negative_zero(position: int) -> None:
    sm90 = get_layout("sm90")
    for value in range(256):
        word = torch.zeros(1, 1, 4, dtype=torch.uint8)
        word[..., position] = value
        # Bit 7 is the sign of this byte's even code, bit 3 that of the odd code one byte before, which is zero here.
        expected = bool(value & 8) or (bool(value & 0x80) and value & 7 == 0)
        assert sm90.has_forbidden_code(word) is expected
    packed = sm90.pack(random_codes(70, 256))
    assert not sm90.has_forbidden_code(packed)
    packed.view(-1)[-17] = 0x80
    assert sm90.has_forbidden_code(packed)


@pytest.mark.parametrize(("name", "byte", "k"), [("rowmajor", 0x80, 1), ("sm80", 0x80, 1), ("sm90", 0x80, 0)])
def test_unpack_shows_a_stored_forbidden_code(name: str, byte: int, k: int) -> None:
    layout = get_layout(name)
    packed = layout.pack(torch.zeros(1, 128, dtype=torch.int8))
    packed.view(-1)[0] = byte
    codes = layout.unpack(packed, 1)
    assert codes[0, k] == -8 and int(codes.abs().sum()) == 8


@pytest.mark.parametrize(("n", "k"), [(1, 128), (65, 384), (128, 256)])
@pytest.mark.parametrize(("source", "target"), [(a, b) for a in NAMES for b in NAMES if a != b])
def test_repack_is_lossless(source: str, target: str, n: int, k: int) -> None:
    old, new = get_layout(source), get_layout(target)
    packed, stored = old.pack(random_codes(n, k)), old.pack_scales(random_scales(n, k // 128))
    moved, moved_scale = new.pack(old.unpack(packed, n)), new.pack_scales(old.unpack_scales(stored, n))
    assert torch.equal(old.pack(new.unpack(moved, n)), packed)
    assert torch.equal(old.pack_scales(new.unpack_scales(moved_scale, n)), stored)
    if n > 8:
        assert not torch.equal(moved.flatten()[:64], packed.flatten()[:64])  # they do differ in order
