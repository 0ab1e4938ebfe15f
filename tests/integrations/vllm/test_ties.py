"""Where vLLM and transformers differ, an activation lay on a tie between two codes: there and nowhere else.

Both run the same prompts. Layer by layer, the inputs that vLLM's linears got are quantized, and those of transformers'. A
token is clean as long as neither it nor one before it in its prompt had other codes in a linear before: up to there both
computed the same thing, and differ by roundings of attention and norms. So the first codes that differ must be neighbours,
and x / s of them within roundings of n + 1/2. A bug of ours (a scale, an order, a transform) gives codes that differ at once
and by any distance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.kernels import torch_backend
from apex4_quant.kernels.hadamard import apply_block_hadamard
from apex4_quant.nn.linear import Apex4Linear

from .generating import Generated, model_of, prompts

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

FIRST = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}  # of the linears that vLLM runs in one, the one looked at
# Roundings of attention and norms come to 3e-6 of x, and |x / s| is at most 7.
NEAR = 5e-5


def watched(module: torch.nn.Module, name: str, found: dict[str, torch.Tensor]) -> None:
    """Keep the first input that `module` gets, as [tokens, K]: of the prompts."""

    def keep(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        found.setdefault(name, arguments[0].detach().flatten(0, -2).clone())

    module.register_forward_pre_hook(keep)


@pytest.mark.parametrize("name", ["demo", "qwen3", "gemma2", "gemma3"])
@torch.no_grad()
def test_codes_differ_at_ties_only(
    name: str, quantized: Callable[..., Path], serve_here: Callable[..., list[Generated]]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = quantized(name, "rtn")
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}

    def watch(llm: Any) -> None:
        for path, module in model_of(llm).named_modules():
            parent, _, last = path.rpartition(".")
            if last in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
                watched(module, f"{parent}.{FIRST.get(last, last)}", ours)

    serve_here(folder, watch=watch)
    # Not SDPA, which leaves Gemma-2's soft capping of attention out.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for path, module in model.named_modules():
        if isinstance(module, Apex4Linear):
            watched(module, path, theirs)
    ids = torch.tensor(prompts())
    model(ids, use_cache=False)

    count, length = ids.shape
    clean_until = torch.full((count,), length)
    seen = 0
    for path, x in ours.items():
        padding = (0, -x.shape[1] % 128)
        x, other = (torch.nn.functional.pad(each, padding) for each in (x, theirs[path]))
        assert x.shape == other.shape
        codes, _ = torch_backend.quantize_activation(x, 128)
        expected, scale = torch_backend.quantize_activation(other, 128)
        differ = codes != expected
        clean = (torch.arange(length) < clean_until[:, None]).flatten()
        first = differ & clean[:, None, None]
        exact = apply_block_hadamard(other.double()).unflatten(-1, (-1, 128)) / scale[..., None].double()
        distance = ((exact - exact.floor()) - 0.5).abs()[first]
        assert ((codes - expected).abs()[first] == 1).all() and (distance < NEAR).all(), f"{path}: {distance}"
        seen += int(clean.sum()) * x.shape[1]
        rows = differ.flatten(1).any(1).view(count, length)
        where = torch.where(rows.any(1), rows.int().argmax(1), length)
        clean_until = torch.minimum(clean_until, where)
    # Most of the model was compared: not one difference in the first linear, and everything dirty behind it.
    assert seen > sum(x.numel() for x in ours.values()) / 2
