"""How much memory a run may use, and how much one used: of the host and of the GPU."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B", re.ASCII)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that may be used; None: what there is."""

    host: int | None = None
    gpu: int | None = None

    @classmethod
    def parse(cls, text: str) -> MemoryBudget:
        """ "20GiB" of both, or "host=16GiB,gpu=20GiB", or one of these. Raises UsageError."""
        if "=" not in text:
            size = _size(text, text)
            return cls(size, size)
        found: dict[str, int] = {}
        for part in text.split(","):
            name, _, size_text = part.partition("=")
            if name.strip() not in ("host", "gpu") or name.strip() in found:
                raise _bad(text)
            found[name.strip()] = _size(size_text, text)
        return cls(**found)

    def as_dict(self) -> dict[str, int | None]:
        return {"host": self.host, "gpu": self.gpu}


def _size(text: str, whole: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    size = 0 if found is None else int(float(found[1]) * _UNITS[found[2]])
    if not 0 < size < 2**60:
        raise _bad(whole)
    return size


def _bad(text: str) -> UsageError:
    return UsageError(f"--memory is {text!r}: give a size such as 20GiB for both, or host=16GiB,gpu=20GiB")


@dataclass(frozen=True)
class MemoryUse:
    """The most bytes at one moment: `host` resident, of the whole process; `gpu` held by torch on the device, None on a CPU,
    and `gpu_tensors` of these in tensors."""

    host: int
    gpu: int | None = None
    gpu_tensors: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"host": self.host} | ({} if self.gpu is None else {"gpu": self.gpu, "gpu_tensors": self.gpu_tensors})


def begin_counting(device: str) -> None:
    """From now on `memory_used` counts anew, where the system lets it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def memory_used(device: str) -> MemoryUse:
    """Since `begin_counting`, or since the process began."""
    host = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not device.startswith("cuda"):
        return MemoryUse(host)
    return MemoryUse(host, torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device))


def resident_now() -> int:
    """Bytes of the process that are resident now."""
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    """In bytes, 0 where the system has no such account."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 0 if found is None else int(found[1]) * 1024
    return 0


@contextlib.contextmanager
def held_to(gpu: int | None, device: str) -> Iterator[None]:
    """torch takes at most so many bytes of the GPU while this lasts: more is out of memory."""
    if gpu is None or not device.startswith("cuda"):
        yield
        return
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index  # a limit is for a GPU with a number
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpu / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
