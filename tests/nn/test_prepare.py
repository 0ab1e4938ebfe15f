"""Preparing a model: what is fused, what the user is told, and how to switch it off."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from apex4_quant.errors import UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels import dispatch
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.nn.prepare import prepare_model, share_input

from .counted_calls import LLAMA, Make, Operators, logits_of


@pytest.fixture
def expected(small_llama: Make) -> torch.Tensor:
    return logits_of(small_llama())


def test_the_switch(small_llama: Make, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    layers = model.model.layers

    def fuses() -> bool:
        assert torch.equal(logits_of(model), expected)
        with Operators() as operators:
            logits_of(model)
        assert operators.count in ({"linear": 14}, {"rms_norm_linear": 4, "silu_mul_linear": 2, "linear": 2})
        return operators.count["linear"] == 2

    prepare_model(model, LLAMA, "sm90", fuse=False)
    assert not fuses() and layers[0].self_attn.q_proj.shared is None
    prepare_model(model, LLAMA, "sm90")
    assert fuses()
    monkeypatch.setenv("APEX4_FUSE", "0")
    prepare_model(model, LLAMA, "sm90")
    assert not fuses()
    prepare_model(model, LLAMA, "sm90", fuse=True)
    assert fuses()
    monkeypatch.setenv("APEX4_FUSE", "1")
    prepare_model(model, LLAMA, "sm90")
    assert fuses()
    monkeypatch.setenv("APEX4_FUSE", "no")
    with pytest.raises(UsageError, match=r"APEX4_FUSE=no is not known: give 0"):
        prepare_model(model, LLAMA, "sm90")


# ---- what the kernels do not do is said ------------------------------------------------------------------------------


def with_learned_transforms(model: Any, group_size: int) -> Any:
    """The same model with a learned transform, of its own for every linear, and groups of this size in the MLP."""
    torch.manual_seed(3)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, Apex4Linear):
            size = group_size if "down_proj" in name else 128  # whose input has 256 features
            format = replace(module.format, group_size=size, transform=TransformKind.DENSE)
            codes = torch.randint(-7, 8, (format.out_features, format.padded_k), dtype=torch.int8)
            scales = (torch.rand(format.out_features, format.groups) * 0.01 + 1e-3).half()
            matrix = torch.randn(format.padded_k // 128, 128, 128).half() * 0.1
            model.model.set_submodule(name, Apex4Linear.from_codes(format, codes, scales, None, matrix))
    return model


def test_learned_transforms_with_wide_groups_are_named_once(small_llama: Make) -> None:
    model = with_learned_transforms(small_llama(), 256)
    expected = logits_of(model)
    with pytest.warns(RuntimeWarning) as caught:
        prepare_model(model, LLAMA, "sm90")
    (warning,) = caught
    text = str(warning.message)
    assert "model.layers.0.mlp.down_proj and 1 other linear have a learned transform with groups of 256" in text
    assert "groups of 128 only" in text and "PyTorch operations" in text
    assert torch.equal(logits_of(model), expected)


def test_a_linear_that_is_prepared_by_its_call_says_it_too(small_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = with_learned_transforms(small_llama(), 256).model.layers[0].mlp.down_proj
    monkeypatch.setattr(dispatch, "kernel_format", lambda device, bits=4: "sm90")
    with pytest.warns(RuntimeWarning, match=r"a linear \(in=256, out=128, group=256.*groups of 128 only"):
        linear(torch.randn(3, 256).bfloat16())


@pytest.mark.parametrize("kernel", ["sm90", None])
def test_nothing_is_said_where_nothing_is_missing(kernel: str | None, small_llama: Make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_model(with_learned_transforms(small_llama(), 128), LLAMA, kernel)
        prepare_model(with_learned_transforms(small_llama(), 256), LLAMA, None)


# ---- while a layer is quantized --------------------------------------------------------------------------------------


def test_linears_share_an_input_and_keep_their_tensors(small_llama: Make) -> None:
    layer = small_llama().model.layers[0]
    before = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    share_input(layer, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    share_input(layer, ("self_attn.o_proj",))
    attention = layer.self_attn
    assert attention.q_proj.shared is attention.k_proj.shared is attention.v_proj.shared is not None
    assert attention.o_proj.shared is None and layer.mlp.gate_proj.shared is None
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = [attention.q_proj.reference(x), attention.v_proj.reference(x)]

    class Reading(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [attention.q_proj(x), attention.v_proj(x)]

    assert all(map(torch.equal, Reading()(x), expected))
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == before
