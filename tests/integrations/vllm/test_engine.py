"""The real vLLM in this process: the same tokens and logprobs as transformers, and what must not load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apex4_quant.errors import Apex4Error

from .generating import prompts

pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")

# vLLM 0.32's own operator for CPUs is wrong where only a part of each head is rotated, interleaved: PyTorch's operations then.
ROTATED_BY_TORCH = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}


@pytest.mark.parametrize(
    ("name", "recipe", "settings", "options"),
    [
        ("demo", "apex4-fast", {}, {}),
        # torch.compile, and prompts in chunks
        ("qwen3", "apex4-fast", {}, {"enforce_eager": False, "max_num_batched_tokens": 32, "max_num_seqs": 4}),
        ("gemma2", "rtn", {}, {}),
        ("gemma3", "gptq", {}, {}),
        ("gemma3", "apex4-shared", {}, {}),
        ("phi3", "apex4-fast", {}, {}),  # q, k and v in one linear
        ("mixtral", "apex4-fast", {}, {}),
        ("qwen3moe", "rtn", {}, {}),
        ("qwen2moe", "apex4-fast", {}, {}),  # with an expert that every token goes to
        ("granite", "gptq", {}, {}),
        ("deepseek2", "rtn", {"ignore": ("*.kv_b_proj",)}, ROTATED_BY_TORCH),
        ("ragged", "apex4-fast", {"layout": "sm90"}, {}),
        ("ragged", "rtn", {"layout": "sm80", "group_size": 256}, {}),
        ("ragged", "rtn", {"group_size": "channel"}, {}),
        ("llama", "rtn", {"ignore": ("*.mlp.*", "*.1.self_attn.*")}, {}),
        ("demo", "apex4-fast", {"activation_bits": 8}, {"enforce_eager": False}),
        ("ragged", "rtn", {"activation_bits": 8, "layout": "sm80", "group_size": 256}, {}),
        ("mixtral", "rtn", {"activation_bits": 8}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "usual",
)
def test_the_same_tokens_as_transformers(
    name: str, recipe: str, settings: dict[str, Any], options: dict[str, Any],
    quantized: Callable[..., Path], serve_here: Callable[..., Any], require_equal: Callable[..., None],
) -> None:  # fmt: skip
    folder = quantized(name, recipe, **settings)
    require_equal(serve_here(folder, **options), folder)


@pytest.mark.parametrize(
    ("name", "recipe", "layout", "options"),
    [
        ("llama", "apex4-fast", "sm90", {"tensor_parallel_size": 2}),
        ("mixtral", "rtn", "rowmajor", {"tensor_parallel_size": 2}),
        ("mixtral", "rtn", "sm80", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    ],
    ids=["tensor", "tensor-experts-cut", "experts"],
)
def test_two_ranks(
    name: str, recipe: str, layout: str, options: dict[str, Any], quantized: Callable[..., Path],
    serve_here: Callable[..., Any], require_equal: Callable[..., None],
) -> None:  # fmt: skip
    folder = quantized(name, recipe, layout=layout)
    require_equal(serve_here(folder, **options), folder)


def test_weights_that_have_no_room_as_floats_are_unpacked_at_every_call(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], require_equal: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from apex4_quant.integrations.vllm.backend import FloatBudget

    monkeypatch.setattr(FloatBudget, "take", lambda self, size: False)
    for name, bits in (("ragged", 4), ("mixtral", 4), ("ragged", 8)):
        folder = quantized(name, "rtn", layout="sm80", activation_bits=bits)
        require_equal(serve_here(folder), folder)


def test_linears_of_four_bits_compute_with_eight_where_that_is_asked_for(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], require_equal: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = quantized("llama", "rtn")
    with_four = [one.tokens for one in serve_here(folder)]
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    with_eight = serve_here(folder)
    require_equal(with_eight, folder)
    assert [one.tokens for one in with_eight] != with_four


def test_a_prefix_that_vllm_kept_changes_nothing(
    quantized: Callable[..., Path], serve_here: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    answers = []

    def ask_twice(llm: Any) -> None:
        text = {"prompt_token_ids": [token for prompt in prompts() for token in prompt][:80]}
        for _ in range(2):
            answers.extend(llm.generate([text], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))

    serve_here(quantized("demo", "gptq"), watch=ask_twice, enable_prefix_caching=True, block_size=32)
    first, second = answers
    assert not first.num_cached_tokens and second.num_cached_tokens == 64
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_dummy_weights_run(quantized: Callable[..., Path], serve_here: Callable[..., Any]) -> None:
    generated = serve_here(quantized("mixtral", "apex4-fast"), load_format="dummy")
    assert all(len(one.tokens) == 16 for one in generated)


# ---- what must not load ----------------------------------------------------------------------------------------------

NAME = "model.layers.0.mlp.up_proj"


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(folder, out)
    shard = next(path for path in out.glob("*.safetensors") if f"{NAME}.weight_packed" in load_file(path))
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return out


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing codes": (lambda t: t.pop(f"{NAME}.weight_packed"), f"no tensor {NAME}.weight_packed"),
    "missing transform": (
        lambda t: t.pop("model.layers.0.mlp.gate_proj.input_transform"),
        "no tensor model.layers.0.mlp.gate_proj.input_transform",
    ),
    "forbidden code": (
        lambda t: t[f"{NAME}.weight_packed"].view(-1)[5:6].fill_(0x18),
        f"{NAME}.weight_packed holds the",
    ),
    "zero scale": (lambda t: t[f"{NAME}.weight_scale"].view(-1)[7:8].fill_(0), f"{NAME}.weight_scale holds a zero"),
    "wrong shape": (
        lambda t: t.update({f"{NAME}.weight_scale": torch.ones(4, 2, 1).half()}),
        rf"{NAME}.weight_scale is float16 \[4, 2, 1\] in the checkpoint",
    ),
    "NaN in a transform": (
        lambda t: t["model.layers.0.mlp.gate_proj.input_transform"].view(-1)[3:4].fill_(torch.nan),
        "gate_proj.input_transform holds NaN",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_never_loads(
    damage: str, quantized: Callable[..., Path], serve_here: Callable[..., Any], tmp_path: Path
) -> None:
    change, message = DAMAGES[damage]
    folder = changed(quantized("llama", "apex4-fast"), tmp_path / "changed", change)
    with pytest.raises(Apex4Error, match=message):
        serve_here(folder)


def test_a_shard_that_ends_early(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(quantized("llama"), tmp_path / "changed")
    shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="incomplete metadata, file not fully covered"):
        serve_here(folder)


def rewritten(folder: Path, out: Path, **fields: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= fields
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 7}, "format version 7"),
        (
            {"modules": {"model.layers.0.self_attn.k_proj": {"activation_clip": 0.5}}},
            "q_proj and model.layers.0.self_attn.k_proj read one input.* activation_clip 1.0 and 0.5",
        ),
        ({"modules_to_not_convert": ["lm_head", NAME]}, f"{NAME}, which is not quantized, and .*gate_proj, which is"),
    ],
    ids=["foreign version", "different clips", "one of two kept"],
)
def test_what_config_json_says_and_vllm_cannot_run(
    fields: dict[str, Any], message: str, quantized: Callable[..., Path], serve_here: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(Apex4Error, match=message):
        serve_here(rewritten(quantized("llama"), tmp_path / "changed", **fields))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek2", r"self_attn.kv_b_proj within latent attention.* --ignore '\*.kv_b_proj'"),
        ("gptoss", "experts join gate and up by swigluoai, .* load the checkpoint with transformers"),
    ],
)
def test_what_the_plugin_does_not_compute(
    name: str, message: str, quantized: Callable[..., Path], serve_here: Callable[..., Any]
) -> None:
    with pytest.raises(Apex4Error, match=message):
        serve_here(quantized(name))


def test_another_method_asked_for(quantized: Callable[..., Path], serve_here: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"\(apex4\) does not match .*\(gptq\)"):
        serve_here(quantized("llama"), quantization="gptq")


def test_an_unknown_kernel_asked_for(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APEX4_KERNEL", "fast")
    with pytest.raises(Apex4Error, match="APEX4_KERNEL=fast is not known"):
        serve_here(quantized("llama"))


@torch.no_grad()
def test_lora_on_quantized_linears(
    quantized: Callable[..., Path], serve_here: Callable[..., Any], require_equal: Callable[..., None], tmp_path: Path
) -> None:
    """vLLM adds an adapter to the output of our layers: as a hook does in transformers."""
    from vllm.lora.request import LoRARequest

    folder, rank = quantized("llama", "apex4-fast"), 8
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        linear = model.get_submodule(name)
        a = torch.randn(rank, linear.in_features, generator=generator) * 0.05
        b = torch.randn(linear.out_features, rank, generator=generator) * 0.05
        adapter |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        linear.register_forward_hook(lambda _, args, y, a=a, b=b: y + args[0] @ a.t() @ b.t())
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    generated = serve_here(folder, LoRARequest("ours", 1, str(tmp_path)), enable_lora=True, max_lora_rank=rank)
    require_equal(generated, model)
