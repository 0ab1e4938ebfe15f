"""Group transforms as the pipeline applies them: into the basis in which weights and activations are quantized.

x -> x T and W -> W T^-T leave x W^T as it was. The Hadamard transform is orthonormal and symmetric, so T = T^-T = H.
"""

from __future__ import annotations

import torch

from .kernels.hadamard import apply_block_hadamard
from .quant_config import LinearFormat


def _padded(matrix: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    return torch.nn.functional.pad(matrix.float(), (0, format.padded_k - format.in_features))


def transform_weight(weight: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    """weight [N, K] -> float32 [N, padded K], W T^-T."""
    padded = _padded(weight, format)
    return apply_block_hadamard(padded) if format.transform == "hadamard128" else padded


def transform_input(x: torch.Tensor, format: LinearFormat) -> torch.Tensor:
    """x [..., K] -> float32 [..., padded K], x T: what the activation quantizer rounds."""
    padded = _padded(x, format)
    return apply_block_hadamard(padded) if format.transform == "hadamard128" else padded
