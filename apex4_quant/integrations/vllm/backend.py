"""What computes on a device: kernels, or PyTorch operations behind two operators that torch.compile does not look into.

apex4_vllm::cached_linear   weights as `torch_backend.grouped_weight` prepares them, or with 8-bit activations `folded_weight`
apex4_vllm::packed_linear   weights as they are stored, unpacked at every call
"""

from __future__ import annotations

import warnings

import torch

from ...environment import KERNEL
from ...errors import Apex4Error
from ...format.layouts import get_layout
from ...format.number_format import BITS
from ...format.quant_config import LinearFormat
from ...kernels import dispatch, ops, torch_backend

library = torch.library.Library("apex4_vllm", "DEF")
_HOW = "Tensor? bias, Tensor? matrix, float clip, bool hadamard, int activation_bits"
for _schema in (
    f"cached_linear(Tensor x, Tensor weight, Tensor? scale, {_HOW}) -> Tensor",
    f"packed_linear(Tensor x, Tensor weight_packed, Tensor weight_scale, int n, str layout, {_HOW}) -> Tensor",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("apex4_vllm::cached_linear", lib=library)
def _(x: torch.Tensor, weight: torch.Tensor, *how: object) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[-2]))


@torch.library.register_fake("apex4_vllm::packed_linear", lib=library)
def _(x: torch.Tensor, weight_packed: torch.Tensor, weight_scale: torch.Tensor, n: int, *how: object) -> torch.Tensor:
    return x.new_empty((x.shape[0], n))


def cached_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    matrix: torch.Tensor | None,
    clip: float,
    hadamard: bool,
    activation_bits: int,
) -> torch.Tensor:
    """x [M, K] -> [M, N] of x's dtype; weight [G, N, g] and scale [G, N] or None are `grouped_weight`'s.

    With 8-bit activations they are [N, K] and [N], `folded_weight`'s.
    """
    if activation_bits == 8:
        return _cached_folded(x, weight, scale, bias, matrix, hadamard)
    groups, n, group = weight.shape
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    for rows in torch_backend.row_ranges(x.shape[0], groups * group, x.device):
        part = torch.nn.functional.pad(x[rows], (0, groups * group - x.shape[1]))
        codes, scale_a = torch_backend.quantize_activation(part, group, clip, hadamard, matrix)
        y[rows] = torch_backend.multiply(codes, scale_a, weight, scale, bias).to(x.dtype)
    return y


def _cached_folded(
    x: torch.Tensor,
    weight: torch.Tensor,
    unit: torch.Tensor | None,
    bias: torch.Tensor | None,
    matrix: torch.Tensor | None,
    hadamard: bool,
) -> torch.Tensor:
    n, k = weight.shape
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    for rows in torch_backend.row_ranges(x.shape[0], k, x.device):
        part = torch.nn.functional.pad(x[rows], (0, k - x.shape[1]))
        codes, scale_a = torch_backend.quantize_token(part, hadamard, matrix)
        y[rows] = torch_backend.multiply_folded(codes, scale_a, weight, unit, bias).to(x.dtype)
    return y


def packed_linear(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    n: int,
    layout: str,
    bias: torch.Tensor | None,
    matrix: torch.Tensor | None,
    clip: float,
    hadamard: bool,
    activation_bits: int,
) -> torch.Tensor:
    order = get_layout(layout)
    weight = order.unpack(weight_packed, n), order.unpack_scales(weight_scale, n), bias
    return torch_backend.linears(x, [weight], clip, hadamard, matrix, activation_bits)[0]


for _device in ("CPU", "CUDA"):
    library.impl("cached_linear", cached_linear, _device)
    library.impl("packed_linear", packed_linear, _device)


def arithmetic_of(device: torch.device, dtype: torch.dtype, format: LinearFormat) -> tuple[str | None, int]:
    """What `kernel_of` says of a linear of this format, and with how many bits of its input it computes."""
    bits = format.activation_bits
    if format.may_have_eight_bits:
        bits = dispatch.activation_bits(device, bits)
    if bits != format.activation_bits:
        dispatch.say_of_eight_bits(device)
    return kernel_of(device, dtype, bits), bits


def kernel_of(device: torch.device, dtype: torch.dtype, activation_bits: int = BITS) -> str | None:
    """The activation format of the kernels that compute on `device`, or None: PyTorch operations.

    Raises Apex4Error for a GPU without kernels, or a dtype that they do not read, unless APEX4_KERNEL=reference.
    """
    if dispatch.reference_is_forced() or device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        kernel = dispatch.kernel_format(device, activation_bits)
    advice = f"or set {KERNEL}={dispatch.REFERENCE} to compute with PyTorch operations, exact but slow"
    if kernel is None:
        reason = str(reasons[0].message) if reasons else f"{torch.cuda.get_device_name(device)} has no apex4 kernels"
        reason = reason.removeprefix("apex4: ").partition("; computing with")[0]
        raise Apex4Error(f"{reason}: serve on a GPU that has them, {advice}")
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise Apex4Error(
            f"the kernels read bfloat16 and float16 and the model runs in {name}: give --dtype bfloat16, {advice}"
        )
    ops.prepare(device)
    return kernel


class FloatBudget:
    """How many bytes of float32 weights a CPU keeps: half of the memory that was free when the first were made."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.refused = 0

    def take(self, size: int) -> bool:
        """Whether `size` more bytes may be kept."""
        if self.left is None:
            import psutil  # vLLM needs it

            self.left = psutil.virtual_memory().available // 2
        if size > self.left:
            self.refused += 1
            return False
        self.left -= size
        return True
