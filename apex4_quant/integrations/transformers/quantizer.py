"""transformers 5: the config and quantizer behind `from_pretrained` of an apex4 checkpoint. Registers on import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import Apex4Error
from ...format.quant_config import QUANT_METHOD, QuantConfig
from ...models.experts import UnfusedExperts, unfuse_experts
from ...models.families import FAMILIES
from ...models.weight_files import read_header
from ...nn.linear import Apex4Linear
from ...nn.prepare import prepare_model
from ...private_names import is_weight_converter

if TYPE_CHECKING:
    # Not at run time: transformers.modeling_utils, which defines it, may be the module that imports this one.
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class Apex4Config(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, in transformers' shape; `fields` is our own checked form."""

    def __init__(self, **values: Any) -> None:
        self.fields = QuantConfig.from_dict(values)
        # transformers annotates its own methods only, and reads a name of any kind.
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return self.fields.to_dict()


@register_quantizer(QUANT_METHOD)
class Apex4HfQuantizer(HfQuantizer):
    """Swaps the linears for Apex4Linear before the weights are loaded; checks and prepares the tensors afterwards.

    transformers 5.18 to 5.23 call the methods with an underscore: they are what a quantizer has to define.
    """

    quantization_config: Apex4Config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise Apex4Error("apex4 does not quantize while loading: run 'apex4 quantize MODEL -o OUT' and load OUT")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        replace_linears(model, self.quantization_config.fields, base_prefix=getattr(model, "base_model_prefix", ""))
        if checkpoint_files and str(checkpoint_files[0]).endswith(".safetensors"):
            _require_tensors(model, [Path(file) for file in checkpoint_files])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, Apex4Linear):
                module.requires_grad_(False)
                if module.weight_packed.device.type != "meta":  # offloaded to disk: read when it is used
                    module.require_legal(name)
        names = (type(model).__name__, *(getattr(model.config, "architectures", None) or ()))
        prepare_model(model, next((FAMILIES[name] for name in names if name in FAMILIES), None))

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Renamings stay. Nothing is fused or split: the checkpoint's tensors are those of the model with its experts
        unfused, and transformers' patterns for one tensor per expert would take them for tensors to be fused."""
        # transformers 5.18 calls it with the conversions alone, 5.23 with the model too.
        return [conversion for conversion in weight_conversions if not is_weight_converter(conversion)]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace_linears(model: nn.Module, config: QuantConfig, base_prefix: str = "") -> None:
    """Put an Apex4Linear on the meta device in the place of every nn.Linear that the checkpoint stores quantized.

    Experts are unfused first. Names in the checkpoint are those of the causal LM; a bare base model's are looked up with
    its prefix.
    """
    unfuse_experts(model)
    made: dict[str, Apex4Linear] = {}  # by the name in the checkpoint
    for name, module in list(model.named_modules()):
        stored_name = name if name.startswith(f"{base_prefix}.") or not _is_base(model) else f"{base_prefix}.{name}"
        if not isinstance(module, nn.Linear) or config.keeps(stored_name) or config.keeps(name):
            continue
        format = config.linear_format(stored_name, module.out_features, module.in_features)
        new = Apex4Linear(format, module.bias is not None, module.weight.dtype, device="meta")
        new.train(module.training)
        model.set_submodule(name, new)
        made[stored_name] = new
    for name, module in made.items():
        owner = module.format.transform_from
        if owner is not None:
            if owner not in made:
                raise Apex4Error(
                    f"{name} takes its transform from {owner}, which is not in the model: config.json is damaged"
                )
            module.take_transform_from(made[owner])


def _is_base(model: nn.Module) -> bool:
    return getattr(model, "base_model", model) is model


def _require_tensors(model: nn.Module, files: list[Path]) -> None:
    """Fail before loading if a quantized tensor or one of an expert is absent or misshapen: transformers would fill it
    with noise."""
    stored = {name: info for file in files for name, info in read_header(file).items()}
    # A base model is loaded from the causal LM's checkpoint under shorter names.
    prefix = "" if not _is_base(model) else f"{model.base_model_prefix}."
    experts = [name for name, module in model.named_modules() if isinstance(module, UnfusedExperts)]
    for name, module in model.named_modules():
        kept_expert = isinstance(module, nn.Linear) and name.startswith(tuple(f"{parent}." for parent in experts))
        if not isinstance(module, Apex4Linear) and not kept_expert:
            continue
        for part, tensor in module.named_parameters():
            info = stored.get(f"{prefix}{name}.{part}") or stored.get(f"{name}.{part}")
            if info is None:
                raise Apex4Error(f"the checkpoint has no tensor {name}.{part}: it is incomplete, get it again")
            if info.shape != tuple(tensor.shape):
                raise Apex4Error(
                    f"{name}.{part} has shape {list(info.shape)} in {info.file} and {list(tensor.shape)} is needed: "
                    "the checkpoint does not belong to its config.json"
                )
