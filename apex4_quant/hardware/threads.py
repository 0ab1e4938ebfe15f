"""How many threads a loop of small operations gets.

At the end of every operation torch's threads wait for each other by spinning. For one of a millisecond that costs little
on an idle machine and, where other processes want the same cores, thirty times the operation itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

FLOPS_PER_THREAD = 2e8  # about 5 ms of one core


@contextlib.contextmanager
def few_threads(flops: float) -> Iterator[None]:
    """Run a block whose operations are of `flops` floating-point operations each on as many threads as that is worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, int(flops / FLOPS_PER_THREAD))))
    try:
        yield
    finally:
        torch.set_num_threads(before)
