"""Experts in one call of an operator: the same as their modules one after the other, and where they are called as before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from apex4_quant.format.feedback import clip_row
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels import dispatch
from apex4_quant.models.experts import Expert, UnfusedExperts
from apex4_quant.nn.experts import PARTS, GroupedExperts, group_experts, why_not
from apex4_quant.nn.linear import Apex4Linear

EXPERTS, HIDDEN, INNER = 4, 200, 128


def made(
    transform: str = "hadamard128", clips: bool = True, inner: int = INNER, kernel: str | None = "s8"
) -> UnfusedExperts:
    """Random experts prepared for a kernel's format. Down projections have a clip and a learned transform of their own each."""
    torch.manual_seed(1)
    module = UnfusedExperts(Expert(HIDDEN, inner, nn.SiLU(), torch.bfloat16) for _ in range(EXPERTS))
    owner: Apex4Linear | None = None
    for index, expert in enumerate(module):
        for part in PARTS:
            n, k = (HIDDEN, inner) if part == "down_proj" else (inner, HIDDEN)
            kind = TransformKind(transform)
            clip = 0.8 + 0.05 * index if clips and part == "down_proj" else 0.9
            clip = 1.0 if kind.has_block_clips else clip
            takes = owner is not None and part != "down_proj" and kind.is_learned
            format = LinearFormat(
                n, k, 128, get_layout("rowmajor"), transform, clip, transform_from="a" if takes else None
            )
            codes = torch.randint(-7, 8, (n, format.padded_k), dtype=torch.int8)
            scales = (torch.rand(n, format.groups) * 0.02 + 5e-3).half()
            learned = kind.is_learned and not takes
            matrix = torch.randn(format.padded_k // 128, kind.matrix_rows, 128).half() / 128**0.5 if learned else None
            if matrix is not None and kind.has_block_clips:
                matrix[:, -1:] = clip_row(torch.full((len(matrix),), 0.875 + 0.0625 * index))
            linear = Apex4Linear.from_codes(format, codes, scales, None, matrix)
            if takes and owner is not None:
                linear.take_transform_from(owner)
            elif part != "down_proj":
                owner = linear
            setattr(expert, part, linear)
    for linear in linears(module):
        linear.prepare(kernel)
        linear._prepared_on = torch.device("cpu")
    return module


def linears(module: UnfusedExperts) -> list[Apex4Linear]:
    return [each for each in module.modules() if isinstance(each, Apex4Linear)]


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(11, EXPERTS, generator=generator).topk(2).indices
    return torch.randn(11, HIDDEN, generator=generator).to(dtype), ids, torch.rand(11, 2, generator=generator)


def one_after_the_other(module: UnfusedExperts) -> torch.Tensor:
    """The modules' own outputs, added in the order of a token's choices in float32."""
    x, ids, weights = inputs()
    total = torch.zeros(x.shape)
    for place in range(ids.shape[1]):
        for token in range(len(x)):
            y = module[int(ids[token, place])](x[token : token + 1])
            total[token].addcmul_(y[0].float(), weights[token, place])
    return total.to(x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["s8", "sm80"])
@pytest.mark.parametrize("transform", ["hadamard128", "dense128", "feedback128", "feedback128x16"])
def test_they_are_the_modules_one_after_the_other(transform: str, kernel: str) -> None:
    module = made(transform, kernel=kernel)
    expected = one_after_the_other(module)
    stored = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert group_experts(module) is None
    assert torch.equal(module(*inputs()), expected)
    assert torch.equal(one_after_the_other(module), expected), "and the modules are as they were"
    assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs()), expected)


@torch.no_grad()
def test_no_memory_is_used_twice_and_what_changes_is_stacked_again() -> None:
    module = made()
    assert group_experts(module) is None
    expected = module(*inputs())
    down = [expert.down_proj for expert in module]
    packed = {each.weight_packed.untyped_storage().data_ptr() for each in down}
    ratios = {each.folded[0].untyped_storage().data_ptr() for each in down if each.folded is not None}
    assert len(packed) == len(ratios) == 1
    other = copy.deepcopy(module)
    other[0].down_proj.weight_packed.data.zero_()
    other[0].down_proj._renew()
    assert not torch.equal(other(*inputs()), expected) and torch.equal(module(*inputs()), expected)
    for linear in linears(module):
        linear.prepare("sm80")
    grouped = module.together
    assert isinstance(grouped, GroupedExperts) and grouped.stale
    assert torch.equal(module(*inputs()), one_after_the_other(module)) and not grouped.stale
    grouped.detach()
    assert module.together is None and all(linear.shared is None for linear in linears(module))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:apex4. the kernels read bfloat16 and float16")
def test_who_looks_at_a_module_sees_it_called() -> None:
    module = made()
    assert group_experts(module) is None
    expected = module(*inputs())
    seen: list[torch.Tensor] = []
    handle = module[1].down_proj.register_forward_hook(lambda _, __, y: seen.append(y))
    looked_at = module(*inputs())
    handle.remove()
    assert len(seen) == 1 and (looked_at - expected).float().norm() < 0.02 * expected.float().norm()
    module(*inputs())
    assert len(seen) == 1
    kept, module[2].up_proj = module[2].up_proj, Doubled(module[2].up_proj)  # as an adapter of peft
    assert not torch.allclose(module(*inputs()), expected, rtol=0.05)
    module[2].up_proj = kept
    assert torch.equal(module(*inputs()), expected)
    wide = module(*inputs(torch.float32))  # which no kernel reads
    assert wide.dtype == torch.float32 and (wide - expected.float()).norm() < 0.1 * wide.norm()


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = 2 * self.inner(x)
        return y


def with_a_float_linear(module: UnfusedExperts) -> None:
    module[1].up_proj = nn.Linear(HIDDEN, INNER, bias=False)


def with_another_activation(module: UnfusedExperts) -> None:
    for expert in module:
        expert.act_fn = nn.GELU()


def with_other_formats(module: UnfusedExperts) -> None:
    module[1].down_proj.prepare("sm80")


@pytest.mark.parametrize(
    ("how", "change", "reason"),
    [
        ({}, with_a_float_linear, "some of their linears are not quantized"),
        ({}, with_another_activation, "there is none for the activation function GELU"),
        ({}, with_other_formats, "they have activations of different formats"),
        ({"inner": 96}, None, "their 96 inner features are no multiple of 64"),
        ({"kernel": "sm90"}, None, "there is none for 4-bit activations on sm_80"),
        ({"kernel": "sm80", "transform": "none"}, None, "their down projections have clip ratios of their own and no transform"),
    ],
)  # fmt: skip
def test_why_they_are_called_one_after_the_other(
    how: dict[str, Any], change: Callable[[UnfusedExperts], None] | None, reason: str
) -> None:
    module = made(**how)
    if change is not None:
        change(module)
    assert why_not(module) == group_experts(module) == reason
    assert module.together is None


def test_the_reason_is_said_once() -> None:
    dispatch.say_of_experts.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            dispatch.say_of_experts("they are odd")
    (only,) = said
    assert str(only.message) == (
        "apex4: experts compute one after the other, as no kernel computes them together: they are odd"
    )
