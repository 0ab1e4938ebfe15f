"""How the input of a linear is quantized: what the operators of ops.py are told beside their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

# The last arguments of the operators: matrix, k_padded, group, clip, hadamard, format; and these without the matrix.
OperatorArguments: TypeAlias = tuple[torch.Tensor | None, int, int, float, bool, str]
OperatorNumbers: TypeAlias = tuple[int, int, float, bool, str]


@dataclass(frozen=True)
class ActivationQuantization:
    """x [M, K] is padded with zeros to `k_padded`, transformed by blocks of 128, and quantized in groups.

    `group_length`: input features of a group, a multiple of 128. `clip`: of a group's absmax, what the code 7 stands for.
    `hadamard`: whether the transform is the Hadamard matrix; if not, it is the matrix given to `arguments`, or none.
    `format`: of the codes, one of `operands.FORMATS`.
    """

    k_padded: int
    group_length: int
    clip: float
    hadamard: bool
    format: str

    def arguments(self, matrix: torch.Tensor | None) -> OperatorArguments:
        """The last arguments of the operators. `matrix`: the learned transform as the operators read it, or None."""
        return matrix, self.k_padded, self.group_length, self.clip, self.hadamard, self.format
