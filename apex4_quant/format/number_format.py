"""The number format: codes, groups, scales. docs/format.md is normative.

    y[m, n] = sum_g  s_a[m, g] * s_w[n, g] * ( sum_{k in g} q_a[m, k] * q_w[n, k] )  +  bias[n]

Codes are integers in [-7, 7], of activations with sixteen levels in [-8, 7]. Weight scales are float16 and chosen before the codes; activation scales are float32,
one per token and group, computed at run time. With 8-bit activations codes of the input are integers in [-127, 127] with one
scale a token, and weights are folded (kernels/folding.py). Constants here are the only copies.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UsageError, shown

BITS = 4
ACTIVATION_BITS = (4, 8)  # what a linear may say of its input's codes
TOKEN_CODE_MAX = 127  # of 8-bit activations, which have one scale a token; -128 is never produced
# Padded input features whose sums of 8-bit products an int32 holds: 127 * 126 * 2^17 < 2^31.
LARGEST_K_OF_TOKENS = 2**17
CODE_MAX = 7  # of weights -8 is never produced: sign and magnitude of layout sm90 have no room for it
FORBIDDEN_CODE = -8  # of weights
SIXTEENTH_CODE = -8  # of activations that have it: what the largest value of a group gets (docs/format.md §2)

BLOCK = 128  # the unit of groups, of group transforms and of tensor-parallel slices along K
CHANNEL = "channel"  # a group size: one group spans all of K
STEP_COLUMNS = 16  # of a block: with error feedback they are rounded together (feedback.py)
FEEDBACK_STEPS = BLOCK // STEP_COLUMNS
FEEDBACK_ROWS = FEEDBACK_STEPS * (FEEDBACK_STEPS - 1) // 2 * STEP_COLUMNS**2 // BLOCK  # of 128 values, for a block
CLIP_ROWS = 1  # likewise, behind the feedback: the block's clip ratio, and zeros
LARGEST_GROUP = 2**16  # the largest given as a number: K is padded to a multiple of it

WEIGHT_SCALE_MIN = 2.0**-24  # smallest positive float16; what an all-zero weight group gets
WEIGHT_SCALE_MAX = 65504.0  # largest float16
ACTIVATION_SCALE_MIN = 2.0**-100  # floor of s_a: an all-zero group gives zeros, never NaN

GroupSize = int | str


def arithmetic_name(bits: int, activation_bits: Iterable[int]) -> str:
    """ "W4A4", "W4A8", or both where linears differ."""
    return " and ".join(f"W{bits}A{each}" for each in sorted(set(activation_bits)))


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def parse_activation_bits(value: object) -> int:
    """4 or 8. Raises UsageError for anything else."""
    if type(value) is not int or value not in ACTIVATION_BITS:
        raise UsageError(
            f"activation bits {shown(value)} are not known: give one of {', '.join(map(str, ACTIVATION_BITS))}"
        )
    return value


def parse_group_size(value: GroupSize) -> GroupSize:
    """A legal group size: a multiple of 128 up to LARGEST_GROUP, or "channel". Raises UsageError for anything else."""
    if value == CHANNEL:
        return CHANNEL
    try:
        number = int(value) if isinstance(value, int | str) else 0
    except ValueError:
        number = 0
    if not 0 < number <= LARGEST_GROUP or number % BLOCK:
        raise UsageError(
            f"group size {shown(value)} is not legal: give a multiple of {BLOCK} (128, 256, 512, ...) or '{CHANNEL}'"
        )
    return number


def padded_in_features(in_features: int, group_size: GroupSize) -> int:
    """K rounded up so that groups divide it: to the group size, or to one block for channel granularity."""
    return round_up(in_features, BLOCK if group_size == CHANNEL else int(group_size))


def group_length(in_features: int, group_size: GroupSize) -> int:
    """Length of one group in the padded K."""
    return padded_in_features(in_features, CHANNEL) if group_size == CHANNEL else int(group_size)


def group_count(in_features: int, group_size: GroupSize) -> int:
    return padded_in_features(in_features, group_size) // group_length(in_features, group_size)
