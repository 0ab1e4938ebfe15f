"""The engines by their names. Neither is imported before it is asked for."""

from __future__ import annotations

from ..distributed.group import Group
from ..errors import UsageError
from ..hardware.devices import read_device_map
from .engine import Engine, EngineName


def open_engine(name: str, device: str, group: Group | None = None, device_map: str | None = None) -> Engine:
    """The engine `name` for `device` or, in its place, the devices of `device_map`, in one of the processes of `group`.

    Raises UsageError for one that is not known, not installed, or not for the device.
    """
    if device_map is not None:
        _require_one_process(name, device, group)
    if name == EngineName.TRANSFORMERS:
        from .transformers_engine import TransformersEngine

        return TransformersEngine(device, group, None if device_map is None else read_device_map(device_map))
    if name == EngineName.VLLM and group is not None and group.size > 1:
        raise UsageError("vLLM has processes of its own: start one of 'apex4 eval', or give --engine transformers")
    if name == EngineName.VLLM:
        from .vllm_engine import VllmEngine

        return VllmEngine(device)
    raise UsageError(f"engine {name!r} is not known: give one of {', '.join(EngineName)}")


def _require_one_process(name: str, device: str, group: Group | None) -> None:
    if name == EngineName.VLLM:
        raise UsageError(
            "--device-map is for --engine transformers: vLLM spreads a model by tensor parallelism of its own"
        )
    if group is not None and group.size > 1:
        raise UsageError(
            f"--device-map spreads a model that one process computes and {group.size} ranks were started: start one, or "
            "leave --device-map away"
        )
    if device != "auto":
        raise UsageError(f"--device-map says where the model is and --device is {device}: give one of the two")
