"""`apex4 doctor`: whether models compute with the kernels here, and if not, what is missing and what to install."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from .. import __version__
from ..environment import ACTIVATIONS
from ..errors import Apex4Error
from ..format.number_format import BITS
from ..format.storage import format_bytes
from ..kernels.catalogue import kernel_family
from ..kernels.dispatch import AUTO, activation_bits_on, asked_activations
from ..kernels.experts.configs import why_none
from ..kernels.operands import TOKEN_FORMAT
from ..kernels.runtime import compiler
from ..kernels.runtime.architectures import NEVER_RUN, eight_bit_family


class Torch(TypedDict):
    version: str
    cuda: str | None  # that it is built for


class Driver(TypedDict):
    release: str | None  # "580.65.06"
    cuda: str | None  # the newest that the driver knows, "13.0"


class Compiling(TypedDict):
    nvrtc: str | None
    headers: str | None
    problem: str | None  # what is missing, and how to get it


class GpuFound(TypedDict):
    index: int
    name: str
    arch: str
    kernels: str | None  # the family of catalogue.py
    eight_bit_kernels: str | None  # those of 8-bit activations
    activation_bits: int  # with how many linears compute that are quantized for 4
    experts_together: bool  # or one after the other
    computes_with: str


class Cache(TypedDict):
    folder: str
    kernels: int
    bytes: int
    not_writable: str | None  # the reason


class Findings(TypedDict):
    """What `apex4 doctor --json` prints."""

    apex4: str
    python: str
    torch: Torch
    driver: Driver
    packages: dict[str, str | None]  # name: version
    extra: str  # of this package, to be installed here
    compiling: Compiling
    gpus: list[GpuFound]
    cache: Cache
    problems: list[str]


def examine() -> Findings:
    """What is here, as JSON values. `problems` has a sentence for all that keeps a GPU from its kernels; else it is empty."""
    asked_activations()
    driver = _driver()
    torch = _torch()
    extra = _extra(driver["cuda"] or torch["cuda"])
    compiling = _compiling()
    gpus = _gpus()
    problems = []
    if any(gpu["kernels"] or gpu["eight_bit_kernels"] for gpu in gpus):
        if compiling["problem"]:
            problems.append(compiling["problem"])
        elif (
            compiling["nvrtc"]
            and driver["cuda"]
            and int(compiling["nvrtc"].split(".")[0]) > int(driver["cuda"].split(".")[0])
        ):
            problems.append(
                f"NVRTC {compiling['nvrtc']} makes kernels that a driver for CUDA {driver['cuda']} does not load: "
                f"pip install 'apex4-quant[{extra}]', or update the driver"
            )
    elif driver["cuda"] and not torch["cuda"]:
        problems.append(f"torch {torch['version']} is a build without CUDA and cannot use this machine's GPU")
    return {
        "apex4": __version__,
        "python": platform.python_version(),
        "torch": torch,
        "driver": driver,
        "packages": {name: _version(name) for name in ("cuda-core", "cuda-bindings")},
        "extra": extra,
        "compiling": compiling,
        "gpus": gpus,
        "cache": _cache(),
        "problems": problems,
    }


def as_text(found: Findings) -> str:
    torch, driver, compiling, cache = found["torch"], found["driver"], found["compiling"], found["cache"]
    built_for = f"for CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    rows = [
        ("apex4", f"{found['apex4']}, Python {found['python']}"),
        ("torch", f"{torch['version']}, {built_for}"),
        ("driver", _driver_as_text(driver)),
        *(
            (name, version or f"not installed: {_install(found['extra'])}")
            for name, version in found["packages"].items()
        ),
        ("NVRTC", f"{compiling['nvrtc']}, headers in {compiling['headers']}" if compiling["headers"] else "not usable"),
        ("cache", f"{cache['folder']}, {cache['kernels']} kernels, {format_bytes(cache['bytes'])}, {_writable(cache)}"),
    ]
    for gpu in found["gpus"]:
        rows.append((f"GPU {gpu['index']}", f"{gpu['name']}, {gpu['arch']}: {gpu['computes_with']}"))
    if not found["gpus"]:
        rows.append(("GPU", "none that torch can use: models compute through PyTorch operations on the CPU"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {text}" for name, text in rows]
    if compiling["problem"] and not found["problems"]:
        lines.append(f"{compiling['problem']} (needed only where there is a GPU to run kernels, or to build them)")
    lines += [f"problem: {problem}" for problem in found["problems"]]
    return "\n".join(lines)


def _torch() -> Torch:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def _driver() -> Driver:
    """Asked without any package, as these may be what is missing. `cuda` is the newest CUDA that the driver knows."""
    cuda = release = None
    with suppress(OSError):
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    with suppress(OSError):
        found = re.search(r"\d{3,}\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        release = found[0] if found else None
    return {"release": release, "cuda": cuda}


def _driver_as_text(driver: Driver) -> str:
    if not driver["cuda"]:
        return "no NVIDIA driver found"
    return f"{driver['release'] or 'release unknown'}, up to CUDA {driver['cuda']}"


def _extra(cuda: str | None) -> str:
    return "cuda12" if cuda and cuda.split(".")[0] == "12" else "cuda13"


def _install(extra: str) -> str:
    return f"pip install 'apex4-quant[{extra}]'"


def _compiling() -> Compiling:
    found: Compiling = {"nvrtc": None, "headers": None, "problem": None}
    try:
        found["nvrtc"] = compiler.nvrtc_version()
        found["headers"] = str(compiler.header_folder())
    except Apex4Error as error:
        found["problem"] = str(error)
    return found


def _gpus() -> list[GpuFound]:
    import torch

    gpus: list[GpuFound] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        sm = 10 * major + minor
        family, eight_bit = kernel_family(sm), eight_bit_family(sm)
        bits = activation_bits_on(sm, BITS)
        computes = (eight_bit if bits != BITS else family) is not None
        together = computes and _experts_together(sm, family, bits)
        one_by_one = "; experts one after the other" if computes and not together else ""
        gpus.append(
            {
                "index": index,
                "name": torch.cuda.get_device_name(index),
                "arch": f"sm_{major}{minor}",
                "kernels": family,
                "eight_bit_kernels": eight_bit,
                "activation_bits": bits,
                "experts_together": together,
                "computes_with": _computes_with(family, eight_bit, bits) + one_by_one,
            }
        )
    return gpus


def _experts_together(sm: int, family: str | None, bits: int) -> bool:
    format = TOKEN_FORMAT if bits != BITS else (family or "").removeprefix("gemm_")
    return why_none(sm, format, 1) is None


def _computes_with(family: str | None, eight_bit: str | None, bits: int) -> str:
    if bits == BITS:
        if not family:
            return "PyTorch operations, exact but slow: there are no kernels for it"
        of_eight = f"{eight_bit}.cu{_never_run(eight_bit)}" if eight_bit else "PyTorch operations"
        return f"the kernels of {family}.cu; 8-bit activations: {of_eight}"
    with_what = f"the kernels of {eight_bit}.cu" if eight_bit else "PyTorch operations, exact but slow"
    why = "" if asked_activations() == AUTO else f" ({ACTIVATIONS}={asked_activations()})"
    return f"{with_what}, all linears with {bits}-bit activations{why}{_never_run(eight_bit)}"


def _never_run(family: str | None) -> str:
    return ", which never ran on such a GPU" if family in NEVER_RUN else ""


def _cache() -> Cache:
    folder = compiler.cache_folder()
    sizes: list[int] = []
    with suppress(OSError):
        sizes = [path.stat().st_size for path in compiler.cache_entries()]
    return {
        "folder": str(folder),
        "kernels": len(sizes),
        "bytes": sum(sizes),
        "not_writable": compiler.why_not_writable(folder),
    }


def _writable(cache: Cache) -> str:
    return f"not writable ({cache['not_writable']})" if cache["not_writable"] else "writable"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
