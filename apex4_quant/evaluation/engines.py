"""The engines by their names. Neither is imported before it is asked for."""

from __future__ import annotations

from ..distributed.group import Group
from ..errors import UsageError
from .engine import Engine, EngineName


def open_engine(name: str, device: str, group: Group | None = None) -> Engine:
    """The engine `name` for `device`, in one of the processes of `group`. Raises UsageError for one that is not known, not installed, or not for the device."""
    if name == EngineName.TRANSFORMERS:
        from .transformers_engine import TransformersEngine

        return TransformersEngine(device, group)
    if name == EngineName.VLLM and group is not None and group.size > 1:
        raise UsageError("vLLM has processes of its own: start one of 'apex4 eval', or give --engine transformers")
    if name == EngineName.VLLM:
        from .vllm_engine import VllmEngine

        return VllmEngine(device)
    raise UsageError(f"engine {name!r} is not known: give one of {', '.join(EngineName)}")
