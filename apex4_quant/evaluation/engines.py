"""The engines by their names. Neither is imported before it is asked for."""

from __future__ import annotations

from ..errors import UsageError
from .engine import Engine, EngineName


def open_engine(name: str, device: str) -> Engine:
    """The engine `name` for `device`. Raises UsageError for one that is not known, not installed, or not for the device."""
    if name == EngineName.TRANSFORMERS:
        from .transformers_engine import TransformersEngine

        return TransformersEngine(device)
    if name == EngineName.VLLM:
        from .vllm_engine import VllmEngine

        return VllmEngine(device)
    raise UsageError(f"engine {name!r} is not known: give one of {', '.join(EngineName)}")
