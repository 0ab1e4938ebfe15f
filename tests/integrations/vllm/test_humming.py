"""`apex4 export --to vllm-humming` in stock vLLM: its own loader, and Humming's own references in the place of its kernels.

vLLM's method "humming" makes the layers and loads the tensors, the plugin is not asked. Humming's kernels need a GPU; here
its layers compute with the references that Humming tests them with (humming.testing), so that what is compared with our
format is its definition of the transform, of codes and of scales. vLLM 0.32 has the same method as 0.33.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.checkpoint.export import export
from apex4_quant.kernels import torch_backend

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")
reference = pytest.importorskip("humming.testing.process_input", reason="needs humming-kernels: scripts/test-vllm")


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [N, K / 8] -> signed codes [N, K] as humming/transform.py makes them for INT4 by INT4: its signed nibbles."""
    data = words.view(torch.uint8)
    low, high = ((data & 0xF) - 8) & 0xF, ((data & 0xF0) - 8 * 16) >> 4
    nibbles = torch.stack([low, high], -1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def quantized_input(x: torch.Tensor, hadamard: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes and float32 scales [M, G] of Humming's input processing, from its reference."""
    packed, scale, _ = reference.process_input_ref(
        x, quant_mode="dynamic_group", quant_dtype="int4", quant_group_size=128, hadamard_block_size=hadamard
    )
    nibbles = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles), scale


@pytest.mark.parametrize("hadamard", [0, 128])
def test_its_activations_are_ours(hadamard: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 384, generator=generator) * torch.logspace(-2, 2, 384)
    codes, scale = quantized_input(x, hadamard)
    ours, our_scale = torch_backend.quantize_activation(x, 128, 1.0, hadamard == 128)
    assert torch.allclose(scale, our_scale, rtol=1e-6)
    differing = codes != ours.flatten(1)
    # Ties only: it multiplies by a reciprocal, and sums the transform in another order.
    assert int(differing.sum()) <= 2 and int((codes - ours.flatten(1))[differing].abs().sum()) <= 2


class _OnCpu:
    """What HummingLinearMethod does after loading and in a step, with Humming's references."""

    @staticmethod
    def after_loading(method: Any, layer: Any) -> None:
        schema, inputs = method.weight_schema, method.input_schema
        assert (str(schema.b_dtype), schema.weight_scale_group_size, schema.has_zero_point) == ("uint4", 128, False)
        assert (str(inputs.a_dtype), inputs.input_scale_group_size) == ("int4", 128)
        assert not method.quant_config.allow_input_schema_fallback
        codes = unpacked(layer.weight.data)
        assert int(codes.abs().max()) <= 7
        layer.floats, layer.float_scale = torch_backend.grouped_weight(codes, layer.weight_scale.data)
        _OnCpu.layers += 1

    @staticmethod
    def apply(method: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        codes, scale = quantized_input(x, method.weight_schema.hadamard_block_size)
        grouped = codes.float().unflatten(1, (-1, 128))
        return torch_backend.multiply(grouped, scale, layer.floats, layer.float_scale, bias).to(x.dtype)

    layers = 0


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("demo", {"layout": "sm90"}, 24),
        ("qwen3", {"transform": "none"}, 8),
        ("phi3", {}, 8),
        ("llama", {"ignore": ("*.0.mlp.*", "*.1.self_attn.[qkv]_proj")}, 5),
    ],
)
def test_stock_vllm_runs_it(
    name: str, settings: dict[str, Any], layers: int, quantized: Callable[..., Path], serve_here: Callable[..., Any],
    require_equal: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from vllm.model_executor.layers.quantization import humming as method

    from apex4_quant.integrations.vllm import config as plugin

    source = quantized(name, "rtn", **settings)
    export(str(source), tmp_path / "out", "vllm-humming")
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "humming"
    )
    monkeypatch.setattr(method.HummingLinearMethod, "process_weights_after_loading", _OnCpu.after_loading)
    monkeypatch.setattr(method.HummingLinearMethod, "apply", _OnCpu.apply)
    monkeypatch.setattr(method.HummingConfig, "get_supported_act_dtypes", lambda self: [torch.float32])
    monkeypatch.setattr(plugin.Apex4Config, "from_config", None)
    monkeypatch.setattr(_OnCpu, "layers", 0)
    generated = serve_here(tmp_path / "out")
    assert _OnCpu.layers == layers
    require_equal(generated, source)
