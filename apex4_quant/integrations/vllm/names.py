"""Which linears of a checkpoint a layer of vLLM stands for, by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...models.families import FAMILIES, MIXTRAL_NAMES

# What vLLM's layers of these names are where a model class does not say otherwise (Qwen3-MoE has dense layers and says nothing).
USUAL_MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# vLLM's latent attention (DeepSeek) takes this linear apart and multiplies by its weights itself, without quantizing what they
# are multiplied by.
LATENT = ".kv_b_proj"
ROUTERS = tuple({f".{family.experts.router}" for family in FAMILIES.values() if family.experts is not None})


def stored_name(prefix: str) -> str:
    """The name in an apex4 checkpoint of what vLLM calls `prefix`: vLLM's Mixtral has the published names."""
    for there, here in MIXTRAL_NAMES:
        # Suffixes of these pairs end in ".weight": they are of tensors, not of modules.
        if not there.endswith(".weight"):
            prefix = f"{prefix}.".replace(there, here)[:-1]
    return prefix


def published_names() -> list[tuple[str, str]]:
    """Pairs (substring in an apex4 checkpoint of a Mixtral, substring that vLLM's Mixtral loads)."""
    pairs = []
    for there, here in MIXTRAL_NAMES:
        pairs.append((here.removesuffix("weight"), there.removesuffix("weight")))
    return pairs


def is_router(prefix: str) -> bool:
    """Whether the layer chooses experts: never quantized, and not among `modules_to_not_convert`."""
    return stored_name(prefix).endswith(ROUTERS)


def member_names(prefix: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """The linears in the checkpoint that the layer `prefix` runs in one, in their order.

    `packed_modules` is vLLM's mapping of the model class, e.g. {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}.
    """
    parent, _, last = stored_name(prefix).rpartition(".")
    dot = "." if parent else ""
    return [f"{parent}{dot}{name}" for name in packed_modules.get(last) or USUAL_MEMBERS.get(last, (last,))]
