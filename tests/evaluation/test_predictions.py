"""Perplexity and divergence against a direct computation, and recorded predictions against the model's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MixtralConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from apex4_quant.checkpoint.load import load_model
from apex4_quant.evaluation import predictions
from apex4_quant.evaluation.predictions import RecordedPredictions, compare, logits_of, measure_perplexity
from apex4_quant.models.place import DEMO_PATH

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SIZES, final_logit_softcapping=0.5),  # small: it changes every logit
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=False),
}


def made(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = CONFIGS[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        for parameter in model.parameters():  # far from uniform predictions
            parameter.data.mul_(4)
    return model.to(dtype).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(300, (3, 33), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_recorded_predictions_are_the_models_own(family: str, dtype: torch.dtype, ids: torch.Tensor) -> None:
    model = made(family, dtype=dtype)
    expected = [logits_of(model, window) for window in ids]
    perplexity = measure_perplexity(model, ids)
    recorded = RecordedPredictions(model, ids)
    assert recorded.perplexity == perplexity
    for index in (2, 0, 1, 1):
        assert torch.equal(recorded.logits(index), expected[index])
    # The layers are gone: what is left is the head.
    assert sum(p.numel() for p in model.parameters()) <= 300 * 64


@pytest.mark.parametrize("rows", [predictions._ROWS, 7])
def test_divergence_and_agreement_are_those_of_float64(
    rows: int, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_ROWS", rows)
    first, second = made("llama"), made("llama", seed=1)
    with torch.no_grad():
        log_p, log_q = (torch.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in (first, second))
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    agreement = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    perplexity = math.exp(-log_q.gather(-1, ids[:, 1:, None]).mean())
    found = compare(second, RecordedPredictions(first, ids))
    assert found.divergence == pytest.approx(divergence, rel=1e-5) and divergence > 0.1
    assert found.top1_agreement == pytest.approx(agreement)
    assert found.perplexity == pytest.approx(perplexity, rel=1e-6)
    assert found.perplexity == measure_perplexity(second, ids)  # to the last bit: with and without a baseline


def test_the_divergence_is_not_symmetric_and_that_of_a_model_from_itself_is_zero(ids: torch.Tensor) -> None:
    def of(first: int, second: int) -> predictions.Comparison:
        return compare(made("llama", second), RecordedPredictions(made("llama", first), ids))

    same = of(0, 0)
    assert (same.divergence, same.top1_agreement) == (0.0, 1.0)
    assert of(0, 1).divergence != pytest.approx(of(1, 0).divergence, rel=1e-3)


def test_a_quantized_model_can_be_the_original(demo_checkpoint: Path) -> None:
    ids = torch.arange(2 * 40).reshape(2, 40) * 37 % 4096
    model = load_model(demo_checkpoint, "cpu", torch.float32)
    expected = [logits_of(model, window) for window in ids]
    recorded = RecordedPredictions(model, ids)
    assert all(torch.equal(recorded.logits(index), logits) for index, logits in enumerate(expected))
    found = compare(load_model(DEMO_PATH, "cpu", torch.float32), recorded)
    assert 0 < found.divergence < 1 and 0.5 < found.top1_agreement < 1
