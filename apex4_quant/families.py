"""Which architectures are understood, as data. Adding one is one entry of `FAMILIES`.

An entry says where the decoder layers and the modules around them are, and which linears of a layer read the same
input, in the order in which a layer computes them. Linears that share an input are quantized together: they see the
same activations, share a group transform, and their statistics are collected once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UsageError

InputGroup = tuple[str, ...]  # names of linears inside a decoder layer that read the same tensor

ATTENTION_AND_GATED_MLP: tuple[InputGroup, ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Family:
    """One architecture: `architecture` is the class name that transformers writes into config.json."""

    architecture: str
    input_groups: tuple[InputGroup, ...] = ATTENTION_AND_GATED_MLP
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM"),
        Family("MistralForCausalLM"),
        Family("Qwen2ForCausalLM"),
        Family("Qwen3ForCausalLM"),
    )
}

# Buffers that old checkpoints carry and every current model computes itself.
RECOMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a model's config.json. Raises UsageError naming the supported ones."""
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name]
    given = ", ".join(architectures) or f"model_type {config.get('model_type')!r}"
    raise UsageError(
        f"{where} has the architecture {given}, which is not supported: apex4 quantizes {', '.join(FAMILIES)}"
    )
