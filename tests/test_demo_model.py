"""The bundled model and texts: that they are what the README says, and that quantization leaves a good model."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from apex4_quant.calib.samples import windows
from apex4_quant.calib.text import BUNDLED, load_text
from apex4_quant.checkpoint.load import load_model
from apex4_quant.evaluation.lm_eval_tasks import TASKS_FOLDER
from apex4_quant.evaluation.predictions import measure_perplexity
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.source import ModelSource
from apex4_quant.models.tokenizers import load_tokenizer


def test_it_is_what_the_issue_of_a_demo_model_needs() -> None:
    source = ModelSource("demo")
    parameters = sum(math.prod(info.shape) for info in source.infos.values())
    assert 4e6 <= parameters <= 8e6
    config = source.config
    assert config["hidden_size"] % 128 == 0 and config["intermediate_size"] % 128 == 0
    assert config["num_hidden_layers"] >= 4
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert all(info.dtype == "BF16" for info in source.infos.values())
    assert sum(path.stat().st_size for path in DEMO_PATH.iterdir()) <= 16e6
    training = json.loads((DEMO_PATH / "training.json").read_text())
    assert training["parameters"] == parameters


def test_no_paragraph_of_the_heldout_text_is_calibrated_on() -> None:
    def paragraphs(name: str) -> set[str]:
        return {" ".join(p.split()) for p in load_text(name).split("\n\n")}

    heldout, calibration = paragraphs("heldout"), paragraphs("bundled")
    assert len(heldout) > 500 and len(calibration) > 1500
    assert not heldout & calibration
    # Not merely other paragraphs: other sentences too, but for a few formulas everybody writes.
    long_lines = [line for line in (BUNDLED / "heldout.txt").read_text("utf-8").splitlines() if len(line) > 60]
    in_calibration = set((BUNDLED / "calibration.txt").read_text("utf-8").splitlines())
    assert sum(line in in_calibration for line in long_lines) < 0.01 * len(long_lines)


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizer = load_tokenizer(DEMO_PATH)
    text = "def f(x):\n\treturn 'naïve ☃ 漢字'  # ±7\r\n\x07"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(load_text("heldout")[:20000])) < 20000 / 2.5


def heldout_windows(limit: int) -> torch.Tensor:
    return windows(load_tokenizer(DEMO_PATH).encode(load_text("heldout")), 512, "heldout")[:limit]


def bigram_perplexity(test: torch.Tensor) -> float:
    """An interpolated bigram model counted on the calibration text: what "models English" has to beat by far."""
    tokens = load_tokenizer(DEMO_PATH).encode(load_text("bundled"))
    single, pair, total = Counter(tokens), Counter(pairwise(tokens)), len(tokens)
    loss = count = 0.0
    for row in test.tolist():
        for previous, token in pairwise(row):
            unigram = (single[token] + 1) / (total + 4096)
            bigram = pair[previous, token] / single[previous] if single[previous] else unigram
            loss -= math.log(0.6 * bigram + 0.4 * unigram)
            count += 1
    return math.exp(loss / count)


def test_quantized_demo_stays_close_to_the_original(demo_checkpoint: Path) -> None:
    ids = heldout_windows(24)
    original = measure_perplexity(load_model(DEMO_PATH, "cpu", torch.bfloat16), ids)
    quantized = measure_perplexity(load_model(demo_checkpoint, "cpu", torch.bfloat16), ids)
    assert original < 0.25 * bigram_perplexity(ids)
    # Measured on all 120 windows: +3.0 % with the transform, +7.5 % without (README).
    assert 1.005 < quantized / original < 1.04


def test_perplexity_is_that_of_the_papers() -> None:
    """Against a direct float64 computation on windows, one window at a time."""
    ids = heldout_windows(2)
    model = load_model(DEMO_PATH, "cpu", torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    losses = -torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])
    assert measure_perplexity(model, ids) == pytest.approx(math.exp(losses.mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["apex4_choice", "apex4_lastword"])
def test_bundled_tasks_come_from_the_heldout_text(name: str) -> None:
    rows = [json.loads(line) for line in (TASKS_FOLDER / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == 160
    text = " ".join(load_text("heldout").split())
    for row in rows:
        continuation = row["choices"][row["answer"]] if "choices" in row else row["word"]
        assert f"{row['context']} {continuation}" in text
