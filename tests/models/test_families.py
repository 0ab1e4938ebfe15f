"""Every supported architecture, as a small random model of the real class: quantize, load, compare with float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.calib.text import load_text
from apex4_quant.checkpoint.check import check
from apex4_quant.checkpoint.inspect import inspect
from apex4_quant.errors import UsageError
from apex4_quant.format.number_format import padded_in_features
from apex4_quant.kernels import reference
from apex4_quant.models.experts import UnfusedExperts
from apex4_quant.models.families import FAMILIES, auto_class_of, family_of
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.source import ModelSource
from apex4_quant.nn.deferring import Deferring
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.nn.prepare import prepare_model
from apex4_quant.recipes import named_recipes
from apex4_quant.transforms.function_preserving import merged_by_norm

SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
# Ranks that are no multiples of 128, as published ones are; heads of values narrower than those of keys.
LATENT = {"kv_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 48}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1}
RAGGED = {"hidden_size": 192, "intermediate_size": 328, "head_dim": 48}

# Beside a language model: no width of it is a multiple of 128.
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 56, "patch_size": 14}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama ragged": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | RAGGED)),
    "llama biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2 window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "qwen3 ragged": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | RAGGED)),
    "phi3 partial rotary": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, partial_rotary_factor=0.5, sliding_window=16, pad_token_id=0)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=32, sliding_window=16, attn_logit_softcapping=5.0, final_logit_softcapping=10.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "mixtral tied ragged": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES | RAGGED, num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=True)
    ),
    "qwen3moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, head_dim=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=128, mlp_only_layers=[0]
        )
    ),
    "qwen2moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES | EXPERTS, num_experts=4, shared_expert_intermediate_size=192, mlp_only_layers=[0])
    ),
    "qwen3next": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES | EXPERTS,
            head_dim=32,
            num_experts=4,
            shared_expert_intermediate_size=192,
            full_attention_interval=2,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=32,
            linear_value_head_dim=32,
        )
    ),
    "deepseek2 lite": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES | EXPERTS | LATENT, q_lora_rank=None)),
    "deepseek3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZES | EXPERTS | LATENT, q_lora_rank=160, n_group=2, topk_group=1)
    ),
    "gptoss ragged": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES | RAGGED, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, clip_qkv=1.0)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)),
    "mistral3": lambda: Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", "head_dim": 64, **SIZES},
            vision_config={"model_type": "pixtral", "head_dim": 32, **VISION},
        )
    ),
    "gemma3 vision": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(text_config={**SIZES, "head_dim": 64}, vision_config=VISION, mm_tokens_per_image=4)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(
            **SIZES,
            embedding_multiplier=6.0,
            logits_scaling=4.0,
            residual_multiplier=0.4,
            attention_multiplier=0.1,
        )
    ),
}
# Linears of both layers, where it is not seven a layer.
COUNTS = {
    "phi3 partial rotary": 2 * 4,
    "mixtral": 2 * (4 + 3 * 4),
    "mixtral tied ragged": 2 * (4 + 3 * 3),
    "qwen3moe": 2 * 4 + 3 + 3 * 6,
    "qwen2moe": 2 * 4 + 3 + 3 * 5,
    "qwen3next": 2 + 4 + 2 * 3 * 5,  # a gated delta net and an attention
    "deepseek2 lite": 2 * 4 + 3 + 3 * 5,
    "deepseek3": 2 * 5 + 3 + 3 * 5,
    "gptoss ragged": 2 * (4 + 3 * 4),
    "olmoe": 2 * (4 + 3 * 4),
}
# Norms and activation functions of both layers that quantizers compute. What a router or gate reads is a tensor; experts
# have one activation function in common.
DEFERRED = {
    "phi3 partial rotary": (4, 0),
    "gemma2": (4, 0),
    "gemma3": (4, 0),
    "gemma3 vision": (4, 0),
    "mixtral": (2, 2),
    "mixtral tied ragged": (2, 2),
    "qwen3moe": (3, 2),
    "qwen2moe": (3, 3),
    "qwen3next": (1, 4),
    "deepseek2 lite": (3, 3),
    "deepseek3": (3, 3),
    "gptoss ragged": (0, 0),
    "olmoe": (2, 2),
    "olmo2": (0, 2),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The beginning of the bundled calibration text: all of it takes long to tokenize."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(load_text("bundled")[:8000])
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def hardly_learned(quickly_learned: None) -> Iterator[None]:
    """That transforms are good is tested elsewhere."""
    recipes = named_recipes()
    full = dict(recipes)
    recipes.update({name: replace(each, transform_steps=min(each.transform_steps, 10)) for name, each in full.items()})
    yield
    recipes.update(full)


def write_model(folder: Path, name: str, **save: Any) -> nn.Module:
    """A seeded random model of `MODELS` with the demo's tokenizer, in bfloat16, biases and norms not trivial."""
    torch.manual_seed(len(name))
    model = MODELS[name]()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in key:
            offset = FAMILIES[type(model).__name__].norm_offset
            nn.init.uniform_(parameter, 0.5 - offset, 1.5 - offset)
    for key, buffer in model.named_buffers():
        if key.endswith("bias"):  # a router's correction, which stays in float32
            nn.init.normal_(buffer, std=0.1)
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder, **save)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, folder)
    return model


def loaded(folder: Path, **options: Any) -> Any:
    """By the class of transformers that the family is loaded by."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, auto_class_of(config)).from_pretrained(folder, **options)


class ReferenceLinear(nn.Module):
    """The format in float64, from the packed tensors of a loaded layer: the fake-quantized oracle."""

    def __init__(self, packed: Apex4Linear) -> None:
        super().__init__()
        self.format, self.bias = packed.format, packed.bias
        self.codes, self.scales = packed.codes(), packed.scales()
        self.matrix = packed.transform_matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rows = nn.functional.pad(rows, (0, self.format.padded_k - rows.shape[1]))
        hadamard = self.format.transform == "hadamard128"
        codes, scale = reference.quantize_activation(
            rows, self.format.group_length, self.format.activation_clip, hadamard, self.matrix
        )
        y = reference.linear(codes, scale, self.codes, self.scales, self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], -1).contiguous()


# Every model once, every recipe at least once, both layouts.
PAIRS = [
    ("llama", "rowmajor", "apex4"),
    ("llama tied", "rowmajor", "quarot-128g"),
    ("llama ragged", "sm80", "apex4"),
    ("llama biased", "rowmajor", "gptq"),
    ("mistral window", "rowmajor", "apex4-fast"),
    ("qwen2", "sm80", "apex4-hadamard"),
    ("qwen2 window", "rowmajor", "gptq"),
    ("qwen3", "rowmajor", "rtn"),
    ("qwen3 ragged", "rowmajor", "apex4-fast"),
    ("phi3 partial rotary", "rowmajor", "apex4-gptaq"),
    ("gemma2", "rowmajor", "apex4-shared"),
    ("gemma3", "rowmajor", "apex4-hadamard"),
    ("mixtral", "rowmajor", "rtn"),
    ("mixtral tied ragged", "rowmajor", "apex4-gptaq"),
    ("qwen3moe", "rowmajor", "apex4"),
    ("qwen2moe", "rowmajor", "apex4-hadamard"),
    ("qwen3next", "rowmajor", "apex4"),
    ("deepseek2 lite", "rowmajor", "quarot-128g"),
    ("deepseek3", "rowmajor", "apex4"),
    ("gptoss ragged", "sm80", "apex4-fast"),
    ("olmoe", "rowmajor", "gptq"),
    ("olmo2", "rowmajor", "apex4-hadamard"),
    ("mistral3", "rowmajor", "apex4"),
    ("gemma3 vision", "rowmajor", "apex4-fast"),
    ("granite", "rowmajor", "apex4-fast"),
]
MORE_PAIRS = [
    *((name, "rowmajor", recipe) for name in MODELS for recipe in ("rtn", "apex4")),
    *((name, "sm80", recipe) for name in ("llama ragged", "qwen2") for recipe in ("rtn", "apex4")),
    *(
        (name, "rowmajor", recipe)
        for name in ("phi3 partial rotary", "gemma2", "mixtral tied ragged")
        for recipe in ("apex4-gptaq", "apex4-shared")
    ),
]
more_pairs = pytest.mark.slow("a recipe and a model that other quick tests combine with others")


def test_pairs_have_every_model_and_every_recipe() -> None:
    assert [name for name, _, _ in PAIRS] == list(MODELS)
    # Those that distil have tests of their own, in tests/distillation.
    assert {recipe for _, _, recipe in PAIRS} == {
        name for name, each in named_recipes().items() if not each.distill_steps
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layout", "recipe"),
    [*PAIRS, *(pytest.param(*pair, marks=more_pairs) for pair in MORE_PAIRS if pair not in PAIRS)],
)
def test_quantize_and_load(name: str, layout: str, recipe: str, text: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", name)
    settings = QuantizeSettings(
        str(tmp_path / "model"), recipe=recipe, target="none", layout=layout, samples=2, seq_len=64, calib=text
    )
    result = quantize(settings, tmp_path / "out")
    assert len(result.records) == COUNTS.get(name, 14)
    assert max(record["error"] for record in result.records) < 0.25

    model = loaded(tmp_path / "out", dtype=torch.float32)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Apex4Linear)}
    assert sorted(packed) == sorted(record["name"] for record in result.records)

    ids = torch.randint(0, 4096, (8, 12), generator=torch.Generator().manual_seed(1))
    ours = model(ids, use_cache=False).logits
    for module_name, module in packed.items():
        model.set_submodule(module_name, ReferenceLinear(module))
    expected = model(ids, use_cache=False).logits
    # Only float32 rounding differs. A code at a tie may fall the other way, which moves its token and those behind it.
    off = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.median() < 1e-5
    assert (off > 1e-3).any(1).sum() <= 0.25 * len(off)  # sequences
    plain = original.float()(ids, use_cache=False).logits
    quantization = (expected - plain).norm() / plain.norm()
    assert 0.05 < quantization < 0.9  # random weights forgive nothing; no change at all would mean no quantization


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_operators_give_the_same_model(name: str, text: str, tmp_path: Path) -> None:
    """With shared inputs, norms and gates in the quantizers, on the operators' CPU implementations: the same bits."""
    write_model(tmp_path / "model", name)
    settings = QuantizeSettings(str(tmp_path / "model"), recipe="rtn", target="none", samples=2, seq_len=64, calib=text)
    quantize(settings, tmp_path / "out")
    model = loaded(tmp_path / "out")
    ids = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(ids, use_cache=False).logits
    for kernel in ("sm80", "sm90"):
        prepare_model(model, FAMILIES[type(model).__name__], kernel)
        for module in model.modules():
            # Together, experts are summed in float32: other bits (tests/nn/test_experts.py has them).
            if isinstance(module, UnfusedExperts) and module.together is not None:
                module.together.detach()
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    deferring = [
        module for module in model.modules() if isinstance(getattr(module, "apex4_deferring", None), Deferring)
    ]
    norms = [module for module in deferring if hasattr(module, "weight")]
    assert (len(norms), len(deferring) - len(norms)) == DEFERRED.get(name, (4, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_layers_run_one_at_a_time_are_the_model(name: str, tmp_path: Path) -> None:
    """Embedding scale, masks, windows and rotary embeddings of every layer: what calibration sees is what there is."""
    write_model(tmp_path, name)
    model = loaded(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(1))
    entering: list[torch.Tensor] = []
    language_model = getattr(model.model, "language_model", model.model)
    for layer in (*language_model.layers, language_model.norm):
        layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(ids, use_cache=False)

    source = ModelSource(str(tmp_path))
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(48)
    embedding = f"{source.family.embedding}.weight"
    hidden = runner.embed(ids, source.read([embedding])[embedding])
    for index, expected in enumerate(entering):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        if index < source.num_layers:
            runner.load_layer(index, source.read(source.layer_tensors(index)))
            hidden = runner.run_layer(index, hidden)
            runner.drop_layer(index)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_entries_say_where_inputs_come_from_and_who_writes_the_stream(name: str, tmp_path: Path) -> None:
    """Scaling the channels of an input where it is made, and back where it is read, must change nothing."""
    write_model(tmp_path, name)
    source = ModelSource(str(tmp_path))
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(32)
    hidden = torch.randn(1, 32, source.config["hidden_size"], generator=torch.Generator().manual_seed(0))
    for index in range(source.num_layers):
        tensors = {n: t.float() for n, t in source.read(source.layer_tensors(index)).items()}
        layer = runner.load_layer(index, tensors)
        expected = runner.run_layer(index, hidden)
        for group in merged_by_norm(source.family.groups(source.config, index)):
            if group.norm is None and group.producer is None:
                continue  # nothing is claimed
            scale = torch.rand(layer.get_submodule(group.linears[0]).in_features) + 0.5
            if group.norm is not None:
                gain, offset = layer.get_submodule(group.norm).weight, source.family.norm_offset
                gain.copy_((gain + offset) * scale - offset)
            else:
                assert group.producer is not None
                made = layer.get_submodule(group.producer.linear)
                if group.producer.per_head:
                    heads = (runner.config.num_key_value_heads, -1, layer.self_attn.head_dim)
                    scale = scale.view(heads)[:, :1].expand_as(scale.view(heads))
                    rows, scale = scale[:, 0].flatten(), scale.flatten()
                else:
                    rows = scale
                first = 0 if group.producer.rows == "all" else made.out_features - len(rows)
                for parameter in made.parameters():
                    parameter[first:] *= rows.view(-1, *[1] * (parameter.dim() - 1))
            for reader in (*group.linears, *group.also_read_by):
                layer.get_submodule(reader).weight /= scale
            torch.testing.assert_close(runner.run_layer(index, hidden), expected, rtol=1e-3, atol=1e-3)
        for writer in source.family.residual_writers(source.config, index):
            for parameter in layer.get_submodule(writer).parameters():
                parameter.zero_()
        assert torch.equal(runner.run_layer(index, hidden), hidden)


def test_dequantized_weights_are_close_and_everything_else_is_untouched(text: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", "qwen2")
    quantize(
        QuantizeSettings(
            str(tmp_path / "model"), recipe="rtn", target="none", transform="none", samples=1, seq_len=32, calib=text
        ),
        tmp_path / "out",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    before = original.state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith(("weight_packed", "weight_scale")):
            continue
        assert torch.equal(tensor, before[name]), name
    for name, module in model.named_modules():
        if isinstance(module, Apex4Linear):
            weight = before[f"{name}.weight"].float()
            scales = module.scales().float().repeat_interleave(module.format.group_length, dim=1)
            dequantized = (module.codes() * scales)[:, : weight.shape[1]]
            assert (dequantized - weight).norm() / weight.norm() < 0.15


def test_ignored_linears_stay_as_they_were(text: str, tmp_path: Path) -> None:
    original = write_model(tmp_path / "model", "llama")
    settings = QuantizeSettings(
        str(tmp_path / "model"),
        target="none",
        samples=1,
        seq_len=32,
        calib=text,
        ignore=("*.down_proj", "self_attn.k_proj"),
    )
    result = quantize(settings, tmp_path / "out")
    assert len(result.records) == 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for layer, before in zip(model.model.layers, original.model.layers, strict=True):
        assert type(layer.mlp.down_proj) is nn.Linear
        assert torch.equal(layer.mlp.down_proj.weight, before.mlp.down_proj.weight)
        assert torch.equal(layer.self_attn.k_proj.weight, before.self_attn.k_proj.weight)
        assert isinstance(layer.self_attn.q_proj, Apex4Linear)


def test_sharded_and_single_file_sources_give_the_same_bytes(text: str, tmp_path: Path) -> None:
    write_model(tmp_path / "single", "llama")
    write_model(tmp_path / "sharded", "llama", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for kind in ("single", "sharded"):
        quantize(
            QuantizeSettings(str(tmp_path / kind), target="none", samples=1, seq_len=32, calib=text),
            tmp_path / f"out-{kind}",
        )
    shards = sorted((tmp_path / "out-single").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "out-sharded" / shard.name).read_bytes()


def test_group_sizes_other_than_128(text: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    for group_size in (256, "channel"):
        out = tmp_path / f"out-{group_size}"
        quantize(
            QuantizeSettings(
                str(tmp_path / "model"), group_size=group_size, target="none", samples=1, seq_len=32, calib=text
            ),
            out,
        )
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        down = model.model.layers[0].mlp.down_proj  # K = 384: padded to 512 for groups of 256
        assert down.format.padded_k == padded_in_features(384, group_size) == (512 if group_size == 256 else 384)
        assert down.format.groups == (2 if group_size == 256 else 1)
        assert torch.isfinite(model(torch.arange(32)[None]).logits).all()


def test_old_llama_checkpoints_with_stored_rotary_buffers(text: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "model", "llama")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)}
    save_file(tensors, file, metadata={"format": "pt"})
    quantize(
        QuantizeSettings(str(tmp_path / "model"), target="none", samples=1, seq_len=32, calib=text), tmp_path / "out"
    )
    assert "rotary" not in (tmp_path / "out" / "model.safetensors.index.json").read_text()


@torch.no_grad()
def test_what_stands_beside_the_language_model_goes_with_it(text: str, tmp_path: Path) -> None:
    """The tensors, byte for byte, under the names that the original has; a picture is seen as the original sees it."""
    original = write_model(tmp_path / "model", "mistral3")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    settings = QuantizeSettings(str(tmp_path / "model"), target="none", samples=2, seq_len=64, calib=text)
    quantize(settings, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (tmp_path / "model", tmp_path / "out")
    )
    beside = [name for name in before if name.startswith(("vision_tower.", "multi_modal_projector."))]
    assert len(beside) == 15 and all(torch.equal(before[name], after[name]) for name in beside)
    model = loaded(tmp_path / "out", dtype=torch.bfloat16)
    picture = {"pixel_values": torch.randn(1, 3, 56, 28).bfloat16(), "image_sizes": torch.tensor([[56, 28]])}
    features = [each.get_image_features(**picture).pooler_output[0] for each in (original, model)]
    # The same numbers at other addresses: a CPU's products in bfloat16 may round elsewhere.
    torch.testing.assert_close(*features, rtol=0.03, atol=0.03)
    ids = torch.tensor([[5, *[original.config.image_token_id] * len(features[0]), 7, 8]])
    ours, exact = (each(ids, **picture, use_cache=False).logits.float() for each in (model, original))
    assert 0.01 < (ours - exact).norm() / exact.norm() < 0.9
    assert [each["name"] for each in inspect(str(tmp_path / "out"))["linears"]] == [
        name for name, module in model.named_modules() if isinstance(module, Apex4Linear)
    ]
    check(str(tmp_path / "out"), lambda line: None)
    with pytest.raises(UsageError, match="rotates the residual stream"):
        replace(settings, recipe="quarot-128g").resolve(ModelSource(str(tmp_path / "model")))
    with pytest.raises(UsageError, match="distills, which a language model inside Mistral3"):
        quantize(replace(settings, recipe="apex4-distill"), tmp_path / "distilled")


def test_families_are_real_classes_and_unknown_ones_are_refused() -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    with torch.device("meta"):
        tested = {type(make()).__name__ for make in MODELS.values()}
    for name, family in FAMILIES.items():
        assert hasattr(transformers, name)
        mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if family.beside else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        assert mapping[family.model_type] == name
        assert name in tested, f"no model of {name} is tested"
    with pytest.raises(UsageError, match=r"Llama4ForConditionalGeneration, whose experts read .* give another model"):
        family_of({"architectures": ["Llama4ForConditionalGeneration"], "text_config": {}}, "some model")
    inside = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}}
    with pytest.raises(UsageError, match="language model of type 'mistral4', which is not supported there"):
        family_of(inside, "some model")
    with pytest.raises(Exception, match=r"GPT2LMHeadModel.*not supported.*LlamaForCausalLM"):
        family_of({"architectures": ["GPT2LMHeadModel"]}, "some model")


def test_a_config_without_architectures(tmp_path: Path, text: str) -> None:
    """transformers finds the class by model_type. What is written names it: vLLM asks for it, and so do fused norms."""
    folder, out = tmp_path / "model", tmp_path / "out"
    write_model(folder, "qwen2")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    quantize(QuantizeSettings(str(folder), recipe="rtn", target="none", samples=1, seq_len=32, calib=text), out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Qwen2ForCausalLM"
