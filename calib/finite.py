"""Whether a tensor holds only numbers."""

from __future__ import annotations

import torch


def all_finite(values: torch.Tensor) -> bool:
    """False if there is a NaN or an infinity. By the extremes, which NaN reaches: many times faster than by each value."""
    if values.numel() == 0:
        return True
    if values.itemsize == 1:  # extremes of 8-bit floats are not implemented
        values = values.float()
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))
