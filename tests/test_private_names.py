"""Private names of others are there and mean what we take them for, in the versions that are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn
from torch.nn.modules import module as torch_module

from apex4_quant import environment, private_names


def test_a_variable_is_read_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    read = environment.reader("APEX4_SOME_NAME")
    assert read() is None
    for value in ("one", "", "zwölf"):
        monkeypatch.setenv("APEX4_SOME_NAME", value)
        assert read() == value
    monkeypatch.delenv("APEX4_SOME_NAME")
    assert read() is None


def test_writes_are_counted() -> None:
    x = torch.zeros(2)
    before = private_names.written_count(x)
    x.add_(1)
    assert private_names.written_count(x) == before + 1
    with torch.inference_mode():
        y = torch.zeros(2)
    with pytest.raises(RuntimeError):
        private_names.written_count(y)


def test_children_are_seen_as_they_are_replaced() -> None:
    module = nn.Sequential(nn.ReLU())
    children = private_names.child_modules(module)
    module[0] = other = nn.SiLU()
    assert children["0"] is other


@pytest.mark.parametrize(
    "register",
    [
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: module.register_full_backward_hook(print),
        lambda module: module.register_full_backward_pre_hook(print),
    ],
)
def test_every_kind_of_hook_is_in_a_table(register: Callable[[nn.Module], Any]) -> None:
    module = nn.ReLU()
    tables = private_names.hook_tables(module)
    assert not any(tables)
    handle = register(module)
    assert any(tables)
    handle.remove()
    assert not any(tables)


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_every_kind_of_hook_of_all_modules_is_in_a_table(register: Callable[[Any], Any]) -> None:
    assert not any(private_names.global_hook_tables())
    handle = register(print)
    assert any(private_names.global_hook_tables())
    handle.remove()
    assert not any(private_names.global_hook_tables())


def test_a_forward_is_replaced_inside_what_accelerate_does() -> None:
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map={"weight": torch.ones(2, 2)})
    module, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
    add_hook_to_module(module, hook)
    for each in (module, other):
        private_names.replace_forward(each, lambda x, each=each: (x, each.weight.device.type))
    assert module(torch.ones(2))[1] == other(torch.ones(2))[1] == "cpu"
    assert module.weight.device.type == "meta"


def test_offloading_by_accelerate() -> None:
    stored = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    module = nn.Linear(2, 2)
    assert not private_names.is_offloaded(module) and private_names.offloaded_tensor(module, "weight") is None
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert not private_names.is_offloaded(module) and private_names.offloaded_tensor(module, "weight") is None
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=stored)
    add_hook_to_module(module, hook)
    assert private_names.is_offloaded(module) and private_names.offloaded_tensor(module, "weight") is stored["weight"]
    other = nn.Linear(2, 2)
    add_hook_to_module(other, SequentialHook(AlignDevicesHook(execution_device="cpu"), hook))
    assert private_names.is_offloaded(other)
