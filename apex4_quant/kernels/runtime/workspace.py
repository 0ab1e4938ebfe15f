"""Memory that kernels find as they have left it: for each purpose one piece, zeros at first, per device and stream.

    counters   of GEMMs whose tiles several thread blocks share; kernels leave them zero
    board      where thread blocks of a quantizer tell each other the RMS of rows (quantize_dense_sm90.cu)

A piece serves everything that runs in order on its stream and is cleared only once. While a CUDA graph is captured nothing
can be cleared at once, and a capture runs on a stream of its own; so one spare piece is kept ready, which the next new
stream takes. A graph keeps the pieces of the stream that it was captured on: two graphs captured on one stream must not be
replayed at the same time. (The partial sums of GEMMs are ordinary memory from torch's allocator, and in a graph the graph's
own.)
"""

from __future__ import annotations

import torch

from ...errors import Apex4Error

PIECE_BYTES = 256 << 10  # counters of 65,536 tiles, a board for nearly 32,768 rows
PURPOSES = ("counters", "board")

_of_stream: dict[tuple[str, int, int], torch.Tensor] = {}
_spare: dict[tuple[str, int], torch.Tensor] = {}
_replaced: list[torch.Tensor] = []  # by larger ones: graphs may have them


def prepare(device: torch.device) -> None:
    """Make the spare pieces of a device, where there are none. Not during a capture."""
    index = torch.cuda.current_device() if device.index is None else device.index
    for purpose in PURPOSES:
        if (purpose, index) not in _spare:
            _spare[purpose, index] = _zeros(index, PIECE_BYTES)


def counters(index: int, stream: int, size: int) -> torch.Tensor:
    """At least `size` bytes for kernels on `stream` (a CUstream as an integer) of the device `index`.

    Raises Apex4Error if they are not there while a CUDA graph is captured.
    """
    return _piece("counters", index, stream, size)


def board(index: int, stream: int, size: int) -> torch.Tensor:
    """As `counters`."""
    return _piece("board", index, stream, size)


def _piece(purpose: str, index: int, stream: int, size: int) -> torch.Tensor:
    before = _of_stream.get((purpose, index, stream))
    if before is not None and before.numel() >= size:
        return before
    spare = purpose, index
    if torch.cuda.is_current_stream_capturing():
        found = _spare.pop(spare, None)
        if found is None or found.numel() < size:
            raise Apex4Error(
                "a kernel needs memory that cannot be cleared during the capture of a CUDA graph: run the model once, "
                "with the same shapes, right before each capture on a stream of its own"
            )
    else:
        found = _zeros(index, size)
        if spare not in _spare or _spare[spare].numel() < size:  # what is captured next may be as large
            _spare[spare] = _zeros(index, size)
    if before is not None:
        _replaced.append(before)
    _of_stream[purpose, index, stream] = found
    return found


def _zeros(index: int, size: int) -> torch.Tensor:
    piece = torch.zeros(max(size, PIECE_BYTES), dtype=torch.uint8, device=torch.device("cuda", index))
    torch.cuda.current_stream(index).synchronize()  # cleared before another stream may use it
    return piece
