"""Which group transform an input has: the one vocabulary of command line, recipes, plans, checkpoint and kernels.

A transform multiplies every block of 128 channels of an input by a 128 x 128 matrix T before it is quantized, and the
weights that read it by T^-T, which leaves the product as it was.
"""

from __future__ import annotations

from enum import StrEnum


class TransformKind(StrEnum):
    """The value is what config.json, recipes and plan files say."""

    HADAMARD = "hadamard128"  # the Hadamard matrix over sqrt(128): nothing is stored
    DENSE = "dense128"  # learned, one matrix for every block of the input
    SHARED = "shared128"  # learned, one matrix for all blocks of the input
    NONE = "none"

    @property
    def is_learned(self) -> bool:
        """Whether the checkpoint stores matrices. Kernels have learned transforms with groups of 128 only."""
        return self in (TransformKind.DENSE, TransformKind.SHARED)

    def matrix_count(self, blocks: int) -> int:
        """Matrices stored for an input of so many blocks of 128 channels."""
        if not self.is_learned:
            return 0
        return 1 if self is TransformKind.SHARED else blocks
