"""What a safetensors header says of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorInfo:
    """`stored` is the name in the file if it is another, `part` the index of what is meant of that tensor (None: all), and
    `transposed` whether the part, a matrix, is stored the other way round.

    `shape` is that of what is meant.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    stored: str | None = None
    part: tuple[int | slice, ...] | None = None
    transposed: bool = False

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * _BYTES.get(self.dtype, 1)
