"""The kernels of ops.py. Torch-free, for who only compiles them."""

from __future__ import annotations

from ..runtime.configuration import Configuration

WARPS = 8  # of a thread block, a group each
DIVERGENCE_THREADS = 512
FEEDBACK_WARPS, FEEDBACK_TILE_ROWS = 4, 16  # of a thread block; rows of a warp


def rounding_config(entry: str, float32: bool) -> Configuration:
    """`entry`: round_activation, round_activation_back, round_weight or round_weight_back."""
    source = f"training/{entry.removesuffix('_back')}.cu"
    defines: dict[str, int | str] = {"APEX4_FLOAT32": int(float32)}
    return Configuration(f"{entry}{_suffix(float32)}", source, f"apex4_{entry}", defines)


def feedback_config(float32: bool, sixteen: bool) -> Configuration:
    """`sixteen`: levels of activations, and a clip ratio for every block."""
    name = f"round_activation_feedback{'16' * sixteen}{_suffix(float32)}"
    # Of the quantizers' headers it takes the rounding alone: the input and the format of codes are any that they have.
    defines: dict[str, int | str] = {
        "APEX4_FLOAT32": int(float32), "APEX4_FEEDBACK": 1 + sixteen, "APEX4_BF16": 0, "APEX4_INPUT": 0, "APEX4_FORMAT": 80,
    }  # fmt: skip
    return Configuration(name, "training/round_feedback.cu", "apex4_round_activation_feedback", defines)


def divergence_config(float32: bool, whole: bool) -> Configuration:
    """`whole`: the vocabulary is a multiple of 4."""
    name = f"divergence{_suffix(float32)}{'' if whole else '_any'}"
    defines: dict[str, int | str] = {"APEX4_FLOAT32": int(float32), "APEX4_WHOLE": int(whole)}
    return Configuration(name, "training/divergence.cu", "apex4_divergence", defines)


def _suffix(float32: bool) -> str:
    return "_float32" if float32 else ""


def all_configs(sm: int) -> list[Configuration]:
    """They are the same for every architecture."""
    entries = ("round_activation", "round_activation_back", "round_weight", "round_weight_back")
    return [
        *(rounding_config(entry, float32) for entry in entries for float32 in (False, True)),
        *(feedback_config(float32, sixteen) for float32 in (False, True) for sixteen in (False, True)),
        *(divergence_config(float32, whole) for float32 in (False, True) for whole in (True, False)),
    ]
