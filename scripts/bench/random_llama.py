"""A Llama with random weights, written layer by layer, so that the writing process stays small too."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from apex4_quant.models.source import DEMO_PATH


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int  # at least that of the demo's tokenizer, which the model gets

    def linears(self) -> dict[str, tuple[int, int]]:
        """Of one layer: outputs and inputs by name."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden), "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden), "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden), "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }  # fmt: skip


def write_model(folder: Path, layers: int, shape: Shape, device: str = "cpu") -> int:
    """bf16, a shard for each layer. Returns the bytes of all tensors. Weights are made on `device`, which is to save time: the
    same in every run, others on another device."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=shape.vocabulary, hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / name, folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * 0.02).bfloat16().cpu()

    parts = [{"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}]
    parts += [{f"model.layers.{i}.{n}.weight": s for n, s in shape.linears().items()} for i in range(layers)]
    parts += [{"lm_head.weight": (shape.vocabulary, shape.hidden)}]
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        tensors = {name: random(*size) for name, size in part.items()}
        if 1 < number < len(parts):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{number - 2}.{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        if number == len(parts):
            tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
