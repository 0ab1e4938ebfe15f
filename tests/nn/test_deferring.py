"""Norms and activation functions give tensors to everybody who looks, and what others put on a module stays there."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn.modules import module as torch_module

from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.nn.prepare import prepare_model

from .counted_calls import LLAMA, Make, Operators, logits_of


def fused_in(model: Any) -> tuple[int, int]:
    """Norms and gates that the quantizers compute in one call of the model."""
    with Operators() as operators:
        logits_of(model)
    return operators.count["rms_norm_linear"], operators.count["silu_mul_linear"]


@pytest.fixture
def model(small_llama: Make) -> Any:
    made = small_llama()
    prepare_model(made, LLAMA, "sm90")
    return made


@pytest.fixture
def expected(small_llama: Make) -> torch.Tensor:
    return logits_of(small_llama())


def test_without_observers_everything_is_fused(model: Any, expected: torch.Tensor) -> None:
    assert fused_in(model) == (4, 2)
    assert torch.equal(logits_of(model), expected)


# ---- hooks -----------------------------------------------------------------------------------------------------------

LAYER = "model.layers.1."
# The module that is hooked, and how many norms and gates are fused then; without hooks it is (4, 2).
HOOKED = {
    "input_layernorm": (3, 2),
    "self_attn": (3, 2),
    "self_attn.k_proj": (3, 2),
    "self_attn.o_proj": (4, 2),
    "mlp": (3, 1),
    "mlp.up_proj": (3, 2),
    "mlp.act_fn": (4, 1),
    "mlp.down_proj": (4, 1),
    "": (4, 2),
}


def tensors_in(value: Any) -> Iterator[Any]:
    for each in value if isinstance(value, tuple | list) else [value]:
        if each is not None:
            yield each


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_a_hook_sees_tensors(name: str, kind: str, model: Any, expected: torch.Tensor) -> None:
    module = model.get_submodule(f"{LAYER}{name}".removesuffix("."))
    seen: list[Any] = []

    def hook(_: nn.Module, args: Any, output: Any = None) -> None:
        seen.extend((*tensors_in(args), *tensors_in(output)))

    if kind == "forward":
        handle = module.register_forward_hook(hook)
    elif kind == "pre":
        handle = module.register_forward_pre_hook(hook)
    else:
        handle = module.register_full_backward_hook(hook)
    assert torch.equal(logits_of(model), expected)
    assert all(isinstance(each, torch.Tensor) for each in seen) and (seen or kind == "backward" or name == "self_attn")
    assert fused_in(model) == HOOKED[name]
    handle.remove()
    assert fused_in(model) == (4, 2)


def test_hooks_of_all_modules_see_tensors(model: Any, expected: torch.Tensor) -> None:
    kinds: set[type] = set()
    handle = torch_module.register_module_forward_hook(lambda module, args, output: kinds.add(type(output)))
    try:
        assert torch.equal(logits_of(model), expected)
        assert fused_in(model) == (0, 0)
    finally:
        handle.remove()
    assert torch.Tensor in kinds and not any("apex4" in kind.__module__ for kind in kinds)
    assert fused_in(model) == (4, 2)


def test_a_hook_may_change_what_passes(model: Any, small_llama: Make) -> None:
    plain = small_llama()
    for each in (model, plain):
        each.model.layers[0].input_layernorm.register_forward_hook(lambda module, args, output: output * 2)
        each.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_a_hook_that_was_there_before_a_model_is_compiled(model: Any) -> None:
    torch.compiler.reset()  # shapes of other tests make some sizes symbols
    layer = model.model.layers[0]
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output + args[0])
    targets: Counter[str] = Counter()

    def seen(graph: Any, inputs: Any) -> Any:
        targets.update(str(node.target) for node in graph.graph.nodes if "apex4" in str(node.target))
        return graph

    with torch.no_grad():
        expected = layer(x, position_embeddings=positions)
        compiled = torch.compile(layer, backend=seen, fullgraph=True)
        assert torch.equal(compiled(x, position_embeddings=positions), expected)
    assert targets["apex4.rms_norm_linear.default"] == 1 and targets["apex4.linear.default"] == 3


def test_a_copied_model_has_observers_of_its_own(model: Any, expected: torch.Tensor) -> None:
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_in(copied) == (4, 2) and torch.equal(logits_of(copied), expected)
        handle = copied.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
        assert fused_in(copied) == (3, 2) and fused_in(model) == (4, 2)
        handle.remove()
        copied.model.layers[0].mlp.gate_proj = Wrapper(copied.model.layers[0].mlp.gate_proj)
        assert fused_in(copied) == (3, 2) and fused_in(model) == (4, 2)


# ---- modules that stand around others --------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As an adapter: the layer it stands for, and something of its own of the same input."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y + x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("self_attn.q_proj", (3, 2)), ("mlp.gate_proj", (3, 2)), ("mlp.down_proj", (4, 1)), ("mlp.act_fn", (4, 1))],
)
def test_a_wrapped_module_reads_and_gives_tensors(
    name: str, fused: tuple[int, int], model: Any, small_llama: Make
) -> None:
    plain = small_llama()
    for each in (model, plain):
        layer = each.model.layers[1]
        layer.set_submodule(name, Wrapper(layer.get_submodule(name)))
    assert torch.equal(logits_of(model), logits_of(plain))
    assert fused_in(model) == fused


def adapted(model: Any, config: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(7)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "ln_tuning" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def lora_config() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    # peft knows nn.Linear and the quantized linears of some libraries; others are named to it so.
    config._register_custom_module({Apex4Linear: peft.tuners.lora.Linear})
    return config


@pytest.mark.parametrize("prepared", ["before", "after", "both"])
def test_lora_adapters(prepared: str, small_llama: Make, expected: torch.Tensor) -> None:
    wanted = logits_of(adapted(small_llama(), lora_config()))
    assert not torch.equal(wanted, expected)
    model = small_llama()
    if prepared != "after":
        prepare_model(model, LLAMA, "sm90")
    with_lora = adapted(model, lora_config())
    if prepared != "before":
        prepare_model(model, LLAMA, "sm90")
    assert torch.equal(logits_of(with_lora), wanted)
    with with_lora.disable_adapter():
        assert torch.equal(logits_of(with_lora), expected)
    assert torch.equal(logits_of(with_lora.unload()), expected)
    prepare_model(model, LLAMA, "sm90")
    assert fused_in(model) == (4, 2)


def test_tuned_norms(small_llama: Make, expected: torch.Tensor) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def config() -> Any:
        return peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"])

    wanted = logits_of(adapted(small_llama(), config()))
    assert not torch.equal(wanted, expected)
    model = small_llama()
    prepare_model(model, LLAMA, "sm90")
    assert torch.equal(logits_of(adapted(model, config())), wanted)


# ---- accelerate ------------------------------------------------------------------------------------------------------

ACCELERATED = ("input_layernorm", "self_attn.q_proj", "self_attn", "mlp.act_fn", "mlp", "")


def prepare(model: Any) -> None:
    prepare_model(model, LLAMA, "sm90")


class Counting(ModelHook):
    calls = 0

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        Counting.calls += 1
        return output


def add(model: Any) -> None:
    for name in ACCELERATED:
        add_hook_to_module(model.get_submodule(f"{LAYER}{name}".removesuffix(".")), Counting())


def remove(model: Any) -> None:
    for name in ACCELERATED:
        remove_hook_from_module(model.get_submodule(f"{LAYER}{name}".removesuffix(".")))


@pytest.mark.parametrize("order", list(itertools.product((prepare, add, remove), repeat=4)), ids=lambda order: "-".join(step.__name__ for step in order))  # fmt: skip
def test_accelerates_hooks_in_any_order(order: tuple[Any, ...], small_llama: Make, expected: torch.Tensor) -> None:
    model = small_llama()
    hooked = False
    for step in order:
        step(model)
        hooked = step is add or (hooked and step is not remove)
        Counting.calls = 0
        assert torch.equal(logits_of(model), expected)
        assert Counting.calls == (len(ACCELERATED) if hooked else 0)
    if prepare in order:
        assert fused_in(model)[0] >= 2 and fused_in(model)[1] >= 1  # of the other layer
    remove(model)
    prepare(model)
    assert fused_in(model) == (4, 2) and torch.equal(logits_of(model), expected)


def test_accelerates_hooks_are_run(model: Any) -> None:
    kinds = []

    class Looking(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            kinds.append(type(output))
            return output

    for name in ("input_layernorm", "mlp.act_fn"):
        add_hook_to_module(model.get_submodule(f"{LAYER}{name}"), Looking())
    logits_of(model)
    prepare_model(model, LLAMA, "sm90")
    logits_of(model)
    assert kinds == [torch.Tensor] * 4


def test_a_forward_of_somebody_else_stays(small_llama: Make, expected: torch.Tensor) -> None:
    model = small_llama()
    norm = model.model.layers[0].input_layernorm
    calls = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        y: torch.Tensor = type(norm).forward(norm, x)
        return y

    norm.forward = counting
    for _ in range(2):
        prepare_model(model, LLAMA, "sm90")
        assert norm.forward is counting and fused_in(model) == (3, 2)
    assert torch.equal(logits_of(model), expected) and len(calls) == 3
    del norm.forward
    prepare_model(model, LLAMA, "sm90")
    norm.forward = counting
    assert fused_in(model) == (3, 2)
    prepare_model(model, None, None)
    assert norm.forward is counting and torch.equal(logits_of(model), expected)
