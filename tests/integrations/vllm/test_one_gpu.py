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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from apex4_quant.nn.fused_inputs import LinearInput

from .generating import Generated, generate_apart

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {"kv_cache_memory_bytes": 2**28, "gpu_memory_utilization": 0.05, "max_num_seqs": 32, "count": 32}
COMPILED = {"enforce_eager": False}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
KEPT = {"ignore": ("*.kv_b_proj",)}
# Several hundred tokens: the means of two sets of seeds differ by 10 %, a rounding in every layer and one in front by 20 %.
SEEDS, TIMES = 4, 2.0


def on_gpu(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    return loaded.cuda().eval()


@torch.no_grad()
def logprobs(model: Any, generated: Sequence[Generated]) -> torch.Tensor:
    """[prompts, tokens]: of the generated tokens, in transformers on the GPU."""
    ids = torch.tensor([one.prompt + one.tokens for one in generated], device="cuda")
    start = len(generated[0].prompt)
    logits = model(ids, use_cache=False).logits[:, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, ids[:, start:, None])[..., 0].cpu()


def tensor_of(x: Any) -> torch.Tensor:
    """What a quantized linear is called with: a tensor, or a norm that its quantizer computes."""
    found: torch.Tensor = x.tensor() if isinstance(x, LinearInput) else x
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def moved_by_rounding(model: Any, generated: Sequence[Generated]) -> float:
    """The mean over SEEDS of how far logprobs move if embeddings are off by a rounding of their dtype."""
    plain = logprobs(model, generated)
    embeddings = model.get_input_embeddings()
    generator = torch.Generator("cuda").manual_seed(0)

    def move(_: torch.nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
        by = 2 * torch.rand(y.shape, generator=generator, device=y.device) - 1
        return (y.float() * (1 + torch.finfo(y.dtype).eps * by)).to(y.dtype)

    hook = embeddings.register_forward_hook(move)
    try:
        return sum(apart(logprobs(model, generated), plain) for _ in range(SEEDS)) / SEEDS
    finally:
        hook.remove()


def require_near(
    generated: Sequence[Generated], model: Any, original: Path, dtype: str, record: Callable[[str, Any], None]
) -> None:
    vllm, ours = torch.tensor([one.logprobs for one in generated]), logprobs(model, generated)
    found = {
        "vllm - transformers": apart(vllm, ours),
        "a rounding": moved_by_rounding(model, generated),
        "quantized - not": apart(logprobs(on_gpu(original, dtype), generated), ours),
    }
    for name, value in found.items():
        record(name, round(value, 4))
    print(" ".join(f"{name} {value:.4f}," for name, value in found.items()))
    assert found["vllm - transformers"] < TIMES * found["a rounding"], found


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
