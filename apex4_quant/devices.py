"""Where and in which dtype things are computed, from what the user gave."""

from __future__ import annotations

from typing import Any

import torch

from .errors import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


def resolve_dtype(dtype: str, config: dict[str, Any]) -> str:
    """`auto` -> the checkpoint's own. Raises UsageError for a dtype nothing computes in."""
    if dtype == "auto":
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPES:
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
