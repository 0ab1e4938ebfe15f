"""The counters of GEMMs whose tiles several thread blocks share: one piece of zeros per device and stream.

Kernels leave the counters zero, so that a piece serves everything that runs in order on its stream and is cleared only
once. While a CUDA graph is captured nothing can be cleared at once, and a capture runs on a stream of its own; so one
spare piece is kept ready, which the next new stream takes. A graph keeps the piece of the stream that it was captured
on: two graphs captured on one stream must not be replayed at the same time. (The partial sums themselves are
ordinary memory from torch's allocator, and in a graph the graph's own.)
"""

from __future__ import annotations

import torch

from ..errors import Apex4Error

PIECE_BYTES = 256 << 10  # counters of 65,536 tiles

_of_stream: dict[tuple[int, int], torch.Tensor] = {}
_spare: dict[int, torch.Tensor] = {}


def prepare(device: torch.device) -> None:
    """Make the spare piece of a device, where there is none. Not during a capture."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _spare:
        _spare[index] = _zeros(index, PIECE_BYTES)


def counters(index: int, stream: int, size: int) -> torch.Tensor:
    """At least `size` bytes for kernels on `stream` (a CUstream as an integer) of the device `index`.

    Raises Apex4Error if they are not there while a CUDA graph is captured.
    """
    found = _of_stream.get((index, stream))
    if found is not None and found.numel() >= size:
        return found
    if torch.cuda.is_current_stream_capturing():
        found = _spare.pop(index, None)
        if found is None or found.numel() < size:
            raise Apex4Error(
                "a GEMM needs counters that cannot be cleared during the capture of a CUDA graph: run the model once, "
                "with the same shapes, right before each capture on a stream of its own"
            )
    else:
        found = _zeros(index, size)
        if index not in _spare or _spare[index].numel() < size:  # what is captured next may be as large
            _spare[index] = _zeros(index, size)
    _of_stream[index, stream] = found
    return found


def _zeros(index: int, size: int) -> torch.Tensor:
    piece = torch.zeros(max(size, PIECE_BYTES), dtype=torch.uint8, device=torch.device("cuda", index))
    torch.cuda.current_stream(index).synchronize()  # cleared before another stream may use it
    return piece
