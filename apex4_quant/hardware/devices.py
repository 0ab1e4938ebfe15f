"""Where and in which dtype things are computed, from what the user gave."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..private_names import replace_forward
from .dtype_names import DTYPE_NAMES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def resolve_device(device: str) -> str:
    """`auto` -> cuda if there is one, else cpu. Raises UsageError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not known: give cpu, cuda, cuda:N or auto")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} is asked for and torch finds no CUDA GPU: give --device cpu")
    index = device.partition(":")[2]
    if ":" in device and (kind == "cpu" or not index.isdecimal() or int(index) >= torch.cuda.device_count()):
        raise UsageError(f"device {device!r} is not there: torch finds {torch.cuda.device_count()} CUDA GPUs")
    return device


def room_on_host(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """For what comes from a GPU or goes there: pinned memory, as long as the system allows more of it."""
    with contextlib.suppress(RuntimeError):
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype)


def on_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same; copies of what is on a GPU, in pinned memory, which takes them ten times as fast as memory that nobody has touched."""
    copies, devices = {}, set()
    for name, tensor in tensors.items():
        copies[name] = tensor
        if tensor.is_cuda:
            devices.add(tensor.device)
            copies[name] = room_on_host(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


DISK = "disk"
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # names that accelerate makes a map of
DeviceMap = str | dict[str, str]


def read_device_map(text: str) -> DeviceMap:
    """One of accelerate's names, or a JSON file that says where each module is: {"model.layers.0": "cuda:0", ...}.

    Raises UsageError for another name, a file that is no such map, and devices that are not here.
    """
    if text in SPREAD:
        return text
    path = Path(text).expanduser()
    named = f"give {', '.join(SPREAD)}, or a JSON file of modules and devices"
    if not path.is_file():
        raise UsageError(f"--device-map {text!r} is not known and no file: {named}")
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--device-map {text} is no JSON file ({error}): {named}") from error
    if not isinstance(found, dict) or not found or not all(isinstance(place, str) for place in found.values()):
        raise UsageError(f'--device-map {text} is no map of modules to devices, as {{"model.layers.0": "cuda:0"}}')
    for module, place in found.items():
        if place == "auto" or place == "cuda":
            raise UsageError(f"--device-map {text} has {place!r} for {module!r}: give cuda:N, cpu or {DISK}")
        if place != DISK:
            resolve_device(place)
    return found


def resolve_dtype(dtype: str, config: dict[str, Any]) -> str:
    """`auto` -> the checkpoint's own. Raises UsageError for a dtype nothing computes in."""
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: give one of {', '.join(DTYPES)}, or auto")
    return dtype


def multiplies_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """False for 16 bits on a CPU without instructions for them: PyTorch's products are 5 to 50 times slower there than in
    float32 (measured on AVX2)."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    asked = getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None
    return asked is not None and bool(asked())


_WIDENED_ELEMENTS = 2**22  # of a weight, at one time


def multiply_in_float32(model: nn.Module) -> None:
    """Let the 16-bit nn.Linear of `model` multiply in float32 and round the result, as a CPU with instructions for them does.

    For CPUs without (`multiplies_fast`); linears that are in float32, or elsewhere, compute as ever.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            replace_forward(module, partial(_linear_in_float32, module))


def _linear_in_float32(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if self.weight.dtype == torch.float32 or self.weight.device.type != "cpu":
        return nn.functional.linear(x, self.weight, self.bias)
    wide = x.float()
    rows = max(1, _WIDENED_ELEMENTS // self.in_features)
    parts = [nn.functional.linear(wide, part.float()) for part in self.weight.split(rows)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
