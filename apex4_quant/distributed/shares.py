"""Which part of a list each of several processes has: contiguous, in the order of ranks, sizes differ by one at most."""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """Entries `first` to `stop` - 1 of `total`, as windows of text, blocks of channels or rows of a weight."""

    first: int
    stop: int
    total: int

    @classmethod
    def whole(cls, total: int) -> Share:
        return cls(0, total, total)

    @property
    def size(self) -> int:
        return self.stop - self.first

    @property
    def slice(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def is_whole(self) -> bool:
        return self.size == self.total


def share_of(total: int, rank: int, size: int) -> Share:
    """That of rank `rank` of `size`; empty for some, if there are fewer entries than ranks."""
    return Share(total * rank // size, total * (rank + 1) // size, total)
