"""Which architectures are understood, as data. Adding one is one entry of `FAMILIES`.

An entry says where the decoder layers and the modules around them are, which linears of a layer read the same input,
in the order in which a layer computes them, and where each such input comes from. Linears that share an input are
quantized together: their input is quantized once, so they share a group transform and an activation clip ratio.
Where an input comes from decides what can be folded into the weights before it (function_preserving.py).

Layers of one model may differ (dense and sparse MLPs, full and linear attention), so what is true of a layer is asked
with config.json and the layer's index: `stages`, `groups`, `linears`, `residual_writers`. Experts appear unfused, as in
experts.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import Apex4Error, UsageError


@dataclass(frozen=True)
class Producer:
    """The linear whose output rows are, up to elementwise factors and token mixing, an input group's channels.

    Scaling row i of it scales channel i of the input. `rows` says which rows of a fused weight those are: "all",
    "value" (the last of q, k, v) or "up" (the second half). `per_head`: the output is `num_key_value_heads` heads, each
    read by several query heads, so that channels of one key/value head share their factor. `gated`: every channel is
    multiplied by a gate of its own on the way, which a factor passes and a rotation of the head's channels does not.
    """

    linear: str
    rows: str = "all"
    per_head: bool = False
    gated: bool = False


@dataclass(frozen=True)
class InputGroup:
    """Linears of a decoder layer that read the same tensor; names are relative to the layer.

    The tensor comes from `norm`, the RMSNorm of the residual stream, or from `producer`; where it comes from elsewhere
    (a norm of something else, a product of states) neither is given, and nothing can be folded into what is before.
    `also_read_by` are linears that read it too and are not quantized (the router of a mixture of experts). The gate and
    up projections of all experts of a layer are one group: every expert reads some rows of one tensor. Groups of one
    norm (of shared experts) name the same `also_read_by`.
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


# OLMo 2: no norm before attention and MLP, whose outputs are normed.
OLMO2_ATTENTION: tuple[InputGroup, ...] = (replace(ATTENTION[0], norm=None), ATTENTION[1])
OLMO2_MLP: tuple[InputGroup, ...] = (replace(GATED_MLP[0], norm=None), GATED_MLP[1])
# OLMoE may clamp q, k and v: o_proj's input is then not proportional to v_proj's rows.
CLAMPED_ATTENTION: tuple[InputGroup, ...] = (ATTENTION[0], InputGroup(("self_attn.o_proj",)))
# Qwen3-Next: three of four layers are gated delta nets; the others gate what attention returns.
GATED_ATTENTION: tuple[InputGroup, ...] = (
    ATTENTION[0],
    InputGroup(("self_attn.o_proj",), producer=Producer("self_attn.v_proj", per_head=True, gated=True)),
)
DELTA_NET: tuple[InputGroup, ...] = (
    InputGroup(("linear_attn.in_proj_qkvz",), norm="input_layernorm", also_read_by=("linear_attn.in_proj_ba",)),
    InputGroup(("linear_attn.out_proj",)),
)


def latent_attention(config: dict[str, Any]) -> tuple[InputGroup, ...]:
    """DeepSeek: queries, keys and values come from latent vectors, each behind a norm of its own; small models have no
    latent vector of queries (`q_lora_rank` null). Rows of values lie in kv_b_proj between those of keys, head by head."""
    if config.get("q_lora_rank", True) is None:
        queries: tuple[InputGroup, ...] = ()
        entering = "self_attn.q_proj"
    else:
        queries = (InputGroup(("self_attn.q_b_proj",)),)
        entering = "self_attn.q_a_proj"
    return (
        InputGroup((entering, "self_attn.kv_a_proj_with_mqa"), norm="input_layernorm"),
        *queries,
        InputGroup(("self_attn.kv_b_proj",)),
        InputGroup(("self_attn.o_proj",)),
    )


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands for the MLP in the sparse layers of a family.

    `module` holds the experts, `router` chooses among them and is never quantized, `norm` is what both read. `shared` is
    an MLP that every token passes beside them, `shared_gate` a linear of one row that weighs it and is kept. `first_dense`
    names the setting that says how many layers at the beginning are dense. `renames` are pairs (in the published
    checkpoints, in the model) applied to tensor names in this order. `interleaved`: fused tensors are stored
    [E, inputs, outputs], rows of gate and up in turns, with biases, and a clamped product joins them (GPT-OSS).
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate"
    norm: str = "post_attention_layernorm"
    shared: str | None = None
    shared_gate: str | None = None
    first_dense: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    interleaved: bool = False

    @property
    def kept_linears(self) -> tuple[str, ...]:
        """Linears of a sparse layer that are never quantized, beside the router."""
        return () if self.shared_gate is None else (self.shared_gate,)

    def count(self, config: dict[str, Any]) -> int:
        """Raises Apex4Error if config.json does not say how many experts a layer has."""
        return _positive(config, "num_local_experts", "num_experts", "n_routed_experts")

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
        if self.first_dense is not None and config.get(self.first_dense) != 0:
            dense = range(_positive(config, self.first_dense))
        every = 1 if config.get("decoder_sparse_step") is None else _positive(config, "decoder_sparse_step")
        return layer not in dense and (layer + 1) % every == 0

    def stages(self, count: int) -> tuple[tuple[InputGroup, ...], ...]:
        names = [f"{self.module}.{expert}" for expert in range(count)]
        readers = (self.router, *self.kept_linears)
        entering = InputGroup(
            tuple(f"{name}.{part}" for name in names for part in ("gate_proj", "up_proj")),
            norm=self.norm,
            also_read_by=readers,
        )
        # A clamped product is not proportional to up.
        inner = tuple(
            InputGroup((f"{name}.down_proj",), producer=None if self.interleaved else Producer(f"{name}.up_proj"))
            for name in names
        )
        if self.shared is None:
            return ((entering,), inner)
        shared = InputGroup(
            (f"{self.shared}.gate_proj", f"{self.shared}.up_proj"), norm=self.norm, also_read_by=readers
        )
        behind = InputGroup((f"{self.shared}.down_proj",), producer=Producer(f"{self.shared}.up_proj"))
        return ((entering,), inner, (shared,), (behind,))


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

    `attention` and `mlp` are the input groups of a dense layer; in sparse layers `experts` stands for `mlp`. `attention`
    may depend on config.json. In layers that `layer_types` there calls "linear_attention", `linear_attention` stands for
    it; where config.json has no such list, every `full_attention_interval`-th layer (4th) has full attention.
    `further_layers` names the setting that says how many layers behind the last one predict further tokens: transformers
    does not load them, and they are left away.
    `norm_offset` is added to the stored gain of an RMSNorm (1 in Gemma). `norm_rounds_once`: a norm without an offset
    multiplies by its gain in float32 all the same, which the kernels for norms do not, so that it is left to the model. `rotatable` is False where a norm stands
    between a residual writer and the stream: its gain cannot be rotated, nor can the stream where others write to it.
    `scaled_embedding`: what enters layer 0 is the embedding times the root of its width.
    `beside` names modules that stand beside the language model (one that sees pictures), none of whose linears is
    quantized and whose tensors are copied. Then config.json has the language model's settings in `text_config`,
    `text_types` are the language models that may stand there, by their model_type, and `prefixes` are pairs (published, in the model) of how names of its tensors begin.
    """

    architecture: str
    model_type: str
    attention: tuple[InputGroup, ...] | Callable[[dict[str, Any]], tuple[InputGroup, ...]] = ATTENTION
    mlp: tuple[InputGroup, ...] = GATED_MLP
    experts: Experts | None = None
    linear_attention: tuple[InputGroup, ...] = ()
    further_layers: str | None = None
    norm_offset: float = 0.0
    norm_rounds_once: bool = False
    rotatable: bool = True
    scaled_embedding: bool = False
    beside: tuple[str, ...] = ()
    text_types: tuple[str, ...] = ()
    prefixes: tuple[tuple[str, str], ...] = ()
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def language_model(self) -> str:
        """The module that has the embedding, the layers and the norm behind them."""
        return self.layers.rpartition(".")[0]

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads such a model."""
        return "AutoModelForImageTextToText" if self.beside else "AutoModelForCausalLM"

    def name_in_model(self, stored: str) -> str:
        """Of a tensor of the language model, from that in a checkpoint."""
        for published, here in self.prefixes:
            if stored.startswith(published):
                return here + stored.removeprefix(published)
        return stored

    def published_name(self, name: str) -> str:
        for published, here in self.prefixes:
            if name.startswith(here):
                return published + name.removeprefix(here)
        return name

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    def stages(self, config: dict[str, Any], layer: int) -> tuple[tuple[InputGroup, ...], ...]:
        """The input groups of a layer in the order of computation; those of one stage can be seen in one pass.

        `config` is config.json as read. Raises Apex4Error if it lacks a number of experts.
        """
        attention = tuple((group,) for group in self._attention(config, layer))
        if self.experts is None or not self.experts.in_layer(config, layer):
            return attention + tuple((group,) for group in self.mlp)
        return attention + self.experts.stages(self.experts.count(config))

    def _attention(self, config: dict[str, Any], layer: int) -> tuple[InputGroup, ...]:
        if self.linear_attention and _is_linear_attention(config, layer):
            return self.linear_attention
        return self.attention(config) if callable(self.attention) else self.attention

    def kept_linears(self, config: dict[str, Any], layer: int) -> list[str]:
        """Linears of a layer (instances of nn.Linear) that are never quantized, relative to the layer."""
        kept = [name for group in self._attention(config, layer) for name in group.also_read_by]
        if self.experts is not None and self.experts.in_layer(config, layer):
            kept += self.experts.kept_linears
        return kept

    def left_away(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Prefixes of tensors that transformers does not load. Raises Apex4Error for an impossible number of layers."""
        if self.further_layers is None or not config.get(self.further_layers):
            return ()
        first = int(config["num_hidden_layers"])
        return tuple(self.layer_prefix(first + i) for i in range(_positive(config, self.further_layers)))

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
        return [
            linear for linear in self.linears(config, layer) if linear.endswith(("o_proj", "out_proj", "down_proj"))
        ]


def _is_linear_attention(config: dict[str, Any], layer: int) -> bool:
    """Raises Apex4Error for settings that cannot be."""
    types = config.get("layer_types")
    if types is None:
        interval = 4 if config.get("full_attention_interval") is None else _positive(config, "full_attention_interval")
        return (layer + 1) % interval != 0
    if not isinstance(types, list) or len(types) <= layer:
        raise Apex4Error("config.json has no usable layer_types: the file is damaged, get it again")
    return bool(types[layer] == "linear_attention")


GEMMA: dict[str, Any] = {"mlp": GEMMA_MLP, "norm_offset": 1.0, "rotatable": False, "scaled_embedding": True}
# A language model and one that sees pictures, whose features stand in for embeddings of some tokens: so the residual
# stream cannot be rotated.
WITH_VISION: dict[str, Any] = {
    "rotatable": False,
    "beside": ("model.vision_tower", "model.multi_modal_projector"),
    "prefixes": (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")),
    "layers": "model.language_model.layers",
    "embedding": "model.language_model.embed_tokens",
    "rotary": "model.language_model.rotary_emb",
    "final_norm": "model.language_model.norm",
}
MIXTRAL_NAMES = (
    (".block_sparse_moe.", ".mlp."),
    (".w1.weight", ".gate_proj.weight"),
    (".w3.weight", ".up_proj.weight"),
    (".w2.weight", ".down_proj.weight"),
)

QWEN_EXPERTS = Experts(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
GPT_OSS_EXPERTS = Experts(router="mlp.router", interleaved=True)
DEEPSEEK_EXPERTS = Experts(shared="mlp.shared_experts", first_dense="first_k_dense_replace")

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("MixtralForCausalLM", "mixtral", experts=Experts(renames=MIXTRAL_NAMES)),
        Family("Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3ForCausalLM", "qwen3"),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", experts=Experts()),
        Family("Qwen2MoeForCausalLM", "qwen2_moe", experts=QWEN_EXPERTS),
        Family(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            attention=GATED_ATTENTION,
            linear_attention=DELTA_NET,
            experts=QWEN_EXPERTS,
            norm_offset=1.0,
        ),
        Family("DeepseekV2ForCausalLM", "deepseek_v2", attention=latent_attention, experts=DEEPSEEK_EXPERTS),
        Family(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            attention=latent_attention,
            experts=DEEPSEEK_EXPERTS,
            further_layers="num_nextn_predict_layers",
        ),
        Family("GptOssForCausalLM", "gpt_oss", experts=GPT_OSS_EXPERTS, norm_rounds_once=True),
        Family("OlmoeForCausalLM", "olmoe", attention=CLAMPED_ATTENTION, experts=Experts()),
        Family("Olmo2ForCausalLM", "olmo2", attention=OLMO2_ATTENTION, mlp=OLMO2_MLP, rotatable=False),
        Family("GraniteForCausalLM", "granite"),
        Family("Phi3ForCausalLM", "phi3", attention=FUSED_ATTENTION, mlp=FUSED_MLP),
        Family("Gemma2ForCausalLM", "gemma2", **GEMMA),
        Family("Gemma3ForCausalLM", "gemma3_text", **GEMMA),
        Family("Mistral3ForConditionalGeneration", "mistral3", text_types=("mistral", "ministral3"), **WITH_VISION),
        Family("Gemma3ForConditionalGeneration", "gemma3", text_types=("gemma3_text",), **GEMMA | WITH_VISION),
    )
}

# Buffers that old checkpoints carry and every current model computes itself.
RECOMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)


_LLAMA4 = (
    "whose experts read their input times the router's weight, which apex4 does not quantize: give another model, such as a "
    "Llama 3 or a Qwen3-MoE"
)
# Architectures that are asked for and cannot be had, by the reason and what to do.
REFUSED = {"Llama4ForConditionalGeneration": _LLAMA4, "Llama4ForCausalLM": _LLAMA4}


def _with_known_text(family: Family, config: dict[str, Any], where: str) -> Family:
    """Raise UsageError if the language model inside is not one that stands there usually."""
    inside = config.get("text_config")
    if not family.beside:
        return family
    if not isinstance(inside, dict):
        raise Apex4Error(f"config.json of {where} has no text_config: the file is damaged, get it again")
    found = inside.get("model_type", family.text_types[0])
    if found not in family.text_types:
        raise UsageError(
            f"{where} has the architecture {family.architecture} with a language model of type {found!r}, which is not "
            f"supported there: apex4 quantizes {' and '.join(family.text_types)}"
        )
    return family


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
        return _with_known_text(family, config, where)
    if by_type is not None and not architectures:
        return _with_known_text(by_type, config, where)
    given = ", ".join(architectures) or f"model_type {model_type!r}"
    if refused := next((REFUSED[name] for name in architectures if name in REFUSED), None):
        raise UsageError(f"{where} has the architecture {given}, {refused}")
    inside = config.get("text_config")
    if isinstance(inside, dict):
        raise UsageError(
            f"{where} has the architecture {given}, in which a language model ({inside.get('model_type', 'unnamed')}) stands "
            "beside others: save its language model with its head as a folder of its own, and give that"
        )
    raise UsageError(
        f"{where} has the architecture {given}, which is not supported: apex4 quantizes {', '.join(FAMILIES)}"
    )


def auto_class_of(config: dict[str, Any]) -> str:
    """The class of transformers that loads the model of a config.json, supported here or not."""
    by_type = next((family for family in FAMILIES.values() if family.model_type == config.get("model_type")), None)
    return "AutoModelForCausalLM" if by_type is None else by_type.auto_class
