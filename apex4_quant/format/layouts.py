"""Named, invertible orders of the same 4-bit codes and float16 scales in memory. docs/format.md §4.

A layout cuts the padded weight [N, K] into tiles of `tile_n` x 128 and stores a tile's codes contiguously, two to a
byte, the lower nibble first:

    weight_packed  uint8    [N / tile_n, K / 128, tile_n * 64]
    weight_scale   float16  [N / tile_n, G, tile_n]

so a tensor-parallel slice along N (a multiple of tile_n) or along K (a multiple of 128) is a plain slice of the
stored tensor. Inside a tile the order is *one* description, a permutation of mixed-radix digits, from which packing,
unpacking and the closed form used by kernels and simulations all derive. Write

    n = sum of its digits (most significant first), e.g. n = j*8 + r  for rows  = (("j", 8), ("r", 8))
    k = likewise,                     e.g. k = s*64 + h*32 + q*8 + i  for cols  = (("s", 2), ("h", 2), ("q", 4), ("i", 8))

then the nibble of (n, k) stands at the position whose digits are `order`, most significant first.

`sm80` is the B operand of `mma.sync.m16n8k64.row.col.s32.s4.s4.s32` as its registers want it. For an n8 x k64
operand, lane l = 4*r + q holds, of column n = r, two 32-bit registers: b0 = k in [8q, 8q+8), b1 = k in 32 + [8q, 8q+8).
One lane's registers for both k64 steps of a group are 16 consecutive bytes, so an n8 x k128 fragment is 512
consecutive bytes and is loaded with one 128-bit shared-memory read per lane, without bank conflicts:

    byte 16*l + 8*s + 4*h + i/2 of fragment j   holds   n = 8*j + l/4,  k = 64*s + 32*h + 8*(l%4) + i

Its scales are stored in the order the accumulators need them: lane l owns columns 8*j + 2*(l%4) + e of every
fragment j, so position 16*(l%4) + 2*j + e holds the scale of n = 8*j + 2*(l%4) + e.

`sm90` is the A operand of `wgmma.m64nNk32` with 8-bit elements in registers (the weights are A, so that y^T = W x^T).
Lane l = 4*r + q of warp w holds, per k32 step, four registers: rows r and r + 8 of the warp's sixteen, k = 4q..4q+3 and
16 + 4q..16 + 4q+3. One 32-bit word holds the codes of the two rows, eight codes, and two logic operations each make
the two registers of it; two 128-bit reads per lane fetch a tile's k128. Its nibbles are not two's complement but
sign and magnitude with the odd nibbles' signs one byte further, so that masking a word, and masking its rotation by
four bits, leaves bytes `s0000mmm`: in e4m3 the number (-1)^s * m * 2^-9. See `_sign_magnitude`.

`S8` is what kernels for 8-bit activations read, on every GPU, and no layout of checkpoints: the tiles of `sm90`, whose words hold
eight codes of one row, k = 4q..4q+3 and 16 + 4q..16 + 4q+3, in two's complement. The low three bits of the codes of a half are a
selector of PRMT, which looks them up in tables of bytes; and two logic operations make the even and the odd nibbles int8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from ..errors import UsageError
from .layout_name import LayoutName
from .number_format import BLOCK, CODE_MAX, FORBIDDEN_CODE, WEIGHT_SCALE_MIN, round_up

Digits = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layout:
    """One order of codes and scales. `order` lists the digits of `rows` and `cols`, most significant first."""

    name: str
    rows: Digits
    cols: Digits
    order: tuple[str, ...]
    scale_rows: Digits
    scale_order: tuple[str, ...]
    # Nibbles are two's complement, or what the first function makes of that and the second one makes undone.
    encoding: tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        assert sorted(self.order) == sorted(name for name, _ in self.rows + self.cols)
        assert sorted(self.scale_order) == sorted(name for name, _ in self.scale_rows)
        assert prod(size for _, size in self.cols) == BLOCK
        assert prod(size for _, size in self.scale_rows) == self.tile_n

    @cached_property
    def tile_n(self) -> int:
        return prod(size for _, size in self.rows)

    def padded_out_features(self, out_features: int) -> int:
        return round_up(out_features, self.tile_n)

    def packed_shape(self, out_features: int, padded_k: int) -> tuple[int, int, int]:
        return self.padded_out_features(out_features) // self.tile_n, padded_k // BLOCK, self.tile_n * BLOCK // 2

    def scale_shape(self, out_features: int, groups: int) -> tuple[int, int, int]:
        return self.padded_out_features(out_features) // self.tile_n, groups, self.tile_n

    def nibble(self, n: int, k: int) -> int:
        """Closed form: the position, in nibbles from the tile's start, of code (n, k) of a tile."""
        return _position(self.order, _split(n, self.rows) | _split(k, self.cols), dict(self.rows + self.cols))

    def scale_position(self, n: int) -> int:
        """Closed form: the position, in float16s from the tile row's start, of the scale of row n of a tile."""
        return _position(self.scale_order, _split(n, self.scale_rows), dict(self.scale_rows))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack int8 codes [N, K] (K a multiple of 128, |code| <= 7) to uint8 `packed_shape(N, K)`.

        Rows past N are zero codes. Raises ValueError if a code is out of range.
        """
        padded_k = codes.shape[1]
        if padded_k % BLOCK:
            raise ValueError(f"K = {padded_k} is not a multiple of {BLOCK}")
        if codes.numel() and (int(codes.max()) > CODE_MAX or int(codes.min()) < -CODE_MAX):
            raise ValueError(f"codes must lie in [-{CODE_MAX}, {CODE_MAX}]")
        tiles = _to_tiles(codes.to(torch.int8), self.rows, self.cols, self.order)
        pairs = tiles.reshape(*tiles.shape[:2], -1, 2).bitwise_and(0xF).to(torch.uint8)
        packed = pairs[..., 0] | pairs[..., 1] << 4
        return self.encoding[0](packed) if self.encoding else packed

    def unpack(self, packed: torch.Tensor, out_features: int) -> torch.Tensor:
        """Inverse of `pack`: int8 codes [out_features, K]. A stored -8 comes out as -8; see `require_legal`."""
        tiles_n, tiles_k, _ = packed.shape
        if self.encoding:
            packed = self.encoding[1](packed)
        # Shifting an int8 left and arithmetically right again sign-extends the nibble.
        signed = packed.view(torch.int8)
        nibbles = torch.stack((signed << 4 >> 4, signed >> 4), dim=-1)
        return _from_tiles(nibbles.reshape(tiles_n, tiles_k, -1), self.rows, self.cols, self.order)[:out_features]

    def has_forbidden_code(self, packed: torch.Tensor) -> bool:
        """True if any code of `packed` is -8, or the negative zero that stands in its place in sign and magnitude."""
        assert FORBIDDEN_CODE == -8
        if self.encoding:
            packed = self.encoding[1](packed)
        low, high = packed & 0x0F, packed & 0xF0
        return bool(((low == 0x08) | (high == 0x80)).any())

    def pack_scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Order float16 scales [N, G] as `scale_shape(N, G)`; the scales of rows past N are the smallest positive.

        Integers in the place of the scales are ordered likewise, with zeros for the rows past N.
        """
        out_features, groups = scales.shape
        padding = self.padded_out_features(out_features) - out_features
        value = WEIGHT_SCALE_MIN if scales.dtype.is_floating_point else 0
        padded = torch.nn.functional.pad(scales, (0, 0, 0, padding), value=value)
        tiles = _to_tiles(padded, self.scale_rows, (("g", groups),), ("g", *self.scale_order), cols_per_tile=groups)
        return tiles.reshape(self.scale_shape(out_features, groups))

    def unpack_scales(self, stored: torch.Tensor, out_features: int) -> torch.Tensor:
        """Inverse of `pack_scales`: float16 [out_features, G]."""
        groups = stored.shape[1]
        tiles = stored.reshape(stored.shape[0], 1, -1)
        return _from_tiles(tiles, self.scale_rows, (("g", groups),), ("g", *self.scale_order))[:out_features]


def _split(value: int, digits: Digits) -> dict[str, int]:
    parts: dict[str, int] = {}
    for name, size in reversed(digits):
        value, parts[name] = divmod(value, size)
    return parts


def _position(order: tuple[str, ...], parts: dict[str, int], sizes: dict[str, int]) -> int:
    position = 0
    for name in order:
        position = position * sizes[name] + parts[name]
    return position


def _to_tiles(
    matrix: torch.Tensor, rows: Digits, cols: Digits, order: tuple[str, ...], cols_per_tile: int = BLOCK
) -> torch.Tensor:
    """[N, K] -> [N / tile_n, K / cols_per_tile, tile], elements of a tile in `order`; N is padded with zeros."""
    tile_n = prod(size for _, size in rows)
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % tile_n))
    tiles_n, tiles_k = padded.shape[0] // tile_n, padded.shape[1] // cols_per_tile
    digits = padded.reshape(tiles_n, *(size for _, size in rows), tiles_k, *(size for _, size in cols))
    axis = {name: 1 + i for i, (name, _) in enumerate(rows)}
    axis |= {name: 2 + len(rows) + i for i, (name, _) in enumerate(cols)}
    return digits.permute(0, 1 + len(rows), *(axis[name] for name in order)).reshape(tiles_n, tiles_k, -1)


def _from_tiles(tiles: torch.Tensor, rows: Digits, cols: Digits, order: tuple[str, ...]) -> torch.Tensor:
    """Inverse of `_to_tiles`, padding rows included."""
    sizes = dict(rows + cols)
    tiles_n, tiles_k, _ = tiles.shape
    digits = tiles.reshape(tiles_n, tiles_k, *(sizes[name] for name in order))
    axis = {name: 2 + i for i, name in enumerate(order)}
    matrix = digits.permute(0, *(axis[name] for name, _ in rows), 1, *(axis[name] for name, _ in cols))
    return matrix.reshape(tiles_n * prod(s for _, s in rows), tiles_k * prod(s for _, s in cols))


def _sign_magnitude(packed: torch.Tensor) -> torch.Tensor:
    """Two's complement nibbles to sign and magnitude, as `sm90` stores them; uint8 [..., 4 w] -> the same shape.

    Of the even code of byte i, bits 0..2 are the magnitude and bit 7 the sign; of the odd code, bits 4..6 of byte i the
    magnitude and bit 3 of byte (i + 1) mod 4 of the same 32-bit word the sign. -8 becomes the negative zero.
    """
    even, odd = packed & 0x0F, packed >> 4
    magnitude = torch.where(even > 7, 16 - even, even) & 7 | (torch.where(odd > 7, 16 - odd, odd) & 7) << 4
    return (magnitude | (even & 8) << 4 | _roll_in_words(odd & 8, 1)).to(torch.uint8)


def _twos_complement(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `_sign_magnitude`; the negative zero comes out as -8."""
    even, odd = packed & 7, packed >> 4 & 7
    # 16 - m is the nibble of -m; of the negative zero, which has m = 0, the nibble is 8.
    even = torch.where(packed & 0x80 != 0, torch.where(even == 0, 8, 16 - even), even)
    odd = torch.where(_roll_in_words(packed & 8, -1) != 0, torch.where(odd == 0, 8, 16 - odd), odd)
    return (even | odd << 4).to(torch.uint8)


def _roll_in_words(bytes_: torch.Tensor, by: int) -> torch.Tensor:
    words: torch.Tensor = bytes_.unflatten(-1, (-1, 4))
    return words.roll(by, -1).flatten(-2)


ROWMAJOR = Layout(
    name=LayoutName.ROWMAJOR.value, rows=(("n", 1),), cols=(("k", BLOCK),), order=("n", "k"), scale_rows=(("n", 1),),
    scale_order=("n",),
)  # fmt: skip
SM80 = Layout(
    name=LayoutName.SM80.value,
    rows=(("j", 8), ("r", 8)),
    cols=(("s", 2), ("h", 2), ("q", 4), ("i", 8)),
    order=("j", "r", "q", "s", "h", "i"),
    scale_rows=(("j", 8), ("q", 4), ("e", 2)),
    scale_order=("q", "j", "e"),
)
SM90 = Layout(
    name=LayoutName.SM90.value,
    rows=(("w", 4), ("u", 2), ("r", 8)),
    cols=(("c", 2), ("s", 2), ("h", 2), ("q", 4), ("i", 4)),
    order=("c", "w", "r", "q", "s", "h", "i", "u"),
    scale_rows=(("w", 4), ("u", 2), ("r", 8)),
    scale_order=("w", "r", "u"),
    encoding=(_sign_magnitude, _twos_complement),
)
# The same tiles for 8-bit activations. No checkpoint has it: weights are put into it when they are prepared for a GPU.
S8 = Layout(
    name="s8", rows=SM90.rows, cols=SM90.cols, order=("c", "w", "r", "q", "s", "u", "h", "i"), scale_rows=SM90.scale_rows,
    scale_order=SM90.scale_order,
)  # fmt: skip
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ROWMAJOR, SM80, SM90)}


def get_layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise UsageError(f"layout {name!r} is not known: give one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
