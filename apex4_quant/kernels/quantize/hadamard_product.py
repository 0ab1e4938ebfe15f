"""The Hadamard transform as a product, for the kernels that multiply by a dense matrix: it is faster for some shapes.

`configs.product_is_faster` says for which.
"""

from __future__ import annotations

import torch

from ..hadamard import hadamard_128
from .configs import prepack_matrix

_signs: dict[tuple[int, torch.dtype], torch.Tensor] = {}


def signs(device: int, dtype: torch.dtype) -> torch.Tensor | None:
    """sqrt(128) H, whose entries +-1 are exact in 16 bits, on the GPU `device`, as `prepack_matrix` makes it: [1, 16384].

    Made once and kept for good: CUDA graphs may have it. None where it would have to be made while one is captured.
    """
    found = _signs.get((device, dtype))
    if found is None and not torch.cuda.is_current_stream_capturing():
        matrix = hadamard_128(torch.float64, torch.device("cpu")).sign()[None]
        found = _signs[device, dtype] = prepack_matrix(matrix, dtype).to(torch.device("cuda", device))
        torch.cuda.current_stream(device).synchronize()  # there before another stream may read it
    return found
