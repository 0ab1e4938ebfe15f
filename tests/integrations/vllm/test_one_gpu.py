"""vLLM on one GPU, with torch.compile and CUDA graphs: what it generates has the probabilities that transformers gives it there.

Both have the same kernels. What differs are roundings of attention, norms and sums, each of which may move an activation over a
tie between two codes (test_ties.py), in 16 bits in every layer. So the measure is what quantization does: where vLLM computed
anything else than the checkpoint, a transform, scale or order wrong, its logprobs would lie as far from transformers' as those
of the unquantized model do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .generating import Generated, generate_apart

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL = {"kv_cache_memory_bytes": 2**28, "gpu_memory_utilization": 0.05, "max_num_seqs": 8}
COMPILED = {"enforce_eager": False}
KEPT = {"ignore": ("*.kv_b_proj",)}


@torch.no_grad()
def logprobs(folder: Path, generated: Sequence[Generated], dtype: torch.dtype) -> torch.Tensor:
    """[prompts, tokens]: of the generated tokens, in transformers on the GPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda().eval()
    found = []
    for one in generated:
        ids = torch.tensor([one.prompt + one.tokens], device="cuda")
        logits = model(ids, use_cache=False).logits[0, len(one.prompt) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(one.prompt) :, None])[:, 0].cpu())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("name", "recipe", "settings", "bits", "dtype", "options"),
    [
        ("llama", "apex4-fast", {}, 8, "bfloat16", COMPILED),
        ("llama", "apex4-fast", {}, 4, "float16", COMPILED),
        ("ragged", "rtn", {}, 4, "float16", {}),
        ("mixtral", "apex4-fast", {}, 8, "float16", COMPILED),
        ("mixtral", "rtn", {}, 4, "float16", COMPILED),
        ("qwen3moe", "rtn", {}, 8, "float16", COMPILED),
        ("qwen3moe", "rtn", {}, 4, "float16", COMPILED),
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
    vllm = torch.tensor([one.logprobs for one in generated])
    ours = logprobs(folder, generated, getattr(torch, dtype))
    plain = logprobs(original(name), generated, getattr(torch, dtype))
    apart, quantizing = float((vllm - ours).abs().mean()), float((plain - ours).abs().mean())
    record_property("vllm - transformers", round(apart, 4))
    record_property("quantized - not", round(quantizing, 4))
    assert apart < quantizing / 2


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "deepseek2"])
def test_unquantized_models_measure_the_measure(
    name: str, original: Callable[[str], Path], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    folder = original(name)
    generated = generate_apart(tmp_path / "generated.json", folder, dtype="bfloat16", **SMALL | COMPILED)
    vllm = torch.tensor([one.logprobs for one in generated])
    apart = float((vllm - logprobs(folder, generated, torch.bfloat16)).abs().mean())
    record_property("vllm - transformers", round(apart, 4))
    assert apart < 0.1
