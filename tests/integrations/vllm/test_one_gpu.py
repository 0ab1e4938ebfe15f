"""vLLM on one GPU, with torch.compile and CUDA graphs: what it generates has the probabilities that transformers gives it there.

Both have the same kernels. What differs are roundings of attention, norms and sums, each of which may move an activation over a
tie between two codes (test_ties.py), in 16 bits in every layer. With 4-bit activations that decides more than anything else does:
in transformers alone embeddings that differ by their own rounding move logprobs as far as the quantization of activations does.
So the measure is that: vLLM's logprobs lie as near to transformers' as those of transformers with such embeddings do.

With 8 bits that meets a wrong transform, scale or order in one linear of the demo. With 4 bits one wrong transform or order is twice to four
times the measure, and a scale that is off in one linear hides behind it: test_linears.py compares linears by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .generating import generate_apart
from .probabilities import COMPILED, SMALL, apart, logprobs, on_gpu, require_near, tensor_of

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
KEPT = {"ignore": ("*.kv_b_proj",)}


@pytest.mark.parametrize(
    ("name", "recipe", "settings", "bits", "dtype", "options"),
    [
        ("demo", "apex4", {}, 4, "float16", COMPILED),
        ("demo", "apex4", {}, 8, "bfloat16", COMPILED),
        ("mixtral", "apex4-fast", {}, 8, "float16", COMPILED),
        ("mixtral", "rtn", {}, 4, "float16", COMPILED),
        ("qwen3moe", "apex4", {}, 8, "float16", COMPILED),
        ("qwen3moe", "rtn", {}, 4, "float16", COMPILED),
        ("llama", "apex4", {}, 8, "bfloat16", COMPILED),
        ("llama", "apex4", {}, 4, "bfloat16", COMPILED),
        ("llama", "apex4", {}, 4, "float16", COMPILED | {"speculative_config": NGRAM}),
        ("ragged", "rtn", {}, 4, "float16", {}),
        ("qwen2moe", "apex4-fast", {}, 8, "bfloat16", COMPILED),
        ("deepseek2", "rtn", KEPT, 8, "bfloat16", COMPILED),
        ("deepseek2", "rtn", KEPT, 4, "bfloat16", {}),
    ],
)
def test_the_probabilities_of_transformers(
    name: str, recipe: str, settings: dict[str, Any], bits: int, dtype: str, options: dict[str, Any],
    original: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    monkeypatch.setenv("APEX4_ACTIVATIONS", str(bits))
    folder = quantized(name, recipe, layout="sm90", **settings)
    generated = generate_apart(tmp_path / "generated.json", folder, dtype=dtype, **SMALL | options)
    require_near(generated, on_gpu(folder, dtype), original(name), dtype, record_property)


@torch.no_grad()
def test_lora_on_quantized_linears(
    original: Callable[[str], Path], quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, Any], None],
) -> None:  # fmt: skip
    """vLLM adds an adapter to the output of our layers: as a hook does in transformers."""
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    folder, rank = quantized("llama", "apex4", layout="sm90"), 8
    model = on_gpu(folder, "bfloat16")
    generator, adapter = torch.Generator().manual_seed(0), {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        linear = model.get_submodule(name)
        a = torch.randn(rank, linear.in_features, generator=generator) * 0.05
        b = torch.randn(linear.out_features, rank, generator=generator) * 0.05
        adapter |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        a, b = a.cuda().bfloat16(), b.cuda().bfloat16()
        linear.register_forward_hook(lambda _, args, y, a=a, b=b: y + tensor_of(args[0]) @ a.t() @ b.t())
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "down_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    options = SMALL | COMPILED | {"lora": str(tmp_path / "adapter"), "enable_lora": True, "max_lora_rank": rank}
    generated = generate_apart(tmp_path / "generated.json", folder, dtype="bfloat16", **options)
    require_near(generated, model, original("llama"), "bfloat16", record_property)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "deepseek2"])
def test_unquantized_models_measure_the_measure(
    name: str, original: Callable[[str], Path], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    folder = original(name)
    generated = generate_apart(tmp_path / "generated.json", folder, dtype="bfloat16", **SMALL | COMPILED)
    found = apart(torch.tensor([one.logprobs for one in generated]), logprobs(on_gpu(folder, "bfloat16"), generated))
    record_property("vllm - transformers", round(found, 4))
    print(f"vllm - transformers {found:.4f}")
    assert found < 0.1
