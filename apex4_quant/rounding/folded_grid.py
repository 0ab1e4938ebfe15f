"""The numbers that codes stand for with 8-bit activations: folded weights (kernels/folding.py), not multiples of the scale.

Of a row n the code +-c of group g is worth +-((c R[n, g] + 128) >> 8) u[n], where R and u follow from the scales of all groups
of the row. So scales are chosen first, and a value is then rounded to the nearest of its row's 15 numbers.
"""

from __future__ import annotations

import torch

from ..format.number_format import CODE_MAX
from ..kernels.folding import fold


class FoldedGrid:
    """Of float16 scales [N, G], which are final."""

    def __init__(self, scales: torch.Tensor) -> None:
        self._ratio, self._unit = fold(scales)
        self._groups: dict[int, GroupGrid] = {}

    def group(self, g: int) -> GroupGrid:
        """The numbers of group g, of all rows."""
        if g not in self._groups:
            self._groups[g] = self._group(g)
        return self._groups[g]

    def _group(self, g: int) -> GroupGrid:
        sizes = torch.arange(CODE_MAX + 1, dtype=torch.int32, device=self._ratio.device)
        magnitudes = (sizes[:, None] * self._ratio[:, g].int() + 128) >> 8
        return GroupGrid(magnitudes * self._unit)


class GroupGrid:
    """`levels` float32 [8, N]: what the codes 0 to 7 of a group are worth, by row."""

    def __init__(self, levels: torch.Tensor) -> None:
        self.levels = levels
        self._bounds = (levels[1:] + levels[:-1]) / 2  # [7, N]

    def round(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """values float32 [N], one column -> codes [N] of nearest worth, and this worth, both float32."""
        size = (values.abs() > self._bounds).sum(0)
        sign = values.sign()
        return size * sign, self.levels.gather(0, size[None])[0] * sign

    def round_columns(self, values: torch.Tensor) -> torch.Tensor:
        """values float32 [N, K] of a group -> int8 codes [N, K]."""
        size = torch.zeros_like(values, dtype=torch.int8)
        absolute = values.abs()
        for bound in self._bounds:
            size += absolute > bound[:, None]
        return size * values.sign().to(torch.int8)

    def worth(self, codes: torch.Tensor) -> torch.Tensor:
        """int codes [C, N], columns as rows -> float32 [C, N]."""
        return self.levels.gather(0, codes.abs().long()) * codes.sign()
