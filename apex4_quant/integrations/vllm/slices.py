"""Which part of the stored linears a tensor-parallel rank computes. Plain arithmetic: no torch, no vLLM.

vLLM cuts a linear along its output features N or along its input features K. A stored tensor is made of tiles of T output
features by 128 input features and has a scale per group, so that a rank's part is a plain slice where the cut is between
tiles (N) or groups (K). Every other cut is refused, with the numbers of ranks that would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...errors import UsageError
from ...format.number_format import BLOCK, CHANNEL
from ...format.quant_config import LinearFormat

MOST_RANKS = 64  # that a message proposes


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a stored linear that are cut into equal parts, one a rank.

    `heads`: of how many key/value heads they are. A rank has one head at least, so more ranks than heads share parts.
    """

    start: int
    rows: int
    heads: int | None = None

    def of_rank(self, rank: int, ranks: int) -> tuple[int, int] | None:
        """(first row, number of rows), or None if the rows cannot be divided."""
        parts = ranks if self.heads is None else min(ranks, self.heads)
        if self.rows % parts or ranks % parts:
            return None
        size = self.rows // parts
        return self.start + rank * parts // ranks * size, size


def row_ranges(pieces: Sequence[Piece], rank: int, ranks: int) -> list[tuple[int, int]] | None:
    """The rank's rows of a stored linear: (first, number) of each piece, neighbours joined. None: cannot be divided."""
    ranges: list[tuple[int, int]] = []
    for piece in pieces:
        found = piece.of_rank(rank, ranks)
        if found is None:
            return None
        if ranges and sum(ranges[-1]) == found[0]:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + found[1]
        else:
            ranges.append(found)
    return ranges


def _whole_tiles(format: LinearFormat, ranges: Iterable[tuple[int, int]]) -> bool:
    tile = format.layout.tile_n
    return all(
        start % tile == 0 and ((start + rows) % tile == 0 or start + rows == format.out_features)
        for start, rows in ranges
    )


def cut_rows(
    name: str, format: LinearFormat, pieces: Sequence[Piece], rank: int, ranks: int
) -> tuple[tuple[int, int], ...]:
    """The rows of the stored linear `name` that this rank computes. Raises UsageError for a cut through a tile."""

    def fits(number: int) -> bool:
        for each in range(number):
            ranges = row_ranges(pieces, each, number)
            if ranges is None or not _whole_tiles(format, ranges):
                return False
        return True

    ranges = row_ranges(pieces, rank, ranks)
    if ranges is None or not fits(ranks):
        raise UsageError(
            f"{name} has {format.out_features} output features, and a tensor-parallel size of {ranks} cuts through tiles of "
            f"{format.layout.tile_n} of layout {format.layout.name!r}: give a tensor-parallel size of {_choice(fits)}, or "
            "'apex4 repack' the checkpoint to layout rowmajor"
        )
    return tuple(ranges)


def cut_features(name: str, format: LinearFormat, rank: int, ranks: int) -> tuple[int, int]:
    """(first input feature, number of them) of this rank's part along K. Raises UsageError for a cut through a group."""
    if ranks == 1:
        return 0, format.in_features
    unit = format.group_length
    if format.group_size == CHANNEL:
        raise UsageError(
            f"{name} has one group for all of its {format.in_features} input features, which a tensor-parallel size of "
            f"{ranks} cuts: give a tensor-parallel size of 1, or quantize with a group size of {BLOCK}"
        )

    def fits(number: int) -> bool:
        return number == 1 or format.in_features % (number * unit) == 0

    if not fits(ranks):
        raise UsageError(
            f"{name} has {format.in_features} input features, and a tensor-parallel size of {ranks} cuts through groups of "
            f"{unit}: give a tensor-parallel size of {_choice(fits)}"
        )
    size = format.in_features // ranks
    return rank * size, size


def _choice(fits: Callable[[int], bool]) -> str:
    numbers = [str(number) for number in range(1, MOST_RANKS + 1) if fits(number)]
    return numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} or {numbers[-1]}"
