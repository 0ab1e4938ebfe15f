"""Which arithmetic a device gets: the kernels of its architecture, or PyTorch operations. Never a silent choice.

A GPU computes with kernels if its architecture has some and cuda.core can compile and launch them; if not, one warning
says what happens instead and what to install. APEX4_KERNEL=reference asks for PyTorch operations everywhere. A CPU has
no kernels and nothing is missing there.

A linear's activations have 4 or 8 bits, as the checkpoint says. On a GPU that multiplies in 8 bits anyway linears of 4 bits
compute with 8, which is more exact, and faster for many tokens; APEX4_ACTIVATIONS=4 keeps them at 4.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache

import torch

from ..environment import ACTIVATIONS
from ..environment import KERNEL as VARIABLE
from ..errors import Apex4Error, UsageError
from .operands import TOKEN_FORMAT
from .runtime import compiler, launcher
from .runtime.architectures import (
    EIGHT_BIT_FAMILIES,
    FAMILIES,
    eight_bit_family,
    gains_by_eight_bits,
    kernel_family,
)

REFERENCE = "reference"
AUTO = "auto"
_EIGHT_BIT_KERNELS = "kernels for 8-bit activations"


def activation_bits(device: torch.device, stored: int) -> int:
    """With how many bits of its input a linear computes on `device`, for which the checkpoint says `stored`.

    Never with fewer. APEX4_ACTIVATIONS=8 is 8 everywhere, 4 what the checkpoint says; auto is 8 on a GPU that gains by it, and
    elsewhere what the checkpoint says. Raises UsageError for another value.
    """
    return activation_bits_on(_architecture(_index_of(device)) if device.type == "cuda" else None, stored)


def activation_bits_on(sm: int | None, stored: int) -> int:
    """`activation_bits` of a GPU of this architecture; None: of a CPU."""
    asked = asked_activations()
    if stored == 8 or asked == "8":
        return 8
    return 8 if asked == AUTO and sm is not None and gains_by_eight_bits(sm) else stored


def asked_activations() -> str:
    """What APEX4_ACTIVATIONS says: "4", "8" or "auto". Raises UsageError for another value."""
    asked = os.environ.get(ACTIVATIONS, "") or AUTO
    if asked not in ("4", "8", AUTO):
        raise UsageError(f"{ACTIVATIONS}={asked} is not known: give 4, 8 or {AUTO}")
    return asked


def kernel_format(device: torch.device, activation_bits: int = 4) -> str | None:
    """The activation format of the kernels that `device` runs for linears of 4- or 8-bit activations, or None: PyTorch operations.

    The layout of the weights is `operands.layout_of_format`. Raises UsageError for a value of APEX4_KERNEL that means nothing.
    """
    if reference_is_forced() or device.type != "cuda":
        return None
    return _format_of_gpu(_index_of(device), activation_bits)


def _index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def reference_is_forced() -> bool:
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", REFERENCE):
        raise UsageError(
            f"{VARIABLE}={asked} is not known: give '{REFERENCE}', or unset it to compute with the kernels"
        )
    return asked == REFERENCE


@cache
def _format_of_gpu(index: int, activation_bits: int) -> str | None:
    sm = _architecture(index)
    family = kernel_family(sm) if activation_bits == 4 else eight_bit_family(sm)
    name = torch.cuda.get_device_name(index)
    if family is None:
        what, families = ("kernels", FAMILIES) if activation_bits == 4 else (_EIGHT_BIT_KERNELS, EIGHT_BIT_FAMILIES)
        known = ", ".join(f"sm_{sm}" for sm in families)
        _warn(f"{name} is sm_{sm}, and apex4 has {what} for {known or 'no GPU yet'}")
        return None
    try:
        _require_tools(index)
    except Apex4Error as error:
        _warn(f"the kernels for {name} cannot run: {error}")
        return None
    return TOKEN_FORMAT if activation_bits == 8 else family.removeprefix("gemm_")


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


@cache
def say_of_eight_bits(device: torch.device) -> None:
    """Called where linears that the checkpoint has with 4-bit activations compute with 8."""
    asked = asked_activations()
    what = "linears quantized for 4-bit activations compute with 8 bits, which is"
    if asked == AUTO:
        name = torch.cuda.get_device_name(device)
        text = f"on {name} {what} faster there for many tokens and more exact; set {ACTIVATIONS}=4 to compute with 4"
    else:
        text = f"{ACTIVATIONS}={asked}: {what} more exact"
    warnings.warn(f"apex4: {text}", UserWarning, stacklevel=2)


@cache
def say_of_experts(reason: str) -> None:
    """Called where experts compute with kernels and one after the other."""
    text = f"experts compute one after the other, as no kernel computes them together: {reason}"
    warnings.warn(f"apex4: {text}", UserWarning, stacklevel=2)


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
