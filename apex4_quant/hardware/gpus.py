"""The GPUs the planner knows. Rates are dense datasheet figures; rho = INT4 tensor-core rate / FP32 CUDA-core rate.

Hopper has no INT4 tensor cores, so that its rho is that of 8-bit products. docs/issue_slots.md names the rates that are
not simply read off a datasheet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError
from ..format.layout_name import LayoutName


@dataclass(frozen=True)
class Gpu:
    """`int4_tops` is None where the tensor cores have no INT4 mode and 8-bit ones do the work (`int8_tops`)."""

    name: str
    sm: int
    int4_tops: float | None
    int8_tops: float
    fp16_tflops: float  # FP32 accumulation
    fp32_tflops: float
    memory_gbs: float  # GB/s, 10^9 bytes
    sms: int
    clock_mhz: int  # the boost clock the tensor rates are quoted at
    note: str = ""  # where a rate is not simply the datasheet's

    @property
    def tensor_ops_per_clock(self) -> float:
        """Of one SM with 4-bit activations, a multiply-add being two operations."""
        return self.ops_per_clock(4)

    def ops_per_clock(self, activation_bits: int) -> float:
        """Of one SM's tensor cores, a multiply-add being two operations, as the kernels for 4- or 8-bit activations use them."""
        return (self.tensor_tops if activation_bits == 4 else self.int8_tops) * 1e6 / (self.sms * self.clock_mhz)

    @property
    def tensor_tops(self) -> float:
        """The tensor-core rate the kernel uses, in 10^12 operations a second."""
        return self.int4_tops or self.int8_tops

    @property
    def rho(self) -> float:
        """Ratio of the tensor-core rate the kernel uses to the FP32 CUDA-core rate."""
        return self.tensor_tops / self.fp32_tflops


# Rates, SMs and clocks from NVIDIA's datasheets and architecture whitepapers: A100 80GB SXM, RTX 3090 (GA102), A40, A10,
# RTX 4090 (Ada), L40S, L40, H100 SXM, H200 SXM. `tensor_ops_per_clock` is a check on them: 8192 on the A100 and in 8 bits
# on the H100, 4096 on GA102 and AD102 (568, 598.7, 500 and 1321 TOPS are that).
# L40S: its datasheet prints 733 dense for INT8 and INT4 alike, which would be half of AD102's INT4 rate while INT8 has
# all of its own; the Ada whitepaper has INT4 twice as fast as INT8 (RTX 4090: 1321 and 660.6), and so has a measurement on
# AD103 (RTX 4070 Ti SUPER, 66 SMs: 754.8 TOPS, register-resident mma of u4, github.com/JustAResearcher/gpu-unlock-ada,
# release 1.1.1). 4096 x 142 SMs x 2.52 GHz is 1466. Not measured on an L40S. The paper's rho = 8 is the datasheet's 733.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 1248, 624, 312, 19.5, 2039, 108, 1410),
        Gpu("RTX 3090", 86, 568, 284, 71, 35.6, 936, 82, 1695),
        Gpu("A40", 86, 598.7, 299.3, 149.7, 37.4, 696, 84, 1740),
        Gpu("A10", 86, 500, 250, 125, 31.2, 600, 72, 1695),
        Gpu("RTX 4090", 89, 1321, 660.6, 165, 82.6, 1008, 128, 2520),
        Gpu("L40S", 89, 1466, 733, 362, 91.6, 864, 142, 2520, "INT4 from AD102's rate per SM; the datasheet says 733"),
        Gpu("L40", 89, 724, 362, 181, 90.5, 864, 142, 2490, "the datasheet's INT4 is half of AD102's rate per SM"),
        Gpu("H100", 90, None, 1979, 989, 66.9, 3350, 132, 1830),
        Gpu("H200", 90, None, 1979, 989, 66.9, 4800, 132, 1830),
    )
}


@dataclass(frozen=True)
class Target:
    """What a checkpoint is packed for. `gpu` is None for a bare architecture or for no GPU at all."""

    gpu: str | None
    arch: str | None
    layout: LayoutName


def _fold(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")


def resolve_target(text: str) -> Target:
    """Turn `--target` (a GPU of the table, `sm_XX`, `auto` or `none`) into a Target.

    `auto` is the GPU found, else `none`: no GPU and the plain layout. Raises UsageError for a name that is not known.
    """
    if text == "auto":
        return _detect()
    if text == "none":
        return Target(gpu=None, arch=None, layout=LayoutName.ROWMAJOR)
    arch = re.fullmatch(r"sm_?(\d{2,3})a?", text.lower())
    if arch:
        sm = int(arch.group(1))
        if sm < 75:
            raise UsageError(
                f"target {text!r} has no INT4 or 8-bit tensor cores to compute with: sm_75 or newer is needed"
            )
        return Target(gpu=None, arch=f"sm_{sm}", layout=LayoutName.of_gpu(sm))
    for gpu in GPUS.values():
        if _fold(gpu.name) == _fold(text) or _fold(gpu.name).removeprefix("rtx") == _fold(text):
            return Target(gpu=gpu.name, arch=f"sm_{gpu.sm}", layout=LayoutName.of_gpu(gpu.sm))
    raise UsageError(
        f"target {text!r} is not known: give one of {', '.join(GPUS)}, sm_XX (for example sm_86), auto or none"
    )


def _detect() -> Target:
    import torch

    if not torch.cuda.is_available():
        return resolve_target("none")
    major, minor = torch.cuda.get_device_capability()
    found = " ".join(re.split(r"[^A-Z0-9]+", torch.cuda.get_device_name().upper()))
    name = next(
        (g.name for g in GPUS.values() if f" {g.name.upper()} " in f" {found} " and g.sm == major * 10 + minor), None
    )
    return Target(gpu=name, arch=f"sm_{major}{minor}", layout=LayoutName.of_gpu(major * 10 + minor))
