"""The same chain of small operations again and again, as a CUDA graph.

On a GPU a small operation takes less time than the call that starts it. A graph starts a whole chain by one call. It is captured
when the chain is asked for a second time: the first time loads and makes whatever is loaded or made on first use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import cache

import torch


class Replayed:
    """Chains on one GPU. `forget` gives their memory back.

    A chain reads and writes tensors that stay where they are; what it makes on its way belongs to its graph. It does not wait for
    the GPU.
    """

    refused = False  # a capture failed in this process: chains are launched operation by operation

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: torch.cuda.MemPool | None = None

    def run(self, key: Hashable, operations: Callable[[], None]) -> None:
        """`operations`, which for one `key` are the same on the same tensors every time."""
        if key in self._seen and key not in self._graphs and not Replayed.refused:
            self._capture(key, operations)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            self._seen.add(key)
            operations()

    def forget(self) -> None:
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _capture(self, key: Hashable, operations: Callable[[], None]) -> None:
        graph, stream = torch.cuda.CUDAGraph(), _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):  # and on its device
                self._pool = self._pool or torch.cuda.MemPool()
                # torch.cuda.graph would give all cached memory back first. Other threads, as those of NCCL, go on.
                graph.capture_begin(pool=self._pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]
                try:
                    operations()
                finally:
                    graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            Replayed.refused = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"apex4: small operations are launched one by one, which is slower: no CUDA graph ({reason})",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._graphs[key] = graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of all captures: a stream of cuBLAS has memory of its own, for good, which is made here and not in a capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        square = torch.ones(1, 8, 8, device=device)
        torch.bmm(square, square)
    return stream
