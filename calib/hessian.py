"""Second moments of what linears read: the Hessian of their output error, up to a factor, and how two streams differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from .errors import CalibrationError
from .finite import all_finite

PANEL, PANELS = 256, 8
TOKENS_AT_ONCE = (
    2048  # in one product on a GPU: tensor cores round towards zero as they add up, more the longer they do
)


class HessianAccumulator:
    """Sum of x x^T over all tokens seen, or of y x^T, in float32, on the device of the first batch.

    Of x x^T only what is left of the diagonal, and the squares of a panel's width along it, are summed: the rest is the same.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._symmetric = False
        self._tokens = 0

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """x and y [..., K]; y is x unless given. In 16 bits, if they are there in 16 bits: a GPU multiplies these many times as fast."""
        if self._sum is None:
            self._sum = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            self._symmetric = y is None
        if _on_tensor_cores(x, x if y is None else y) and adds_up_sixteen_bits(x.device, x.dtype):
            self._add_sixteen_bits(x, y)
        else:
            self._add_floats(x, y)
        self._tokens += x.numel() // x.shape[-1]

    def _add_floats(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        others = rows if y is None else y.reshape(-1, y.shape[-1]).float()
        with _products_of(x, x if y is None else y):
            for sums, here, last in self._pieces():
                sums.addmm_(others[:, here].t(), rows[:, :last])

    def _add_sixteen_bits(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Products of 16-bit numbers are exact in float32, in which they are added up."""
        rows = x.reshape(-1, x.shape[-1])
        others = rows if y is None else y.reshape(-1, y.shape[-1])
        for some, of_others in zip(rows.split(TOKENS_AT_ONCE), others.split(TOKENS_AT_ONCE), strict=True):
            for sums, here, last in self._pieces():
                add_products(sums, of_others[:, here], some[:, :last])

    def _pieces(self) -> Iterator[tuple[torch.Tensor, slice, int]]:
        """What is computed of the sum, its rows, and how many of its columns."""
        assert self._sum is not None
        width = len(self._sum)
        for start, stop in panels(width) if self._symmetric else [(0, width)]:
            last = stop if self._symmetric else width
            yield self._sum[start:stop, :last], slice(start, stop), last

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


def add_products(sums: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> None:
    """Add y^T x of 16-bit numbers [T, M] and [T, N] on a GPU to sums float32 [M, N]."""
    torch.addmm(sums, y.t(), x, out_dtype=torch.float32, out=sums)


@cache
def adds_up_sixteen_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this GPU have such products: tried on a small one."""
    y, x = (torch.ones(32, width, dtype=dtype, device=device) for width in (16, 32))
    sums = torch.ones(16, 64, device=device)
    try:
        add_products(sums[:, :32], y, x)
    except (RuntimeError, TypeError):  # NotImplementedError is one
        return False
    return bool((sums[:, :32] == 33).all() & (sums[:, 32:] == 1).all())


def _on_tensor_cores(*inputs: torch.Tensor) -> bool:
    return all(each.is_cuda and each.dtype in (torch.bfloat16, torch.float16) for each in inputs)


@contextmanager
def _products_of(*inputs: torch.Tensor) -> Iterator[None]:
    """Where 16 bits cannot be multiplied as they are, in TF32, which holds them exactly, and sums are float32.

    For a float32 input it would not be exact, and a CPU may take another meaning from the setting.
    """
    if not _on_tensor_cores(*inputs):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
