"""Putting a loaded model in order: every linear for its device's kernels, and linears that read one tensor together.

`APEX4_FUSE=0` in the environment, or `fuse=False`, leaves every module on its own: each linear quantizes its input itself, and
norms and activation functions return tensors. Results are the same bits; it is slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..environment import FUSE as VARIABLE
from ..errors import UsageError
from ..kernels import dispatch
from ..kernels.operands import TOKEN_FORMAT
from ..models.experts import UnfusedExperts
from ..models.families import Family, InputGroup, expert_of
from .call_scope import CallScope
from .deferring import ATTRIBUTE as DEFERRING
from .deferring import Deferring, defer_gating, defer_norm
from .experts import group_experts
from .linear import Apex4Linear
from .shared_input import SharedInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fusing_is_asked() -> bool:
    """What the environment says. Raises UsageError for a value of APEX4_FUSE that means nothing."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise UsageError(f"{VARIABLE}={asked} is not known: give 0 to fuse nothing, or 1, or unset it")
    return asked != "0"


def prepare_model(
    model: PreTrainedModel, family: Family | None, kernel: str | None = None, fuse: bool | None = None
) -> None:
    """Make every Apex4Linear of a loaded model compute as its device does best, and share inputs where linears do.

    `kernel` is the activation format of the operators on a CPU, for tests; otherwise the device decides, and APEX4_ACTIVATIONS. `fuse`: whether
    linears share inputs, and norms and activation functions are computed by the quantizer behind them; None: APEX4_FUSE
    decides. May be called again at any time; what an earlier call has set up is taken away first.
    """
    fuse = fusing_is_asked() if fuse is None else fuse
    by_torch: list[tuple[str, Apex4Linear]] = []
    for name, module in model.named_modules():
        CallScope.remove_from(module)
        if isinstance(module, UnfusedExperts) and module.together is not None:
            module.together.detach()
        deferring = getattr(module, DEFERRING, None)
        if isinstance(deferring, Deferring):
            deferring.detach()
        if isinstance(module, Apex4Linear):
            if module.shared is not None:
                module.shared.detach()
            if module.weight_packed.device.type != "meta":
                module.prepare(*_arithmetic(module, kernel))
            if module.quantizes_by_torch:
                by_torch.append((name, module))
    if by_torch:
        dispatch.warn_of_wide_groups([name for name, _ in by_torch], by_torch[0][1].format.group_length)
    if family is None or not fuse:
        return
    config = model.config.get_text_config().to_dict()
    prefix = family.layers
    if model.base_model is model:  # a bare base model's names lack the first part
        prefix = prefix.removeprefix(f"{model.base_model_prefix}.")
    for index, layer in enumerate(model.get_submodule(prefix).children()):
        _prepare_layer(layer, family, family.groups(config, index))


def _arithmetic(module: Apex4Linear, kernel: str | None) -> tuple[str | None, int]:
    if kernel is None:
        return module.arithmetic_on(module.weight_packed.device)
    bits = 8 if kernel == TOKEN_FORMAT else module.format.activation_bits
    return (TOKEN_FORMAT if bits == 8 else kernel), bits


def _prepare_layer(layer: nn.Module, family: Family, groups: list[InputGroup]) -> None:
    if _experts_together(layer):
        groups = [group for group in groups if expert_of(group.linears[0]) is None]
    for members in _readers_of_one_tensor(layer, groups):
        shared = SharedInput(members)
        shared.attach(layer)
        shared.fuse()
    for group in groups:
        if group.also_read_by or not all(isinstance(layer.get_submodule(name), Apex4Linear) for name in group.linears):
            continue
        if group.norm is not None:
            if not family.norm_rounds_once:
                defer_norm(layer, group.norm, family.norm_offset, group.linears)
        elif group.producer is not None and group.producer.linear.endswith("up_proj"):
            defer_gating(layer, group.linears[0].rpartition(".")[0])


def _experts_together(layer: nn.Module) -> bool:
    """Whether the layer's experts are computed together. Where kernels compute them one after the other, the user is told."""
    experts = next((module for module in layer.modules() if isinstance(module, UnfusedExperts)), None)
    if experts is None or not any(isinstance(each, Apex4Linear) and each.kernel for each in experts.modules()):
        return False
    reason = group_experts(experts)
    if reason is not None:
        dispatch.say_of_experts(reason)
    return reason is None


def share_input(layer: nn.Module, linears: tuple[str, ...]) -> None:
    """Let `linears` of a decoder layer, which read one tensor, quantize it once. Their own tensors stay as they are."""
    for members in _readers_of_one_tensor(layer, [InputGroup(linears)]):
        SharedInput(members, fusing=False).attach(layer)


def _readers_of_one_tensor(layer: nn.Module, groups: Iterable[InputGroup]) -> Iterator[tuple[Apex4Linear, ...]]:
    """Linears of one parent that read the same tensor and quantize it alike, where there are several.

    Experts read different rows: the gate and up projections of each are on their own.
    """
    alike: dict[tuple[Any, ...], list[Apex4Linear]] = {}
    for position, group in enumerate(groups):
        for name in group.linears:
            module = layer.get_submodule(name)
            if isinstance(module, Apex4Linear):
                how = module.format
                owner = id(module.transform_owner) if how.transform.is_learned else None
                transform = (how.transform, owner, how.activation_clip, how.activation_bits)
                key = (name.rpartition(".")[0], position, how.padded_k, how.group_length, transform)
                alike.setdefault(key, []).append(module)
    return (tuple(members) for members in alike.values() if len(members) > 1)
