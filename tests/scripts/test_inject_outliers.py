"""scripts/demo_model/inject_outliers.py: the same function, and activations with outlier channels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from apex4_quant.checkpoint.load import load_model
from apex4_quant.errors import UsageError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_model" / "inject_outliers.py"
IDS = torch.arange(3, 67).view(2, 32)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inject_outliers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    """Grouped queries, two key/value heads, and gains that are not all one: those would hide their rounding."""
    folder = tiny_model(num_attention_heads=4, num_key_value_heads=2)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = (0.5 + torch.rand(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def run(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """float32 logits, and the largest value of every input channel of the layers' linears."""
    model = load_model(folder, "cpu", torch.float32)
    peaks: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs: peaks.__setitem__(name, inputs[0].abs().amax((0, 1)))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(watch(name))
    return model(input_ids=IDS).logits, peaks


# 32 changes exponents only. With 40 a changed entry is off by 2^-8 of itself at most, and so are the sums over them.
@pytest.mark.parametrize(("factor", "tolerance"), [(32.0, 1e-5), (40.0, 2**-8)])
def test_same_function_with_outlier_channels(
    script: ModuleType, model: Path, tmp_path: Path, factor: float, tolerance: float
) -> None:
    out = tmp_path / "outliers"
    sites = script.inject(str(model), out, factor, 0.01, 0)
    before, peaks_before = run(model)
    after, peaks_after = run(out)
    assert float((after - before).norm() / before.norm()) < tolerance
    assert set(sites) == set(peaks_after)
    for name, channels in sites.items():
        growth = peaks_after[name] / peaks_before[name]
        expected = torch.ones_like(growth)
        expected[channels] = factor
        torch.testing.assert_close(growth, expected, rtol=0.05, atol=0)
        # two channels a site; o reads each channel of a key/value head in the two query heads of its group
        assert len(channels) == {"o_proj": 4, "down_proj": 3}.get(name.rpartition(".")[2], 2)


def test_stored_tensors_keep_name_shape_and_dtype(script: ModuleType, model: Path, tmp_path: Path) -> None:
    script.inject(str(model), tmp_path / "outliers", 40.0, 0.01, 0)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "outliers"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert {n for n in before if torch.equal(before[n], after[n])} == {
        n for n in before if ".layers." not in n
    }  # embedding, final norm, head: no channel of theirs is touched


def test_channels_differ_by_layer_site_and_seed(script: ModuleType, model: Path, tmp_path: Path) -> None:
    first = script.inject(str(model), tmp_path / "a", 40.0, 0.05, 0)
    assert script.inject(str(model), tmp_path / "b", 40.0, 0.05, 0) == first
    assert script.inject(str(model), tmp_path / "c", 40.0, 0.05, 1) != first
    per_input = [first[f"model.layers.{i}.{n}"] for i in (0, 1) for n in ("self_attn.q_proj", "mlp.gate_proj")]
    assert len({tuple(channels) for channels in per_input}) == 4
    assert first["model.layers.0.self_attn.q_proj"] == first["model.layers.0.self_attn.v_proj"]


def test_bad_arguments(script: ModuleType, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--fraction"):
        script.inject(str(model), tmp_path / "out", 40.0, 0.0, 0)
    with pytest.raises(UsageError, match="not empty"):
        script.inject(str(model), model, 40.0, 0.01, 0)
