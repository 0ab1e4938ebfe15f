"""What is collected from the inputs of linears while calibration text runs through a layer."""

from __future__ import annotations

import torch

PROBE_ROWS = 4096
PROBE_ELEMENTS = 2**25  # of an input that a transform is learned from: more rows are better, where they are narrow


def rows_to_learn_from(features: int) -> int:
    """How many rows of an input of so many features are kept to learn its transform from."""
    return max(PROBE_ROWS, PROBE_ELEMENTS // features)


def stratified(rows: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the rows [R, K], in their order: a stratified sample."""
    numbers = _one_of_every(max(1, -(-len(rows) // count)), len(rows))
    return rows if len(numbers) == len(rows) else rows[numbers.to(rows.device)]


def _one_of_every(stride: int, total: int) -> torch.Tensor:
    """Of 0 to stride - 1 a number that is drawn, of the next `stride` another, and so on to before `total`: int64, in order.

    The same in every run. Every 32nd row, of windows of 2048 tokens, would be all first tokens, which are like no others.
    """
    numbers = torch.arange(0, total, stride)
    sizes = (total - numbers).clamp_max(stride)  # the last stretch may be shorter
    drawn = torch.rand(len(numbers), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers + (drawn * sizes).long()


class InputProbe:
    """Keeps a stratified sample of the tokens of what a linear reads, at most `tokens` rows of `total` in all.

    It is the same in every run. If `total` is None, it is not known beforehand (an expert's tokens): every `stride`-th is
    kept, and the stride doubles whenever twice too many are.

    Of several probes that see one part of the tokens each, `before` is how many come before this one's; `rows` of all of
    them, in order, are those of one that sees all.
    """

    def __init__(self, total: int | None, tokens: int = PROBE_ROWS, before: int = 0) -> None:
        self._places = None if total is None else _one_of_every(max(1, -(-total // tokens)), total)
        self._places_there = self._places  # on the device of the rows: sent once, since a GPU is waited for whenever
        self._most, self._stride = tokens, 1
        self._before, self._seen, self._kept = before, before, 0
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """x [..., K]: the input of the linear for one batch."""
        rows = x.detach().reshape(-1, x.shape[-1])
        first, self._seen = self._seen, self._seen + len(rows)
        if self._places is not None:
            start, stop = torch.searchsorted(self._places, torch.tensor([first, self._seen])).tolist()
            assert self._places_there is not None
            self._places_there = self._places_there.to(rows.device)
            self._rows.append(rows[self._places_there[start:stop] - first])
            return
        self._rows.append(rows[-first % self._stride :: self._stride].clone())
        self._kept += len(self._rows[-1])
        while self._kept >= 2 * self._most:
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
        while self._places is None and -(-total // self._stride) > self._most:
            self._halve()
        return torch.cat(self._rows)
