"""What is collected from the inputs of linears while calibration text runs through a layer."""

from __future__ import annotations

import torch

PROBE_ROWS = 4096
PROBE_ELEMENTS = 2**25  # of an input that a transform is learned from: more rows are better, where they are narrow


def rows_to_learn_from(features: int) -> int:
    """How many rows of an input of so many features are kept to learn its transform from."""
    return max(PROBE_ROWS, PROBE_ELEMENTS // features)


def evenly_spaced(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the rows [R, K], from the first on."""
    return rows[:: max(1, -(-len(rows) // count))]


class InputProbe:
    """Keeps every `stride`-th token of what a linear reads, at most `tokens` rows of `total` in all.

    Evenly spaced over all calibration tokens, so it needs no random state and is the same in every run. If `total` is
    None, it is not known beforehand (an expert's tokens): the stride doubles whenever twice too many rows are kept.

    Of several probes that see one part of the tokens each, `before` is how many come before this one's; `rows` of all of
    them, in order, are those of one that sees all.
    """

    def __init__(self, total: int | None, tokens: int = PROBE_ROWS, before: int = 0) -> None:
        self._stride = max(1, -(-(total or 1) // tokens))
        self._most = None if total is not None else tokens
        self._before, self._seen, self._kept = before, before, 0
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """x [..., K]: the input of the linear for one batch."""
        rows = x.detach().reshape(-1, x.shape[-1])
        first = -self._seen % self._stride
        self._rows.append(rows[first :: self._stride].clone())
        self._seen += len(rows)
        self._kept += len(self._rows[-1])
        while self._most is not None and self._kept >= 2 * self._most:
            self._halve()

    def _halve(self) -> None:
        first = -(-self._before // self._stride) % 2  # of the rows kept here: of even number among all, or odd
        self._rows = [torch.cat(self._rows)[first::2].clone()]
        self._kept = len(self._rows[0])
        self._stride *= 2

    def rows(self, total: int | None = None) -> torch.Tensor:
        """[kept tokens, K] in the dtype seen, of which there must be a token. `total`: the tokens of all probes, if this is
        one of several."""
        total = self._seen - self._before if total is None else total
        while self._most is not None and -(-total // self._stride) > self._most:
            self._halve()
        return torch.cat(self._rows)
