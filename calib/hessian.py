"""Second moments of what linears read: the Hessian of their output error, up to a factor."""

from __future__ import annotations

import torch

from .errors import CalibrationError


class HessianAccumulator:
    """Sum of x x^T over all tokens seen, in float32, on the device of the first batch."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """x [..., K] in the basis the weights are quantized in."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self._sum.addmm_(rows.t(), rows)
        self._tokens += len(rows)

    def take_matrix(self) -> torch.Tensor:
        """E[x x^T], float32 [K, K], and forget it: at K = 28672 a copy would be 3 GB.

        Raises CalibrationError if no token was seen or one was not finite.
        """
        if self._sum is None or self._tokens == 0:
            raise CalibrationError("no calibration token reached it")
        mean, self._sum = self._sum.div_(self._tokens), None
        if not bool(torch.isfinite(mean).all()):
            raise CalibrationError("the calibration inputs hold NaN or infinity")
        return mean
