"""Which arithmetic vLLM's layers get, and the operators of PyTorch operations."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import get_layout
from apex4_quant.integrations.vllm import backend, names
from apex4_quant.kernels import torch_backend

GPU = torch.device("cuda", 0)


def test_a_gpu_without_kernels_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(device: torch.device, bits: int) -> None:
        warnings.warn("apex4: the kernels for T4 cannot run: no NVRTC; computing with PyTorch operations", stacklevel=2)

    monkeypatch.delenv("APEX4_KERNEL", raising=False)
    monkeypatch.setattr(backend.dispatch, "kernel_format", none)
    with pytest.raises(
        Apex4Error, match=r"^the kernels for T4 cannot run: no NVRTC: serve on .* APEX4_KERNEL=reference"
    ):
        backend.kernel_of(GPU, torch.bfloat16)
    monkeypatch.setenv("APEX4_KERNEL", "reference")
    assert backend.kernel_of(GPU, torch.bfloat16) is None


def test_a_gpu_without_the_cuda_extra_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = backend.dispatch
    monkeypatch.delenv("APEX4_KERNEL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    dispatch._format_of_gpu.cache_clear()
    dispatch.compiler._nvrtc.cache_clear()
    with pytest.raises(Apex4Error) as refused:
        backend.kernel_of(GPU, torch.bfloat16)
    dispatch._format_of_gpu.cache_clear()
    said = str(refused.value)
    assert "NVIDIA H100" in said and "pip install 'apex4-quant[cuda13]'" in said and "APEX4_KERNEL=reference" in said


def test_kernels_and_float32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APEX4_KERNEL", raising=False)
    monkeypatch.setattr(backend.dispatch, "kernel_format", lambda device, bits=4: "sm90")
    monkeypatch.setattr(backend.ops, "prepare", lambda device: None)
    with pytest.raises(Apex4Error, match="model runs in float32: give --dtype bfloat16"):
        backend.kernel_of(GPU, torch.float32)
    assert backend.kernel_of(GPU, torch.float16) == "sm90"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_operators_are_torch_backend_s_linear(dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = get_layout("sm80")
    codes = torch.randint(-7, 8, (200, 256), dtype=torch.int8, generator=generator)
    scales = torch.rand(200, 2, generator=generator).half() + 0.1
    x = torch.randn(37, 250, generator=generator).to(dtype)
    bias = torch.randn(200, generator=generator)
    expected = torch_backend.linear(x, codes, scales, bias, clip=0.9, activation_bits=bits)
    prepare = torch_backend.folded_weight if bits == 8 else torch_backend.grouped_weight
    weight, scale = prepare(codes, scales)
    cached = x, weight, scale, bias, None, 0.9, True, bits
    packed = x, layout.pack(codes), layout.pack_scales(scales), 200, "sm80", bias, None, 0.9, True, bits
    for operator, arguments in (
        (torch.ops.apex4_vllm.cached_linear, cached),
        (torch.ops.apex4_vllm.packed_linear, packed),
    ):
        assert torch.equal(operator(*arguments), expected)
        torch.library.opcheck(operator.default, arguments)


def test_vllm_s_key_of_compiled_graphs_has_our_version_and_settings(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")
    from vllm.config import ModelConfig

    from apex4_quant.integrations.vllm import config, register

    register()  # as vLLM does in each of its processes
    config_of_model = ModelConfig(str(quantized("llama")), dtype="float32")
    fields = config_of_model.hf_config.quantization_config

    def key() -> str:
        config.Apex4Config.from_config(fields).maybe_update_config("", config_of_model.hf_config)
        found: str = config_of_model.compute_hash()
        return found

    keys = [key(), key()]
    for name, value in (("APEX4_ACTIVATIONS", "8"), ("APEX4_KERNEL", "reference")):
        monkeypatch.setenv(name, value)
        keys.append(key())
    monkeypatch.setattr(config, "__version__", "another")
    keys.append(key())
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_names_of_layers() -> None:
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    qkv = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert names.member_names("model.layers.0.self_attn.qkv_proj", packed) == qkv
    own = {"qkv_proj": ["qkv_proj"]}  # Phi-3
    assert names.member_names("model.layers.0.self_attn.qkv_proj", own) == ["model.layers.0.self_attn.qkv_proj"]
    assert names.stored_name("model.layers.0.block_sparse_moe.experts") == "model.layers.0.mlp.experts"
    assert names.is_router("model.layers.0.block_sparse_moe.gate") and not names.is_router(
        "model.layers.0.mlp.gate_up_proj"
    )
    renamed = "model.layers.0.mlp.experts.3.up_proj.weight_scale"
    for ours, theirs in names.published_names():
        renamed = renamed.replace(ours, theirs)
    assert renamed == "model.layers.0.block_sparse_moe.experts.3.w3.weight_scale"
