"""`apex4 eval --baseline`: what it prints of two models, and which two it refuses to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.calib.text import load_text
from apex4_quant.checkpoint.load import load_model
from apex4_quant.evaluation.evaluate import AGREEMENT, DIVERGENCE
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.tokenizers import load_tokenizer

USAGE = 2
Call = Callable[..., Any]  # the fixtures of conftest.py
SHORT = ("--limit", 2, "--seq-len", 128, "--device", "cpu")


def divergence_of(model: Path, original: Path) -> tuple[float, float]:
    """Directly, all logits at once: KL in nats a token and the share of equal most probable tokens."""
    tokens = load_tokenizer(original).encode(load_text("heldout"))
    ids = torch.tensor(tokens[:256]).view(2, 128)
    with torch.no_grad():
        log_q, log_p = (
            torch.log_softmax(load_model(folder, "cpu", torch.bfloat16)(input_ids=ids).logits[:, :-1].double(), -1)
            for folder in (model, original)
        )
    agreeing = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), float(agreeing)


def test_divergence_and_agreement_as_json_and_for_people(demo_checkpoint: Path, invoke: Call) -> None:
    command = ("eval", demo_checkpoint, "--baseline", "demo", *SHORT)
    found = json.loads(invoke(*command, "--json").stdout)
    divergence, agreement = divergence_of(demo_checkpoint, DEMO_PATH)
    # bfloat16 logits of two windows at once and of one differ by roundings.
    assert found["divergence"] == pytest.approx(divergence, rel=0.05)
    assert found["top1_agreement"] == pytest.approx(agreement, abs=0.02)
    assert 0.001 < found["divergence"] < 0.1 and 0.8 < found["top1_agreement"] < 1
    lines = invoke(*command).stdout.splitlines()
    row = next(line for line in lines if DIVERGENCE in line).removeprefix(f"  {DIVERGENCE}").split()
    assert [float(row[0]), float(row[1])] == pytest.approx([found["divergence"], 1000 * found["divergence"]], rel=1e-3)
    row = next(line for line in lines if AGREEMENT in line).removeprefix(f"  {AGREEMENT}").split()
    assert float(row[0]) == pytest.approx(100 * found["top1_agreement"], abs=0.01)


def test_without_a_baseline_there_is_none(invoke: Call) -> None:
    found = json.loads(invoke("eval", "demo", *SHORT, "--json").stdout)
    assert found["divergence"] is None and found["top1_agreement"] is None and found["baseline_perplexity"] is None
    assert DIVERGENCE not in invoke("eval", "demo", *SHORT).stdout


def test_a_model_and_itself(invoke: Call) -> None:
    alone = json.loads(invoke("eval", "demo", *SHORT, "--json").stdout)
    both = json.loads(invoke("eval", "demo", "--baseline", "demo", *SHORT, "--json").stdout)
    assert (both["divergence"], both["top1_agreement"]) == (0.0, 1.0)
    assert alone["perplexity"] == both["perplexity"] == both["baseline_perplexity"]


def test_the_shorter_context_of_the_two_is_that_of_both(invoke: Call, tiny_model: Call) -> None:
    found = json.loads(invoke("eval", "demo", "--baseline", tiny_model(), "--limit", 1, "--json").stdout)
    assert (found["seq_len"], found["tokens"]) == (256, 256)
    assert found["divergence"] > 1 and math.isfinite(found["divergence"])  # the tiny model is random


def test_models_that_cannot_be_compared(
    invoke: Call, tiny_model: Call, one_sentence: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "apex4_quant.evaluation.transformers_engine.load_model", None
    )  # refused before anything is loaded
    larger = tiny_model("larger", vocab_size=4160)
    command = ("eval", "demo", *SHORT, "--json", "--baseline")
    one_sentence(invoke(*command, larger), USAGE, "demo", str(larger), "4096", "4160", "--baseline")
    other = tiny_model("other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    used = load_tokenizer(other).encode(load_text("heldout"))
    first, second = (name for name, number in vocabulary.items() if number in (used[0], used[1]))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    one_sentence(invoke(*command, other), USAGE, "tokenizers", "demo", str(other), "different tokens", "--baseline")


def test_evaluating_tasks_leaves_git_alone(invoke: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks git for the commit of the working directory, and git complains where there is none."""
    from lm_eval import evaluator

    asked: list[None] = []
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: asked.append(None))
    patched = evaluator.get_git_commit_hash
    result = invoke("eval", "demo", "--tasks", "apex4_choice", "--limit", 1, "--seq-len", 32, "--json")
    assert result.exit_code == 0 and not asked and evaluator.get_git_commit_hash is patched


def test_a_tokenizer_that_is_larger_than_the_embedding(
    invoke: Call, tiny_model: Call, one_sentence: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is loaded; tasks bring texts of their own, so that any token may come in them."""
    monkeypatch.setattr("apex4_quant.evaluation.transformers_engine.load_model", None)
    model = tiny_model()
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("words and words " * 300 + "<added>")
    said = ("token 4096", "knows 4096", "do not belong together")
    one_sentence(invoke("eval", model, "--text", text, "--seq-len", 64, "--json"), 1, str(model), *said)
    one_sentence(invoke("eval", "demo", "--baseline", model, "--text", text, "--json"), 1, str(model), *said)
    one_sentence(invoke("eval", model, "--tasks", "apex4_choice", "--seq-len", 64, "--json"), 1, *said)


def test_a_model_that_is_spread_predicts_the_same(
    demo_checkpoint: Path, invoke: Call, one_sentence: Call, tmp_path: Path
) -> None:
    """By accelerate, here over the CPU and the disk, the embedding that is the head too among what is on the disk."""
    places = {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)}
    path = tmp_path / "map.json"
    path.write_text(json.dumps(places))
    command = ("eval", demo_checkpoint, "--baseline", "demo", "--limit", 1, "--seq-len", 64, "--json")
    whole = json.loads(invoke(*command, "--device", "cpu").stdout)
    spread = json.loads(invoke(*command, "--device-map", path).stdout)
    assert (spread["device"], whole["device"]) == ("disk, cpu", "cpu")
    for name in ("perplexity", "baseline_perplexity", "divergence", "top1_agreement"):
        assert spread[name] == whole[name], name
    path.write_text(json.dumps(places | {"model.layers.6": "disk"}))
    one_sentence(invoke(*command, "--device-map", path), USAGE, "--device-map cannot be followed", "model.layers.6")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device-map", "even"), ("--device-map 'even' is not known", "balanced_low_0")),
        (("--device-map", "auto", "--device", "cpu"), ("--device-map", "--device is cpu", "one of the two")),
        (("--device-map", "auto", "--gpus", 2), ("--device-map", "--gpus")),
        (("--device-map", "auto", "--throughput"), ("--device-map", "--throughput")),
        (("--device-map", "auto", "--engine", "vllm"), ("--device-map", "tensor parallelism")),
    ],
)
def test_what_a_device_map_cannot_go_with(
    options: tuple[object, ...], words: tuple[str, ...], invoke: Call, one_sentence: Call
) -> None:
    one_sentence(invoke("eval", "demo", *options), USAGE, *words)
