"""The experts of a layer in the launches of one linear: torch.ops.apex4.experts in the place of a loop over its modules.

The experts stay modules of their own (models/experts.py), stored and hooked one by one. Their tensors lie one behind the
other in stacked ones, of which each linear's parameter is a view: no memory is used twice. Where somebody looks at what passes
between the modules, or the input is none that kernels read, they are called one after the other as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..format.layout_name import KERNEL_TILE_N
from ..format.number_format import BLOCK, CODE_MAX
from ..format.transform_kind import TransformKind
from ..kernels import cuda_ops
from ..kernels.experts import ops
from ..kernels.experts.configs import why_none
from ..kernels.operands import HALVES, TOKEN_FORMAT, layout_of_format
from ..kernels.quantize.configs import prepack_matrix
from ..kernels.quantize.hadamard_product import signs
from ..models.experts import Expert, UnfusedExperts
from ..private_names import is_offloaded, mark_static_address
from .linear import PREPARING, Apex4Linear
from .observers import Observers

PARTS = ("gate_proj", "up_proj", "down_proj")
_T = TypeVar("_T")


class GroupedExperts:
    """Computes what `module` does. Made by `group_experts`."""

    def __init__(self, module: UnfusedExperts) -> None:
        self.module = module
        experts = _experts(module)
        self.entering = [linear for expert in experts for linear in (expert.gate_proj, expert.up_proj)]
        self.leaving = [expert.down_proj for expert in experts]
        self.stale = True  # the linears' tensors are not, or not any more, views of the stacked ones
        self._sides: tuple[tuple[Any, ...], tuple[Any, ...]] | None = None
        self._factors: torch.Tensor | None = None
        self._matrices: dict[torch.dtype, torch.Tensor] = {}  # of the down projections, where they are learned
        names = [f"{index}.{part}" for index in range(len(experts)) for part in (*PARTS, "act_fn")]
        self._observers = Observers(module, names, module)
        for linear in (*self.entering, *self.leaving):
            linear.shared = self
        module.together = self

    def detach(self) -> None:
        self.module.together = None
        for linear in (*self.entering, *self.leaving):
            linear.shared = None

    def output_of(self, member: Any, x: Any) -> None:
        """A linear that is called alone computes alone (linear.InputSharing)."""

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """As UnfusedExperts.forward; None: the experts have to be called."""
        if hidden_states.dtype not in HALVES or self._is_observed():
            return None
        if self.stale and not torch.compiler.is_compiling():
            self.stack()
        if self.stale or self._sides is None or self.leaving[0].weight_packed.device != hidden_states.device:
            return None
        first, (entering, leaving) = self.entering[0], self._sides
        in_matrix = first.quantizer_arguments(hidden_states.dtype, hidden_states.device)[0]
        y: torch.Tensor = ops.experts(
            hidden_states, top_k_index, top_k_weights, None, *entering[:3], in_matrix, *entering[3:], *leaving[:3],
            self._matrix(hidden_states), *leaving[3:], self._factors, first.kernel,
        )  # fmt: skip
        return y

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
    def _is_observed(self) -> bool:
        return self._observers.there_are()

    @torch.inference_mode(False)  # the first call of a model is often under it, and parameters live on
    def stack(self) -> None:
        """Put the linears' tensors one behind the other. Idempotent, and safe in any thread."""
        with PREPARING:
            if not self.stale:  # another thread was first
                return
            self._sides, self._matrices = None, {}
            if why_not(self.module) is None:
                self._sides = self._side(self.entering, 2), self._side(self.leaving, 1)
                self._factors = self._clip_factors()
            self.stale = False

    def _side(self, linears: list[Apex4Linear], members: int) -> tuple[Any, ...]:
        """The operator's arguments of one product but for its matrix. `members`: linears of an expert."""
        first, experts = linears[0], len(linears) // members
        packed = _stacked([linear.weight_packed for linear in linears], experts)
        _view_parameters(linears, "weight_packed", packed)
        unit = None
        if first.folded is not None:
            folded = [linear.folded for linear in linears if linear.folded is not None]
            scale, unit = (_stacked([pair[which] for pair in folded], experts) for which in (0, 1))
            for linear, ratio, own in zip(linears, scale.view(len(linears), *folded[0][0].shape), unit.view(len(linears), -1), strict=True):  # fmt: skip
                linear.folded = ratio, own
        else:
            scale = _stacked([linear.weight_scale for linear in linears], experts)
            _view_parameters(linears, "weight_scale", scale)
        for tensor in (packed, scale, unit):
            if tensor is not None:
                mark_static_address(tensor)  # they are weights
        hadamard = first.format.transform is TransformKind.HADAMARD
        clip = 1.0 if first.kernel == TOKEN_FORMAT else first.format.activation_clip
        return packed, scale, unit, members * first.out_features, first.format.padded_k, clip, hadamard

    def _clip_factors(self) -> torch.Tensor | None:
        clips = [linear.format.activation_clip for linear in self.leaving]
        if self.leaving[0].kernel == TOKEN_FORMAT or len(set(clips)) == 1:
            return None
        device = self.leaving[0].weight_packed.device
        if device.type == "cuda":  # the matrix that they are used with
            for dtype in HALVES:
                signs(torch.cuda.current_device() if device.index is None else device.index, dtype)
        return torch.tensor([clip / CODE_MAX for clip in clips], dtype=torch.float32, device=device)

    def _matrix(self, x: torch.Tensor) -> torch.Tensor | None:
        """The learned transforms of the down projections as the operator reads them."""
        if not self.leaving[0].format.transform.is_learned:
            return None
        found = self._matrices.get(x.dtype)
        if found is None:
            # As Apex4Linear._kernel_matrix.
            with contextlib.nullcontext() if torch.compiler.is_compiling() else PREPARING, torch.inference_mode(False):
                found = torch.stack([_kernel_matrix(linear, x.dtype) for linear in self.leaving])
                self._matrices[x.dtype] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy of the model the parameters are tensors of their own: they are stacked again when it is called.
        return self.__dict__ | {"stale": True, "_sides": None, "_factors": None, "_matrices": {}}


def group_experts(module: UnfusedExperts) -> str | None:
    """Let the experts of a layer be computed together. Returns why they are not, or None."""
    reason = why_not(module)
    if reason is None:
        GroupedExperts(module).stack()
    return reason


def why_not(module: UnfusedExperts) -> str | None:
    """Why the experts of a layer have to be computed one after the other; None: they have not."""
    experts = _experts(module)
    linears = [getattr(expert, part) for expert in experts for part in PARTS]
    if not all(isinstance(linear, Apex4Linear) for linear in linears):
        return "some of their linears are not quantized"
    first, device = linears[0], linears[0].weight_packed.device
    if device.type == "meta" or any(
        is_offloaded(linear) or linear.weight_packed.device != device for linear in linears
    ):
        return "they are not all on one device"
    kernel = first.kernel
    if kernel is None or any(linear.kernel != kernel for linear in linears):
        return "they have activations of different formats"
    if experts[0].gating is not None:
        return "they join gate and up in another way than SiLU(gate) * up"
    act_fn = experts[0].act_fn
    if not isinstance(act_fn, nn.SiLU) and type(act_fn).__name__ != "SiLUActivation":
        return f"there is none for the activation function {type(act_fn).__name__}"
    layout = layout_of_format(kernel).name
    if any(linear.bias is not None or linear.layout.name != layout for linear in linears):
        return "their linears have biases, or their weights are in another order"
    gates, downs = [expert.gate_proj for expert in experts], [expert.down_proj for expert in experts]
    ups = [expert.up_proj for expert in experts]
    if not _alike([*gates, *ups], lambda linear: (*_shape(linear), linear.format.activation_clip, _transform(linear))):
        return "their gate and up projections do not quantize one input alike"
    if not _alike(downs, lambda linear: (*_shape(linear), linear.format.transform)):
        return "their down projections differ in shape, group size or transform"
    if gates[0].out_features % KERNEL_TILE_N:
        return f"their {gates[0].out_features} inner features are no multiple of {KERNEL_TILE_N}"
    same_clips = kernel == TOKEN_FORMAT or _alike(downs, lambda linear: linear.format.activation_clip)
    if not same_clips and downs[0].format.transform is TransformKind.NONE:
        return "their down projections have clip ratios of their own and no transform"
    sm = (
        cuda_ops.gpu(torch.cuda.current_device() if device.index is None else device.index)[0]
        if device.type == "cuda"
        else 80
    )
    for linear in (gates[0], downs[0]):
        reason = why_none(sm, kernel, linear.format.group_length // BLOCK)
        if reason is not None:
            return reason
    return None


def _experts(module: UnfusedExperts) -> list[Any]:
    return [expert for expert in module if isinstance(expert, Expert)]


def _alike(linears: list[Any], key: Callable[[Any], object]) -> bool:
    return len({key(linear) for linear in linears}) == 1


def _shape(linear: Apex4Linear) -> tuple[int, int, int, int]:
    format = linear.format
    return format.out_features, format.in_features, format.padded_k, format.group_length


def _transform(linear: Apex4Linear) -> object:
    kind = linear.format.transform
    return kind, id(linear.transform_owner) if kind.is_learned else None


def _kernel_matrix(linear: Apex4Linear, dtype: torch.dtype) -> torch.Tensor:
    matrix = linear.transform_matrix()
    assert matrix is not None
    if matrix.device.type != "cuda":
        return matrix
    return prepack_matrix(matrix[:1] if linear.format.transform is TransformKind.SHARED else matrix, dtype)


def _stacked(parts: list[torch.Tensor], experts: int) -> torch.Tensor:
    """The parts, as many of each expert, one behind the other: [experts, ...]."""
    whole = torch.cat([part.detach() for part in parts])
    return whole.view(experts, len(whole) // experts, *whole.shape[1:])


def _view_parameters(linears: list[Apex4Linear], name: str, whole: torch.Tensor) -> None:
    for linear, part in zip(linears, _parts(whole, len(linears)), strict=True):
        getattr(linear, name).data = part


def _parts(whole: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    flat = whole.flatten(0, 1)
    return iter(flat.split(len(flat) // count))
