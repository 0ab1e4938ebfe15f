"""Hidden states of the calibration text that are too many for memory: in a file, from which a few windows are read at a time.

A file is a safetensors file with one tensor, written window by window by plain writes: no memory map, whose pages would
count as resident. It has a temporary name until `move_to` gives it one that a resumed run finds.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from ..errors import Apex4Error
from ..format.storage import TEMPORARY_SUFFIX, in_place_of, write_failure

TENSOR_NAME = "hidden_states"
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class _Piece:
    """Windows `first` to `first + count` - 1 of a file, whose tensor begins `offset` bytes into it."""

    path: Path
    descriptor: int
    offset: int
    first: int
    count: int


class StoredStates:
    """States [S, L, H] in files: what is used of a tensor of states. Indexing and `split` give tensors on the CPU."""

    def __init__(self, pieces: list[_Piece], shape: Sequence[int], dtype: torch.dtype, temporary: bool = False) -> None:
        self._pieces, self.shape, self.dtype = pieces, torch.Size(shape), dtype
        self._temporary = temporary
        self._end = weakref.finalize(self, _close, [piece.descriptor for piece in pieces], self._paths_to_remove())

    def _paths_to_remove(self) -> list[Path]:
        return [piece.path for piece in self._pieces] if self._temporary else []

    @classmethod
    def new(cls, folder: Path, shape: Sequence[int], dtype: torch.dtype) -> StoredStates:
        """Room for states [S, L, H], to be `put` window by window. Raises Apex4Error."""
        path = folder / f"states-{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        header = header_of(shape, dtype)
        with _said(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            _write(descriptor, memoryview(header), 0)
        return cls([_Piece(path, descriptor, len(header), 0, shape[0])], shape, dtype, temporary=True)

    @classmethod
    def of(cls, parts: Sequence[tuple[Path, int, int]], name: str = TENSOR_NAME) -> StoredStates:
        """Of windows first to stop - 1 of the tensor `name` of each of some safetensors files, one after the other.

        Raises OSError, ValueError or KeyError for files that are not such.
        """
        pieces, total, shape, kind = [], 0, [0], ""
        for path, first, stop in parts:
            descriptor = os.open(path, os.O_RDONLY)
            (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
            entry = json.loads(os.pread(descriptor, length, 8))[name]
            shape, kind = entry["shape"], entry["dtype"]
            pieces.append(_Piece(path, descriptor, 8 + length + entry["data_offsets"][0], first, stop - first))
            total += stop - first
        dtype = next(dtype for dtype, name in _NAMES.items() if name == kind)
        return cls(pieces, (total, *shape[1:]), dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def _window_bytes(self) -> int:
        return self.shape[1:].numel() * self.dtype.itemsize

    def _bytes_of(self, states: torch.Tensor) -> memoryview:
        return memoryview(states.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]

    def put(self, first: int, states: torch.Tensor) -> None:
        """Write states [B, L, H], those of windows from `first` on. Raises Apex4Error."""
        (piece,) = self._pieces
        data = self._bytes_of(states.detach().to("cpu", self.dtype).contiguous())
        with _said(piece.path):
            _write(piece.descriptor, data, piece.offset + first * self._window_bytes)

    def load(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Windows first to stop - 1, all unless told. Raises Apex4Error."""
        stop = len(self) if stop is None else min(stop, len(self))
        states = torch.empty((max(0, stop - first), *self.shape[1:]), dtype=self.dtype)
        data = self._bytes_of(states)
        before = 0
        for piece in self._pieces:
            start, end = max(first, before), min(stop, before + piece.count)
            if start < end:
                where = piece.offset + (piece.first + start - before) * self._window_bytes
                _read(piece, data[(start - first) * self._window_bytes : (end - first) * self._window_bytes], where)
            before += piece.count
        return states

    def split(self, windows: int) -> Iterator[torch.Tensor]:
        for first in range(0, len(self), windows):
            yield self.load(first, first + windows)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The windows int64 [n]."""
        parts = [self.load(window, window + 1) for window in index.tolist()]
        return torch.cat(parts) if parts else self.load(0, 0)

    def copy(self, folder: Path) -> StoredStates:
        """The same states in a file of their own."""
        other = StoredStates.new(folder, self.shape, self.dtype)
        for first in range(len(self)):
            other.put(first, self.load(first, first + 1))
        return other

    def move_to(self, path: Path) -> None:
        """From now on these are the file `path`, whole or absent after a kill. Raises Apex4Error."""
        (piece,) = self._pieces
        in_place_of(piece.path, path)
        piece.path, self._temporary = path, False
        self._end.detach()
        self._end = weakref.finalize(self, _close, [piece.descriptor], [])


States: TypeAlias = torch.Tensor | StoredStates


def picked(states: States, windows: torch.Tensor) -> torch.Tensor:
    """The windows int64 [n] of the states: those in memory where they are, if they are evenly spaced."""
    steps = windows.diff().unique().tolist()
    if isinstance(states, torch.Tensor) and len(steps) == 1 and steps[0] > 0:
        return states[int(windows[0]) : int(windows[-1]) + 1 : steps[0]]
    return states[windows]


def put(states: States, first: int, part: torch.Tensor) -> None:
    """Set windows from `first` on to `part` [B, L, H]; into pinned memory without waiting for it."""
    if isinstance(states, StoredStates):
        states.put(first, part)
    else:
        states[first : first + len(part)].copy_(part, non_blocking=True)


def brought(parts: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """Parts [B, L, H] of one size, of which the last may be smaller, on the device. A part is there until the next is asked for."""
    if device.type == "cuda":
        yield from _brought_ahead(parts, device)
    else:
        for part in parts:
            yield part.to(device)


def _brought_ahead(parts: Iterable[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
    """A GPU computes with one while it copies the next: two rooms take turns."""
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    rooms: list[torch.Tensor] = []
    before: tuple[torch.Tensor, torch.cuda.Event] | None = None
    try:
        for number, part in enumerate(parts):
            if len(rooms) < 2:
                rooms.append(torch.empty(part.shape, dtype=part.dtype, device=device))
            there = rooms[number % 2][: len(part)]
            copying.wait_stream(computing)  # with what this room held until now
            with torch.cuda.stream(copying):
                there.copy_(part, non_blocking=True)
            arrived = copying.record_event()
            if before is not None:
                computing.wait_event(before[1])
                yield before[0]
            before = there, arrived
        if before is not None:
            computing.wait_event(before[1])
            yield before[0]
    finally:
        computing.wait_stream(copying)  # also if nobody asked for all: the rooms are given back


def in_memory(states: States) -> torch.Tensor:
    return states.load() if isinstance(states, StoredStates) else states


def header_of(shape: Sequence[int], dtype: torch.dtype) -> bytes:
    """What stands before the numbers in a safetensors file with these states, as the library writes it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"format": "pt"}, TENSOR_NAME: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _close(descriptors: list[int], paths: list[Path]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    for path in paths:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Apex4Error(write_failure(path, error)) from error


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _read(piece: _Piece, data: memoryview, offset: int) -> None:
    while data:
        try:
            count = os.preadv(piece.descriptor, [data], offset)
        except OSError as error:
            raise Apex4Error(f"{piece.path} cannot be read ({error.strerror}): check the disk") from error
        if count == 0:
            raise Apex4Error(f"{piece.path} is truncated: begin again in another folder")
        data, offset = data[count:], offset + count
