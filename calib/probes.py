"""What is collected from the inputs of linears while calibration text runs through a layer."""

from __future__ import annotations

import torch


class InputProbe:
    """Keeps every `stride`-th token of what a linear reads, at most `tokens` rows of `total` in all.

    Evenly spaced over all calibration tokens, so it needs no random state and is the same in every run.
    """

    def __init__(self, total: int, tokens: int = 4096) -> None:
        self._stride = max(1, -(-total // tokens))
        self._seen = 0
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """x [..., K]: the input of the linear for one batch."""
        rows = x.detach().reshape(-1, x.shape[-1])
        first = -self._seen % self._stride
        self._rows.append(rows[first :: self._stride].clone())
        self._seen += len(rows)

    def rows(self) -> torch.Tensor:
        """[kept tokens, K] in the dtype seen."""
        return torch.cat(self._rows)
