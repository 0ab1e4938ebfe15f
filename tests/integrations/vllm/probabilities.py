"""How near logprobs that vLLM gives on a GPU lie to those of transformers there: what the tests for GPUs share.

The measure is how far transformers' own logprobs move if embeddings are off by a rounding of their dtype: test_one_gpu.py says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from apex4_quant.nn.fused_inputs import LinearInput

from .generating import Generated

SMALL = {"kv_cache_memory_bytes": 2**28, "gpu_memory_utilization": 0.05, "max_num_seqs": 32, "count": 32}
COMPILED = {"enforce_eager": False}
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
