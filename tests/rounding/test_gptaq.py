"""GPTAQ: targets from the original model, and the second stream of hidden states that they come from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from apex4_quant.calib.hessian import HessianAccumulator
from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import ROWMAJOR
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.run_state import RunState, Streams
from apex4_quant.quantization.settings import QuantizeSettings
from apex4_quant.rounding.gptq import DAMPING, drift_correction, inverse_factor, quantize_weight_gptq

Call = Callable[..., Any]  # the fixtures of conftest.py


def drifted_inputs(tokens: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What a linear reads behind quantized layers, and what it reads in the original: correlated, and so is the drift."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k)[:, None]
    original = torch.randn(tokens, k, generator=generator) @ mixing
    drift = original @ torch.randn(k, k, generator=generator) * (0.3 / k**0.5)
    return original + drift + 0.02 * torch.randn(tokens, k, generator=generator), original


def moments_of(x: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hessian, drift = HessianAccumulator(), HessianAccumulator()
    for start in range(0, len(x), 300):
        part = slice(start, start + 300)
        hessian.add(x[None, part])
        drift.add(x[None, part], (original - x)[None, part])
    return hessian.take_matrix(), drift.take_matrix()


def test_drift_is_the_mean_product_of_difference_and_input() -> None:
    x, original = drifted_inputs(700, 128)
    _, drift = moments_of(x, original)
    expected = (original - x).double().t() @ x.double() / len(x)
    torch.testing.assert_close(drift.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("k", [128, 320])
def test_correction_is_the_closed_form_in_float64(k: int) -> None:
    """W' = W + alpha W C (H + damping)^-1, and at alpha = 1 without damping no W' is closer to the original's outputs."""
    hessian, drift = moments_of(*drifted_inputs(4096, k))
    weight = torch.randn(24, k, generator=torch.Generator().manual_seed(1)).double()
    damped = hessian.double() + DAMPING * hessian.diagonal().mean().double() * torch.eye(k).double()
    expected = 0.25 * weight @ drift.double() @ torch.linalg.inv(damped)
    correction = drift_correction("x", drift.clone(), inverse_factor("x", hessian), 0.25)
    shift = weight @ correction.double()
    assert float((shift - expected).norm() / expected.norm()) < 1e-3

    x, original = (side.double() for side in drifted_inputs(4096, k))
    least = torch.linalg.lstsq(x, original @ weight.t()).solution.t()
    exact = weight + weight @ ((original - x).t() @ x / len(x)) @ torch.linalg.inv(x.t() @ x / len(x))
    assert float((exact - least).norm() / least.norm()) < 1e-6


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_output_error_against_the_original_falls(alpha: float) -> None:
    n, k = 48, 256
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.05
    form = LinearFormat(n, k, 128, ROWMAJOR, "none", 1.0)
    hessian, drift = moments_of(*drifted_inputs(8192, k))
    factor = inverse_factor("x", hessian)
    x, original = (side.double() for side in drifted_inputs(8192, k))
    exact = original @ weight.double().t()

    def error(correction: torch.Tensor | None) -> float:
        codes, scales = quantize_weight_gptq("x", weight, form, factor, correction=correction)
        rounded = codes.double() * scales.double().repeat_interleave(128, dim=1)
        return float((x @ rounded.t() - exact).norm() / exact.norm())

    plain, moved = error(None), error(drift_correction("x", drift.clone(), factor, alpha))
    assert moved < (0.9 if alpha < 1 else 0.6) * plain, (moved, plain)
    assert error(drift_correction("x", torch.zeros_like(drift), factor, alpha)) == plain


def test_targets_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Apex4Error, match=r"layer 3: .* not finite"):
        drift_correction("layer 3", torch.full((128, 128), 1e30), torch.full((128, 128), 1e10).triu(), 0.25)


# --- the two streams --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_original_stream_is_that_of_the_unquantized_model(
    tiny_model: Call, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Streams] = []
    monkeypatch.setattr(RunState, "save_hidden", lambda self, layer, streams: saved.append(streams))
    settings = QuantizeSettings(
        str(tiny_model(num_hidden_layers=3)),
        "apex4-gptaq",
        calib=str(calib),
        samples=3,
        seq_len=32,
        target="none",
        dtype="float32",
    )
    ids: list[torch.Tensor] = []
    embed = LayerRunner.embed
    monkeypatch.setattr(
        LayerRunner, "embed", lambda self, samples, weight: ids.append(samples) or embed(self, samples, weight)
    )
    monkeypatch.setattr(RunState, "load_hidden", lambda self, layer, original, share, streamed: saved[layer])
    quantize(settings, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    entering: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(ids[0], use_cache=False)
    assert len(saved) == len(entering) == 3
    for streams, expected in zip(saved, entering, strict=True):
        assert streams.original is not None
        torch.testing.assert_close(streams.original, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(saved[0].hidden, saved[0].original)
    assert float((saved[2].hidden - entering[2]).norm() / entering[2].norm()) > 0.01


def test_codes_change_and_only_behind_the_first_input(tiny_model: Call, calib: Path, tmp_path: Path) -> None:
    """q, k and v of layer 0 read the same in both models."""
    from safetensors.torch import load_file

    content = {}
    for name, alpha in (("off", 0.0), ("on", 0.5)):
        recipe = {"name": name, "transform": "hadamard128", "rounding": "gptq", "gptaq": alpha}
        settings = QuantizeSettings(
            str(tiny_model()), recipe=recipe, calib=str(calib), samples=3, seq_len=32, target="none"
        )
        quantize(settings, tmp_path / name)
        content[name] = load_file(tmp_path / name / "model-00002-of-00004.safetensors")
    prefix = "model.layers.0."
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        name = f"{prefix}{part}.weight_packed"
        assert torch.equal(content["off"][name], content["on"][name])
    for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        name = f"{prefix}{part}.weight_packed"
        assert not torch.equal(content["off"][name], content["on"][name])


def moe(folder: Path) -> Path:
    """One sparse layer with six experts of which the router can never choose 4 and 5."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, initializer_range=0.1, num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=96,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(config)
    row = torch.randn(128)
    model.model.layers[0].mlp.gate.weight.data[:] = torch.stack([row, row, -row, -row, 0 * row, 0 * row])
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, folder)
    return folder


def test_a_mixture_of_experts_is_quantized(tmp_path: Path) -> None:
    settings = QuantizeSettings(
        str(moe(tmp_path / "moe")), recipe="apex4-gptaq", samples=4, seq_len=64, target="none", device="cpu"
    )
    result = quantize(settings, tmp_path / "out")
    assert len(result.records) == 4 + 3 * 6 and max(record["error"] for record in result.records) < 0.5
