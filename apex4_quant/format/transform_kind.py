"""Which group transform an input has: the one vocabulary of command line, recipes, plans, checkpoint and kernels.

A transform multiplies every block of 128 channels of an input by a 128 x 128 matrix T before it is quantized, and the
weights that read it by T^-T, which leaves the product as it was.
"""

from __future__ import annotations

from enum import StrEnum

from .number_format import BITS, BLOCK, CLIP_ROWS, FEEDBACK_ROWS, GroupSize


class TransformKind(StrEnum):
    """The value is what config.json, recipes and plan files say."""

    HADAMARD = "hadamard128"  # the Hadamard matrix over sqrt(128): nothing is stored
    DENSE = "dense128"  # learned, one matrix for every block of the input
    FEEDBACK = "feedback128"  # the same, and rounding errors of a step are made up for by the columns that are left
    FEEDBACK_16 = "feedback128x16"  # the same with sixteen levels, and a clip ratio for every block
    SHARED = "shared128"  # learned, one matrix for all blocks of the input
    NONE = "none"

    @property
    def is_learned(self) -> bool:
        """Whether the checkpoint stores matrices. Kernels have learned transforms with groups of 128 only."""
        return self not in (TransformKind.HADAMARD, TransformKind.NONE)

    @property
    def has_feedback(self) -> bool:
        """Whether error feedback is stored behind every matrix (feedback.py)."""
        return self in (TransformKind.FEEDBACK, TransformKind.FEEDBACK_16)

    @property
    def has_block_clips(self) -> bool:
        """Whether every block has a clip ratio, behind its feedback, and codes of activations are -8 ... 7."""
        return self is TransformKind.FEEDBACK_16

    def fitting(self, group_size: GroupSize, activation_bits: int) -> TransformKind:
        """What a linear has where this kind is wanted: feedback is for groups of 128 and 4-bit activations.

        Errors of 8 bits are too small to be made up for.
        """
        fits = not self.has_feedback or (group_size == BLOCK and activation_bits == BITS)
        return self if fits else TransformKind.DENSE

    @property
    def matrix_rows(self) -> int:
        """Of 128 values, that are stored for a block: those of T, of the feedback, and of the clip ratio."""
        return BLOCK + FEEDBACK_ROWS * self.has_feedback + CLIP_ROWS * self.has_block_clips

    def matrix_count(self, blocks: int) -> int:
        """Matrices stored for an input of so many blocks of 128 channels."""
        if not self.is_learned:
            return 0
        return 1 if self is TransformKind.SHARED else blocks
