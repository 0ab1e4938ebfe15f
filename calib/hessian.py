"""Second moments of what linears read: the Hessian of their output error, up to a factor, and how two streams differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .errors import CalibrationError
from .finite import all_finite

PANEL, PANELS = 256, 8


class HessianAccumulator:
    """Sum of x x^T over all tokens seen, or of y x^T, in float32, on the device of the first batch.

    Of x x^T only what is left of the diagonal, and the squares of a panel's width along it, are summed: the rest is the same.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._symmetric = False
        self._tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """x and y [..., K]; y is x unless given."""
        rows = x.reshape(-1, x.shape[-1]).float()
        others = rows if y is None else y.reshape(-1, y.shape[-1]).float()
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._symmetric = y is None
        with _products_of(x, x if y is None else y):
            if y is not None:
                self._sum.addmm_(others.t(), rows)
            else:
                for start, stop in panels(rows.shape[1]):
                    self._sum[start:stop, :stop].addmm_(rows[:, start:stop].t(), rows[:, :stop])
        self._tokens += len(rows)

    def combine(
        self, sum_over_all: Callable[[torch.Tensor], torch.Tensor], zeros: Callable[[], torch.Tensor], symmetric: bool
    ) -> None:
        """Add what others have summed, who call this too: `sum_over_all` adds up a tensor of all of them, in its place.

        `zeros` makes the sum [K, K] where no token was seen here; `symmetric`: of x x^T.
        """
        if self._sum is None:
            self._sum, self._symmetric = zeros(), symmetric
        if self._symmetric:
            for start, stop in panels(len(self._sum)):
                sum_over_all(self._sum[start:stop, :stop])
        else:
            sum_over_all(self._sum)
        self._tokens = int(sum_over_all(torch.tensor([self._tokens])))

    def take_matrix(self) -> torch.Tensor:
        """E[x x^T] (E[y x^T]), float32 [K, K], and forget it: at K = 28672 a copy would be 3 GB.

        Raises CalibrationError if no token was seen or one was not finite.
        """
        if self._sum is None or self._tokens == 0:
            raise CalibrationError("no calibration token reached it")
        mean, self._sum = self._sum.div_(self._tokens), None
        if self._symmetric:
            for start, stop in panels(len(mean)):
                mean[:start, start:stop] = mean[start:stop, :start].t()
        if not all_finite(mean):
            raise CalibrationError("the calibration inputs hold NaN or infinity")
        return mean


def panels(width: int) -> list[tuple[int, int]]:
    """Rows of a symmetric matrix that are computed together: few enough products to be fast, many enough to save half."""
    size = max(PANEL, -(-width // PANELS))
    return [(start, min(start + size, width)) for start in range(0, width, size)]


@contextmanager
def _products_of(*inputs: torch.Tensor) -> Iterator[None]:
    """Multiply on a GPU's tensor cores, in TF32, what was in 16 bits: TF32 holds such numbers exactly, and sums are float32.

    For a float32 input it would not be exact, and a CPU may take another meaning from the setting.
    """
    if not all(each.is_cuda and each.dtype in (torch.bfloat16, torch.float16) for each in inputs):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
