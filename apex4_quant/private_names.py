"""Every private name of torch, accelerate, lm-eval and transformers that apex4 touches, each behind one function.

A private name may change with any release. So each function says which name it hides, why no public name does the same, and
the versions in which the name was seen. Nothing else in apex4 uses such a name. This module imports nothing of apex4, and
of the libraries torch only; the others when they are asked for. Python's own, of which there is one, is in environment.py:
what needs it is also imported where torch is not.

    torch         seen in 2.13
    accelerate    seen in 1.15
    lm-eval       seen in 0.4.10 to 0.4.13
    transformers  seen in 5.18 to 5.23
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

# ---- torch -----------------------------------------------------------------------------------------------------------


def current_cuda_stream(device: int) -> int:
    """The CUstream that torch works on now on the GPU of this ordinal, as an integer.

    `torch._C._cuda_getCurrentRawStream`, torch 2.13: what torch's own compiled code asks. The public
    `torch.cuda.current_stream` makes an object around it, which takes several microseconds of every launch.
    """
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tell torch.compile that the tensor stays where it is: a CUDA graph need not copy it into memory of its own.

    `torch._dynamo.mark_static_address`, torch 2.13. There is no public name for it.
    """
    torch._dynamo.mark_static_address(tensor)


def written_count(tensor: torch.Tensor) -> int:
    """How often the tensor was written to in place. Raises RuntimeError for an inference tensor, which does not count.

    `torch.Tensor._version`, torch 2.13. There is no public name for it.
    """
    return tensor._version


def child_modules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """The children by name, as they are at any time: the mapping stays the same object.

    `torch.nn.Module._modules`, torch 2.13. The public `named_children` makes an iterator over it in every call.
    """
    return module._modules


def hook_tables(module: nn.Module) -> tuple[Mapping[Any, Any], ...]:
    """The module's tables of forward and backward hooks and pre-hooks, as they are at any time: empty without hooks.

    `torch.nn.Module._forward_hooks`, `_forward_pre_hooks`, `_backward_hooks` and `_backward_pre_hooks`, torch 2.13.
    Hooks can be registered by public names and not be asked for.
    """
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def global_hook_tables() -> tuple[Mapping[Any, Any], ...]:
    """The tables of hooks of all modules, as `hook_tables`.

    `torch.nn.modules.module._global_forward_hooks`, `_global_forward_pre_hooks`, `_global_backward_hooks` and
    `_global_backward_pre_hooks`, torch 2.13.
    """
    return (
        _torch_module._global_forward_hooks,
        _torch_module._global_forward_pre_hooks,
        _torch_module._global_backward_hooks,
        _torch_module._global_backward_pre_hooks,
    )


# ---- accelerate ------------------------------------------------------------------------------------------------------


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps this module's tensors elsewhere and brings them for each call.

    The attribute `_hf_hook` that `accelerate.hooks.add_hook_to_module` sets, the `hooks` of a SequentialHook and the
    `offload` of an AlignDevicesHook, accelerate 1.15.
    """
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def offloaded_tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor `name` of a module whose tensors accelerate keeps elsewhere, or None where it does not.

    The `weights_map` of the AlignDevicesHook in `_hf_hook`, accelerate 1.15.
    """
    tensors = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return None if tensors is None else tensors[name]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let the module compute by `forward`, inside what accelerate does around it, if it does.

    The attribute `_old_forward` that `accelerate.hooks.add_hook_to_module` calls, accelerate 1.15: `forward` is its own then.
    """
    setattr(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward", forward)


# ---- lm-eval ---------------------------------------------------------------------------------------------------------


@contextmanager
def without_git_commit() -> Iterator[None]:
    """Let lm-eval not ask git for the commit of the working directory: git complains on stderr where there is none.

    `lm_eval.evaluator.get_git_commit_hash`, lm-eval 0.4.10 to 0.4.13. `simple_evaluate` has no option for it.
    """
    from lm_eval import evaluator

    asked = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def compute_on(harness: Any, device: torch.device) -> None:
    """Let an `HFLM` put its tokens on this device: it takes that of the model's first tensor, which may be on the disk.

    `lm_eval.models.huggingface.HFLM._device`, lm-eval 0.4.10 to 0.4.13. The option is ignored for a model that is loaded.
    """
    harness._device = device


# ---- transformers ----------------------------------------------------------------------------------------------------


def is_weight_converter(conversion: object) -> bool:
    """Whether a conversion of a checkpoint's tensors fuses, splits or computes, and does not only rename.

    `transformers.core_model_loading.WeightConverter`, transformers 5.18 to 5.23. It is in no page of the documentation's
    reference; quantizers are handed its instances and have to tell them from `WeightRenaming`.
    """
    from transformers.core_model_loading import WeightConverter

    return isinstance(conversion, WeightConverter)
