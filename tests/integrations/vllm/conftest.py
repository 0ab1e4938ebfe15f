"""Small quantized models, and vLLM run in this process. Everything here needs vLLM: scripts/test-vllm."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ...conftest import locked
from .generating import ENVIRONMENT, Generated, generate

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.08,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
# Neither K nor N is a multiple of a group or a tile.
RAGGED = {"hidden_size": 192, "intermediate_size": 328, "head_dim": 32}
ENOUGH = 5  # of the prompts: see require_equal
WITHIN = {4: 1e-3, 8: 0.1}  # logprobs, by activation bits


def _models() -> dict[str, Callable[[], Any]]:
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GptOssConfig,
        GptOssForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    plain = {key: value for key, value in SIZES.items() if key != "head_dim"}
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    multipliers = {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.4}
    # Heads as published: vLLM's kernels for latent attention have no others.
    latent = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "q_lora_rank": None,
        "num_key_value_heads": 4,
    }
    routed = {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    }
    sparse = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "mlp_only_layers": [0]}
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "ragged": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | RAGGED, attention_bias=True, mlp_bias=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **window)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **window)),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**plain, **multipliers, attention_multiplier=0.1)),
        "qwen2moe": lambda: Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**plain, **few, shared_expert_intermediate_size=256, mlp_only_layers=[0])
        ),
        "deepseek2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**plain | latent | routed)),
        "gptoss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        "qwen3moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sparse)),
    }


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models are made. APEX4_TEST_MODELS names a folder that keeps them: a GPU then need not wait for a slow CPU."""
    kept = os.environ.get("APEX4_TEST_MODELS")
    return Path(kept) if kept else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def original(models_folder: Path) -> Callable[[str], Path]:
    """original(name) -> a seeded random model that is not quantized, or "demo". Made once; read only."""
    return lambda name: original_model(models_folder, name)


@pytest.fixture(scope="session")
def quantized(models_folder: Path) -> Callable[..., Path]:
    """quantized(name, recipe, **settings) -> the checkpoint of `original(name)`. Made once; read only."""
    return lambda name, recipe="rtn", **settings: quantized_model(models_folder, name, recipe, settings)


def original_model(folder: Path, name: str) -> Path:
    """The folder of the model, made in `folder` if it is not there."""
    from apex4_quant.models.place import DEMO_PATH

    if name == "demo":
        return DEMO_PATH
    return _made_once(folder / name, lambda out: _write(out, name))


def quantized_model(folder: Path, name: str, recipe: str, settings: dict[str, Any]) -> Path:
    """The folder of the checkpoint, made in `folder` if it is not there."""
    from apex4_quant import QuantizeSettings, quantize

    def make(out: Path) -> None:
        source = "demo" if name == "demo" else str(original_model(folder, name))
        small = {"target": "none", "samples": 2, "seq_len": 64, "device": "cpu"}
        quantize(QuantizeSettings(model=source, recipe=recipe, **small | settings), out)

    said = "-".join([name, recipe, *(f"{key}={value}" for key, value in settings.items())])
    return _made_once(folder / re.sub(r"[^\w.=-]+", "_", said), make)


def _made_once(path: Path, make: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            unfinished = path.with_name(f"{path.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(path)
    return path


def _write(folder: Path, name: str) -> None:
    from apex4_quant.models.families import FAMILIES
    from apex4_quant.models.place import DEMO_PATH

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = _models()[name]()
        offset = FAMILIES[type(model).__name__].norm_offset
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif "norm" in key:
                torch.nn.init.uniform_(parameter, 0.5 - offset, 1.5 - offset)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / file, folder)


@pytest.fixture
def serve_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Generated]]:
    """serve_here(folder, lora=None, watch=None, **options of vllm.LLM) -> what vLLM generates, greedily, for `prompts()`.

    `watch` is called with the LLM before it generates.
    """
    pytest.importorskip("vllm", reason="needs vLLM: scripts/test-vllm")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    if shutil.which("g++") is None:  # what Inductor compiles with; vLLM then runs the traced graph as it is
        monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")

    # vLLM looks at a model's class in a process that imports all of vLLM, so as not to touch CUDA. There is none here.
    monkeypatch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda look: look())
    return generate


@pytest.fixture
def require_equal() -> Callable[..., None]:
    """require_equal(generated, folder or model) asserts that vLLM generated what transformers does, for most prompts.

    vLLM and transformers round attention and norms differently, and an activation on a tie between two codes may get the
    other one, which moves its sequence from there on: not all are equal, though the arithmetic of the linears is
    (test_ties.py). A wrong transform, scale, order or slice leaves no sequence as it is. 8-bit codes have 18 times as many ties,
    each of which moves a sequence as much less: of the demo's sequences most moved, by 0.007 to 0.05.
    """

    @torch.no_grad()
    def check(generated: Sequence[Generated], model: Any) -> None:
        from transformers import AutoModelForCausalLM

        from apex4_quant.nn.arithmetic import arithmetic_of

        if isinstance(model, Path):
            # Not SDPA, which leaves Gemma-2's soft capping of attention out.
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        within = max(WITHIN[bits] for bits in arithmetic_of(model)["activation_bits"])
        equal, differences = 0, []
        for one in generated:
            ids = torch.tensor([one.prompt + one.tokens])
            logits = model(ids, use_cache=False).logits[0, len(one.prompt) - 1 : -1].float()
            own = logits.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
            differences.append(float((own - torch.tensor(one.logprobs)).abs().max()))
            equal += differences[-1] < within and logits.argmax(-1).tolist() == one.tokens
        assert equal >= ENOUGH, f"{equal} of {len(generated)} sequences are those of transformers: {differences}"

    return check
