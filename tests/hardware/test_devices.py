"""Products on a CPU without 16-bit ones: the same numbers as from one that has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apex4_quant.checkpoint import load as loading
from apex4_quant.errors import UsageError
from apex4_quant.evaluation import throughput, transformers_engine
from apex4_quant.hardware import devices
from apex4_quant.hardware.devices import multiplies_fast, multiply_in_float32, read_device_map
from apex4_quant.models import layer_runner
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource

Call = Callable[..., Any]  # the fixtures of conftest.py


def test_a_device_map_is_a_name_or_a_file(tmp_path: Path) -> None:
    for name in ("auto", "balanced", "balanced_low_0", "sequential"):
        assert read_device_map(name) == name
    path = tmp_path / "map.json"

    def refused(text: str) -> str:
        path.write_text(text)
        with pytest.raises(UsageError) as refusal:
            read_device_map(str(path))
        return str(refusal.value)

    path.write_text('{"model": "cpu", "lm_head": "disk"}')
    assert read_device_map(str(path)) == {"model": "cpu", "lm_head": "disk"}
    assert "is no JSON file" in refused("model: cpu")
    for text in ("[]", "{}", '{"model": 0}'):
        assert "is no map of modules to devices" in refused(text)
    assert "'auto' for 'model': give cuda:N" in refused('{"model": "auto"}')
    assert "device 'gpu' is not known" in refused('{"model": "gpu"}')
    assert "cuda:99" in refused('{"model": "cuda:99"}')


def test_float32_and_gpus_multiply_fast() -> None:
    assert multiplies_fast(torch.device("cpu"), torch.float32)
    assert multiplies_fast(torch.device("cuda", 0), torch.float16)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert multiplies_fast(torch.device("cpu"), torch.bfloat16) == supported


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("elements", [1, 5 * 96, 2**22])  # a row at a time, ragged parts, all at once
def test_a_linear_is_a_product_in_float32_rounded_once(
    dtype: torch.dtype, bias: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_WIDENED_ELEMENTS", elements)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 33, bias=bias), nn.SiLU()).to(dtype)
    x = torch.randn(2, 7, 96).to(dtype)
    linear = model[0]
    exact = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    multiply_in_float32(model)
    y = linear(x)
    assert y.dtype == dtype and y.shape == (2, 7, 33)
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert bool(((y.double() - exact).abs() <= 0.5 * ulp + 1e-5).all())
    again = copy.deepcopy(model)  # its own weights, not the first model's
    again[0].weight.data.zero_()
    assert torch.equal(linear(x), y) and not torch.equal(again[0](x), y)
    assert torch.equal(model.float()[0](x.float()), nn.functional.linear(x.float(), linear.weight, linear.bias))


@pytest.mark.parametrize("fast", [True, False])
def test_who_multiplies_so(tiny_model: Call, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model()
    for module in (loading, layer_runner):
        monkeypatch.setattr(module, "multiplies_fast", lambda device, dtype: fast)

    def widened(model: nn.Module) -> set[bool]:
        return {"forward" in vars(module) for module in model.modules() if type(module) is nn.Linear}

    assert widened(loading.load_model(folder, "cpu", torch.bfloat16)) == {not fast}
    assert widened(loading.load_model(folder, "cpu", torch.bfloat16, as_it_is=True)) == {False}
    assert widened(LayerRunner(ModelSource(str(folder)), "cpu", torch.bfloat16).model) == {not fast}


def test_throughput_is_of_the_model_as_it_is(tiny_model: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: Any, **options: Any) -> nn.Module:
        asked.append(options)
        return loading.load_model(*arguments, **options)

    monkeypatch.setattr(transformers_engine, "load_model", load)
    throughput.throughput(throughput.ThroughputSettings(str(tiny_model()), prompt_len=4, gen_len=2, device="cpu"))
    assert asked == [{"as_it_is": True}]
