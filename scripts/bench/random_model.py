"""A model with random weights of a published model's shape, written layer by layer, so that the writing process stays small too:
a Llama, or a Qwen3 with a mixture of experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from model_shapes import Shape
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from apex4_quant.models.place import DEMO_PATH


def config_of(shape: Shape, layers: int) -> PretrainedConfig:
    common = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "num_hidden_layers": layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
        "intermediate_size": shape.intermediate, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    if not shape.experts:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **common)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], num_experts=shape.experts, num_experts_per_tok=shape.experts_per_token,
        moe_intermediate_size=shape.intermediate, norm_topk_prob=True, **common,
    )  # fmt: skip


def write_model(folder: Path, layers: int, shape: Shape, device: str = "cpu") -> int:
    """bf16, a shard for each layer. Returns the bytes of all tensors. Weights are made on `device`, which is to save time: the
    same in every run, others on another device."""
    folder.mkdir(parents=True, exist_ok=True)
    config_of(shape, layers).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / name, folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        return (torch.randn(size, generator=generator, device=device) * 0.02).bfloat16().cpu()

    outer = (shape.vocabulary, shape.hidden)
    parts: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens": outer}]
    parts += [{f"model.layers.{i}.{name}": size for name, size in shape.layer().items()} for i in range(layers)]
    parts += [{"lm_head": outer, "model.norm": (shape.hidden,)}]
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        tensors = {f"{name}.weight": random(size) for name, size in part.items()}
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
