"""Which architectures are understood, as data. Adding one is one entry of `FAMILIES`.

An entry says where the decoder layers and the modules around them are, which linears of a layer read the same input,
in the order in which a layer computes them, and where each such input comes from. Linears that share an input are
quantized together: they see the same activations, share a group transform, and their statistics are collected once.
Where an input comes from decides what can be folded into the weights before it (model_transform.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UsageError


@dataclass(frozen=True)
class Producer:
    """The linear whose output rows are, up to elementwise factors and token mixing, an input group's channels.

    Scaling row i of it scales channel i of the input. `rows` says which rows of a fused weight those are: "all",
    "value" (the last of q, k, v) or "up" (the second half). `per_head`: the output is `num_key_value_heads` heads, each
    read by several query heads, so that channels of one key/value head share their factor.
    """

    linear: str
    rows: str = "all"
    per_head: bool = False


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that read the same tensor; names are relative to the layer.

    The tensor comes from the RMSNorm `norm` or from `producer`. `also_read_by` are linears that read it too and are
    not quantized (the router of a mixture of experts).
    """

    linears: tuple[str, ...]
    norm: str | None = None
    producer: Producer | None = None
    also_read_by: tuple[str, ...] = ()


ATTENTION: tuple[InputGroup, ...] = (
    InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
    InputGroup(("self_attn.o_proj",), producer=Producer("self_attn.v_proj", per_head=True)),
)
GATED_MLP: tuple[InputGroup, ...] = (
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    InputGroup(("mlp.down_proj",), producer=Producer("mlp.up_proj")),
)


@dataclass(frozen=True)
class Family:
    """One architecture: `architecture` is the class name that transformers writes into config.json.

    `residual_writers` are the linears of a layer whose output is added to the residual stream; with what reads it (the
    inputs that come from a norm) they are what a rotation of the stream is merged into. `norm_offset` is added to the
    stored gain of an RMSNorm (1 in Gemma). `rotatable` is False where a norm stands between a writer and the stream:
    its gain cannot be rotated.
    """

    architecture: str
    input_groups: tuple[InputGroup, ...] = ATTENTION + GATED_MLP
    residual_writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    norm_offset: float = 0.0
    rotatable: bool = True
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    def linears(self) -> list[str]:
        """Every linear of one decoder layer, relative to the layer, in the order of computation."""
        return [linear for group in self.input_groups for linear in group.linears]


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
