"""Folded weights: what multiplies 8-bit activations. docs/format.md §1, "Eight-bit activations"; integer, the same on every reader.

The scales of a row's groups are folded into its codes, so that one integer sum over all of K is left, and one factor a row:

    unit  u[n]      = float32(s_max[n] / 18),  s_max[n] = max_g s_w[n, g]
    ratio R[n, g]   = rint(4608 * s_w[n, g] / s_max[n])          half to even; an integer in [0, 4608]
    w8[n, k]        = sign(q) * ((|q| * R[n, g(k)] + 128) >> 8)  an integer in [-126, 126], which stands for w8 * u

4608 is 18 * 256: of the group with the largest scale the code 7 becomes 126, and the shift by 8 bits leaves a whole byte, so that
a kernel makes the eight magnitudes of a group with four multiplications of packed halves: c * R + 128 < 2^15.
"""

from __future__ import annotations

import torch

RATIO_MAX = 4608
UNITS_OF_LARGEST_SCALE = 18  # RATIO_MAX / 256
FOLDED_MAX = 126  # (7 * RATIO_MAX + 128) >> 8
FOLDING_ERROR = (
    0.52  # |w8 u - q s_w| in units: 1/2 for rounding to w8, 7/512 for rounding R, and a float32's rounding of u
)


def fold(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 scales [N, G], positive -> ratio int16 [N, G] and unit float32 [N]."""
    exact = scale.double()  # products of 13 and 11 bits: the quotient of a tie has few bits, and is exact, too
    largest = exact.amax(1, keepdim=True)
    ratio = torch.round(RATIO_MAX * exact / largest).to(torch.int16)
    return ratio, (largest[:, 0] / UNITS_OF_LARGEST_SCALE).float()


def fold_codes(codes: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """int8 codes [N, K] and ratio int16 [N, G] -> folded weights int8 [N, K]. Each group has K / G codes."""
    grouped: torch.Tensor = codes.unflatten(1, (ratio.shape[1], -1))
    magnitude = (grouped.abs().short() * ratio[..., None] + 128) >> 8  # below 2^15
    return (magnitude * grouped.sign()).to(torch.int8).flatten(1)
