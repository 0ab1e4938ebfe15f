"""The memory in which split GEMMs add up their parts: one piece per device and stream, zeroed once.

Kernels leave the counters zero, so that a piece is used again and again by what runs in order on its stream. Memory
cannot be had from the allocator while a CUDA graph is captured without becoming the graph's own, and a capture runs on
a stream of its own; so one spare piece is kept ready, which the next new stream takes. A graph keeps using the piece of
the stream it was captured on: two graphs captured on one stream must not be replayed at the same time on two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import Apex4Error

PARTIAL_BYTES = 32 << 20  # more than any plan asks for on the GPUs known: twice 132 blocks of 64 KiB and some
COUNTER_BYTES = 64 << 10


@dataclass(frozen=True)
class Workspace:
    partial: torch.Tensor
    counter: torch.Tensor

    def holds(self, partial_bytes: int, counter_bytes: int) -> bool:
        return partial_bytes <= self.partial.numel() and counter_bytes <= self.counter.numel()


_of_stream: dict[tuple[int, int], Workspace] = {}
_spare: dict[int, Workspace] = {}


def prepare(device: torch.device) -> None:
    """Make the spare piece of a device. Not during a capture."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _spare:
        _spare[index] = _new(device, 0, 0)


def workspace(device: torch.device, stream: int, partial_bytes: int, counter_bytes: int) -> Workspace:
    """The piece of `stream` (a CUstream as an integer), at least so large.

    Raises Apex4Error if it would have to grow while a CUDA graph is captured.
    """
    key = (device.index, stream)
    found = _of_stream.get(key)
    if found is not None and found.holds(partial_bytes, counter_bytes):
        return found
    if _capturing():
        found = _spare.pop(device.index, None)
        if found is None or not found.holds(partial_bytes, counter_bytes):
            raise Apex4Error(
                f"a split GEMM needs {partial_bytes} bytes of workspace that cannot be had during the capture of a CUDA "
                "graph: run the model once with the same shapes before capturing"
            )
    else:
        found = _new(device, partial_bytes, counter_bytes)
        # What is captured next may be as large.
        spare = _spare.get(device.index)
        if spare is None or not spare.holds(partial_bytes, counter_bytes):
            _spare[device.index] = _new(device, partial_bytes, counter_bytes)
    _of_stream[key] = found
    return found


def _new(device: torch.device, partial_bytes: int, counter_bytes: int) -> Workspace:
    partial = torch.empty(max(partial_bytes, PARTIAL_BYTES), dtype=torch.uint8, device=device)
    counter = torch.zeros(max(counter_bytes, COUNTER_BYTES), dtype=torch.uint8, device=device)
    torch.cuda.current_stream(device).synchronize()  # zero before another stream may use it
    return Workspace(partial, counter)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()
