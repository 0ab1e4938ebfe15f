"""Which arithmetic a device gets: the kernels of its architecture, or PyTorch operations. Never a silent choice.

A GPU computes with kernels if its architecture has some and cuda.core can compile and launch them; if not, one warning
says what happens instead and what to install. APEX4_KERNEL=reference asks for PyTorch operations everywhere. A CPU has
no kernels and nothing is missing there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache

import torch

from ..environment import KERNEL as VARIABLE
from ..errors import Apex4Error, UsageError
from .runtime import compiler, launcher
from .runtime.architectures import FAMILIES, kernel_family

REFERENCE = "reference"


def kernel_format(device: torch.device) -> str | None:
    """The activation format and weight layout of the kernels that `device` runs, or None: PyTorch operations.

    Raises UsageError for a value of APEX4_KERNEL that means nothing.
    """
    if reference_is_forced() or device.type != "cuda":
        return None
    return _format_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


def reference_is_forced() -> bool:
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", REFERENCE):
        raise UsageError(
            f"{VARIABLE}={asked} is not known: give '{REFERENCE}', or unset it to compute with the kernels"
        )
    return asked == REFERENCE


@cache
def _format_of_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    family = kernel_family(10 * major + minor)
    name = torch.cuda.get_device_name(index)
    if family is None:
        known = ", ".join(f"sm_{sm}" for sm in FAMILIES)
        _warn(f"{name} is sm_{major}{minor}, and apex4 has kernels for {known}")
        return None
    try:
        _require_tools(index)
    except Apex4Error as error:
        _warn(f"the kernels for {name} cannot run: {error}")
        return None
    return family.removeprefix("gemm_")


def _require_tools(index: int) -> None:
    """Raise Apex4Error, saying what to install, if kernels cannot be compiled or launched here."""
    compiler.nvrtc_version()
    compiler.header_folder()
    launcher.primary_context(index)


@cache
def warn_of_dtype(dtype: torch.dtype) -> None:
    """Called where kernels are there and the activations are none they read."""
    name = str(dtype).removeprefix("torch.")
    _warn(f"the kernels read bfloat16 and float16, and the model runs in {name} (load it with dtype=torch.bfloat16)")


def warn_of_wide_groups(linears: Sequence[str], group_length: int) -> None:
    """Called where linears have a learned transform and groups of more than 128, which no kernel quantizes."""
    more = len(linears) - 1
    others = f" and {more} other linear{'s' if more > 1 else ''} have" if more else " has"
    _warn(
        f"{linears[0]}{others} a learned transform with groups of {group_length}, and the kernels have learned transforms with "
        "groups of 128 only",
        "quantizing their inputs",
    )


def _warn(reason: str, what: str = "computing") -> None:
    warnings.warn(f"apex4: {reason}; {what} with PyTorch operations, exact but slow", RuntimeWarning, stacklevel=2)
