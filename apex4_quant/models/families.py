"""Which architectures are understood, as data. Adding one is one entry of `FAMILIES`.

An entry says where the decoder layers and the modules around them are, which linears of a layer read the same input,
in the order in which a layer computes them, and where each such input comes from. Linears that share an input are
quantized together: their input is quantized once, so they share a group transform and an activation clip ratio.
Where an input comes from decides what can be folded into the weights before it (function_preserving.py).

Layers of one model may differ (dense and sparse MLPs), so what is true of a layer is asked with config.json and the
layer's index: `stages`, `groups`, `linears`, `residual_writers`. Experts appear unfused, as in experts.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import Apex4Error, UsageError


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
    not quantized (the router of a mixture of experts). The gate and up projections of all experts of a layer are one
    group: every expert reads some rows of one tensor.
    """

    linears: tuple[str, ...]
    norm: str | None = None
    producer: Producer | None = None
    also_read_by: tuple[str, ...] = ()


def expert_of(linear: str) -> int | None:
    """The index of the expert that a linear belongs to, from its name (full or relative); None outside experts."""
    found = re.search(r"\.experts\.(\d+)\.", linear)
    return int(found[1]) if found else None


ATTENTION: tuple[InputGroup, ...] = (
    InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
    InputGroup(("self_attn.o_proj",), producer=Producer("self_attn.v_proj", per_head=True)),
)
GATED_MLP: tuple[InputGroup, ...] = (
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
    InputGroup(("mlp.down_proj",), producer=Producer("mlp.up_proj")),
)


FUSED_ATTENTION: tuple[InputGroup, ...] = (
    InputGroup(("self_attn.qkv_proj",), norm="input_layernorm"),
    InputGroup(("self_attn.o_proj",), producer=Producer("self_attn.qkv_proj", rows="value", per_head=True)),
)
FUSED_MLP: tuple[InputGroup, ...] = (
    InputGroup(("mlp.gate_up_proj",), norm="post_attention_layernorm"),
    InputGroup(("mlp.down_proj",), producer=Producer("mlp.gate_up_proj", rows="up")),
)
# Gemma: post_attention_layernorm stands behind the attention, not before the MLP.
GEMMA_MLP: tuple[InputGroup, ...] = (
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), norm="pre_feedforward_layernorm"),
    InputGroup(("mlp.down_proj",), producer=Producer("mlp.up_proj")),
)


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands for the MLP in the sparse layers of a family.

    `module` holds the experts, `router` chooses among them and is never quantized, `norm` is what both read. `renames`
    are pairs (in the published checkpoints, in the model) applied to tensor names in this order.
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate"
    norm: str = "post_attention_layernorm"
    renames: tuple[tuple[str, str], ...] = ()

    def count(self, config: dict[str, Any]) -> int:
        """Raises Apex4Error if config.json does not say how many experts a layer has."""
        return _positive(config, "num_local_experts", "num_experts")

    def token_share(self, config: dict[str, Any]) -> float:
        """The part of all tokens that an expert sees if all experts see equally many."""
        return min(1.0, _positive(config, "num_experts_per_tok") / self.count(config))

    def in_layer(self, config: dict[str, Any], layer: int) -> bool:
        """Whether the layer is sparse. A family without these settings (Mixtral) has no dense layers.

        Raises Apex4Error for settings that cannot be.
        """
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise Apex4Error("config.json has no usable mlp_only_layers: the file is damaged, get it again")
        every = 1 if config.get("decoder_sparse_step") is None else _positive(config, "decoder_sparse_step")
        return layer not in dense and (layer + 1) % every == 0

    def stages(self, count: int) -> tuple[tuple[InputGroup, ...], ...]:
        names = [f"{self.module}.{expert}" for expert in range(count)]
        entering = InputGroup(
            tuple(f"{name}.{part}" for name in names for part in ("gate_proj", "up_proj")),
            norm=self.norm,
            also_read_by=(self.router,),
        )
        inner = tuple(InputGroup((f"{name}.down_proj",), producer=Producer(f"{name}.up_proj")) for name in names)
        return ((entering,), inner)


_MOST = 2**16  # of experts, and of layers between sparse ones: more are a damaged file, and would be counted through


def _positive(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST:
            return value
    raise Apex4Error(f"config.json has no usable {names[0]}: the file is damaged, get it again")


@dataclass(frozen=True)
class Family:
    """One architecture: `architecture` is the class name that transformers writes into config.json, `model_type` the name
    from which transformers finds the class.

    `attention` and `mlp` are the input groups of a dense layer; in sparse layers `experts` stands for `mlp`.
    `norm_offset` is added to the stored gain of an RMSNorm (1 in Gemma). `rotatable` is False where a norm stands
    between a residual writer and the stream: its gain cannot be rotated. `scaled_embedding`: what enters layer 0 is the
    embedding times the root of its width.
    """

    architecture: str
    model_type: str
    attention: tuple[InputGroup, ...] = ATTENTION
    mlp: tuple[InputGroup, ...] = GATED_MLP
    experts: Experts | None = None
    norm_offset: float = 0.0
    rotatable: bool = True
    scaled_embedding: bool = False
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    def stages(self, config: dict[str, Any], layer: int) -> tuple[tuple[InputGroup, ...], ...]:
        """The input groups of a layer in the order of computation; those of one stage can be seen in one pass.

        `config` is config.json as read. Raises Apex4Error if it lacks a number of experts.
        """
        dense = tuple((group,) for group in self.attention + self.mlp)
        if self.experts is None or not self.experts.in_layer(config, layer):
            return dense
        return dense[: len(self.attention)] + self.experts.stages(self.experts.count(config))

    def groups(self, config: dict[str, Any], layer: int) -> list[InputGroup]:
        """The input groups of a layer in the order of computation."""
        return [group for stage in self.stages(config, layer) for group in stage]

    def linears(self, config: dict[str, Any], layer: int) -> list[str]:
        """Every linear of a layer, relative to the layer, in the order of computation."""
        return [linear for group in self.groups(config, layer) for linear in group.linears]

    def residual_writers(self, config: dict[str, Any], layer: int) -> list[str]:
        """The linears of a layer whose output is added to the residual stream.

        With what reads the stream (the groups that have a norm) they are what a rotation of it is merged into.
        """
        return [linear for linear in self.linears(config, layer) if linear.endswith(("o_proj", "down_proj"))]


GEMMA: dict[str, Any] = {"mlp": GEMMA_MLP, "norm_offset": 1.0, "rotatable": False, "scaled_embedding": True}
MIXTRAL_NAMES = (
    (".block_sparse_moe.", ".mlp."),
    (".w1.weight", ".gate_proj.weight"),
    (".w3.weight", ".up_proj.weight"),
    (".w2.weight", ".down_proj.weight"),
)

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("MixtralForCausalLM", "mixtral", experts=Experts(renames=MIXTRAL_NAMES)),
        Family("Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3ForCausalLM", "qwen3"),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", experts=Experts()),
        Family("Phi3ForCausalLM", "phi3", attention=FUSED_ATTENTION, mlp=FUSED_MLP),
        Family("Gemma2ForCausalLM", "gemma2", **GEMMA),
        Family("Gemma3ForCausalLM", "gemma3_text", **GEMMA),
    )
}

# Buffers that old checkpoints carry and every current model computes itself.
RECOMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a model's config.json: by its `architectures`, or like transformers by `model_type` where it has none.

    Raises UsageError naming the supported ones, Apex4Error where the two name different ones.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise Apex4Error(f"architectures in config.json of {where} is no list of names: the file is damaged")
    by_type = next((family for family in FAMILIES.values() if family.model_type == model_type), None)
    family = next((FAMILIES[name] for name in architectures if name in FAMILIES), None)
    if family is not None:
        if by_type is not None and by_type.model_type != family.model_type:
            raise Apex4Error(
                f"config.json of {where} says architecture {family.architecture} and model_type {model_type!r}, of which "
                f"transformers makes {by_type.architecture}: correct the one that is wrong"
            )
        return family
    if by_type is not None and not architectures:
        return by_type
    given = ", ".join(architectures) or f"model_type {model_type!r}"
    raise UsageError(
        f"{where} has the architecture {given}, which is not supported: apex4 quantizes {', '.join(FAMILIES)}"
    )
