"""The quantization method `apex4` as vLLM sees it: what config.json says, and which layer gets which method."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ... import __version__
from ...environment import ACTIVATIONS, KERNEL
from ...errors import Apex4Error
from ...format.quant_config import QUANT_METHOD, QuantConfig
from . import names
from .backend import FloatBudget

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.utils import WeightsMapper


class Apex4Config(QuantizationConfig):
    """The `quantization_config` of a checkpoint; `fields` is the checked form."""

    def __init__(self, fields: QuantConfig) -> None:
        super().__init__()
        self.fields = fields
        self.kept = frozenset(fields.modules_to_not_convert)
        self.budget = FloatBudget()
        self.has_published_names = False  # vLLM's model has the names of the published Mixtral

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]  # float32 without kernels only: backend.kernel_of

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # backend.kernel_of says which GPU has no kernels, and what to do

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has it

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Apex4Config:
        """Raises Apex4Error for a format that this release does not read."""
        return cls(QuantConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        # vLLM's key of compiled graphs is made of the attributes of hf_config, `quantization_config` among them. What else
        # decides what is compiled is our code and which arithmetic is asked for.
        if hf_config is not None:
            hf_config.apex4_compiled_by = " ".join(
                (__version__, *(os.environ.get(name, "") for name in (KERNEL, ACTIVATIONS)))
            ).strip()

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """vLLM's Mixtral loads the published names; an apex4 checkpoint has those of transformers' class."""
        mapper = QuantizationConfig.get_cache_scale_mapper()
        if self.has_published_names:
            from vllm.model_executor.models.utils import WeightsMapper

            mapper = WeightsMapper(orig_to_new_substr=dict(names.published_names())) | mapper
        return mapper

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises Apex4Error for a layer whose members cannot run in one."""
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .fusion import install
        from .linear import Apex4LinearMethod

        self.has_published_names |= names.stored_name(prefix) != prefix
        if isinstance(layer, RoutedExperts):
            return self._method_of_experts(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None  # embeddings, heads and attention are vLLM's
        members = names.member_names(prefix, self.packed_modules_mapping)
        plain = [name for name in members if name in self.kept]
        if len(plain) == len(members) or names.is_router(prefix):
            return UnquantizedLinearMethod()
        if plain:
            other = next(name for name in members if name not in self.kept)
            raise Apex4Error(
                f"vLLM runs {plain[0]}, which is not quantized, and {other}, which is, in one layer: quantize both or neither"
            )
        vllm = get_current_vllm_config()
        if prefix.endswith(names.LATENT) and vllm.model_config is not None and vllm.model_config.use_mla:
            raise Apex4Error(
                f"vLLM computes with the weights of {prefix} within latent attention, not as a linear, and that one is quantized: "
                f"quantize with --ignore '*{names.LATENT}'"
            )
        install(vllm)
        return Apex4LinearMethod(self.fields, self.budget, members)

    def _method_of_experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        from .experts import Apex4MoEMethod

        experts = names.stored_name(prefix)
        linears = [
            f"{experts}.{index}.{name}"
            for index in range(layer.global_num_experts)
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        plain = [name for name in linears if name in self.kept]
        if len(plain) == len(linears):
            return None  # vLLM's own
        if plain:
            other = next(name for name in linears if name not in self.kept)
            raise Apex4Error(
                f"vLLM runs all experts of {experts} in one way, {plain[0]} is not quantized and {other} is: quantize all or none"
            )
        return Apex4MoEMethod(self.fields, self.budget, layer, prefix)
