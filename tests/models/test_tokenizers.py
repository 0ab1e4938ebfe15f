"""A tokenizer that cannot be loaded: what to install, nothing asked; how windows begin, and how conversations become text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from apex4_quant.calib.errors import CalibrationError
from apex4_quant.calib.samples import draw_samples, windows
from apex4_quant.calib.text import load_text
from apex4_quant.errors import UsageError
from apex4_quant.models import tokenizers
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.tokenizers import (
    Bos,
    beginning_of,
    conversation_renderer,
    encode_text,
    load_tokenizer,
    missing_packages,
)

Call = Callable[..., Any]  # the fixtures of conftest.py
USAGE = 2
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 50  # how a protobuf of pieces begins
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"
FILES: dict[str, tuple[str, bytes, list[str]]] = {
    "Llama-2's": ("tokenizer.model", SENTENCEPIECE, ["sentencepiece", "protobuf"]),
    "T5's": ("spiece.model", SENTENCEPIECE, ["sentencepiece", "protobuf"]),
    "Llama-3's": ("tokenizer.model", TIKTOKEN, ["tiktoken"]),
    "Qwen's": ("qwen.tiktoken", TIKTOKEN, ["tiktoken"]),
    "Mistral's": ("tekken.json", b'{"config": {}}', ["mistral-common"]),
}


@pytest.fixture
def nothing_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sentencepiece", "tiktoken", "mistral_common"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    monkeypatch.setattr(tokenizers, "_is_installed", lambda module: False)


@pytest.mark.parametrize("case", FILES)
@pytest.mark.usefixtures("nothing_optional")
def test_missing_packages_are_named(
    case: str, tiny_model: Call, quantize_badly: Call, one_sentence: Call, tmp_path: Path
) -> None:
    name, content, packages = FILES[case]
    folder = tiny_model()
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    if not any((folder / other).is_file() for other in tokenizers._FILES):
        (folder / "vocab.json").write_text("{}")
    sentence = one_sentence(quantize_badly(folder), USAGE, str(folder), f"pip install {' '.join(packages)}")
    assert "get its files again" not in sentence and not (tmp_path / "out").exists()


def test_what_is_installed_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    monkeypatch.setattr(tokenizers, "_is_installed", lambda module: module == "sentencepiece")
    assert missing_packages(tmp_path) == ["protobuf"]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert missing_packages(tmp_path) == []


def test_no_code_of_a_tokenizer_is_run_and_nothing_is_asked(tiny_model: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model()
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the terminal was asked"))
    with pytest.raises(UsageError, match="made by code of its own, which apex4 does not run"):
        load_tokenizer(folder)


# ---- how text begins ----

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def plain() -> PreTrainedTokenizerBase:
    """It has a BOS token and puts none before a text."""
    return load_tokenizer(DEMO_PATH)


@pytest.fixture
def with_bos(tmp_path: Path) -> PreTrainedTokenizerBase:
    """The same, and it puts BOS before every text, as Llama's and Gemma's do."""
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO_PATH / name).read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    token = load_tokenizer(DEMO_PATH)
    bos, number = str(token.bos_token), int(token.bos_token_id)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


def test_bos_where_the_tokenizer_adds_one(plain: PreTrainedTokenizerBase, with_bos: PreTrainedTokenizerBase) -> None:
    bos = plain.bos_token_id
    assert [beginning_of(plain, choice) for choice in Bos] == [[], [bos], []]
    assert [beginning_of(with_bos, choice) for choice in Bos] == [[bos], [bos], []]
    assert encode_text(with_bos, "some text") == encode_text(plain, "some text") == plain.encode("some text")


def test_always_needs_a_token(plain: PreTrainedTokenizerBase) -> None:
    plain.bos_token = None
    assert beginning_of(plain, "auto") == []
    with pytest.raises(UsageError, match="--bos is always and the model's tokenizer has no BOS token"):
        beginning_of(plain, "always")


def test_every_window_begins_with_it() -> None:
    found = windows(list(range(10)), 4, "text", [99])
    assert found.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert windows([99, *range(10)], 4, "text", [99]).tolist() == found.tolist()  # never twice
    assert windows(list(range(8)), 4, "text").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    drawn = draw_samples(lambda text: list(range(100)), "", 5, 4, 0, "text", [99])
    assert drawn.shape == (5, 4) and bool((drawn[:, 0] == 99).all()) and drawn.dtype is torch.int64


@pytest.mark.parametrize(("tokens", "length", "said"), [(2, 4, "fewer than one window of 4"), (9, 1, "no room")])
def test_too_little_text(tokens: int, length: int, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        windows(list(range(tokens)), length, "text", [99])


def test_conversations_by_the_chat_template(plain: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    path.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(2)))
    assert conversation_renderer(plain) is None
    with pytest.raises(CalibrationError, match=r"line 1 of .* is a conversation and the model has no chat template"):
        load_text(str(path), conversation_renderer(plain))
    plain.chat_template = TEMPLATE
    assert load_text(str(path), conversation_renderer(plain)) == "<user>Who?<assistant>Me." * 2
    path.write_text(path.read_text() + "\n" + json.dumps({"text": "prose"}))
    with pytest.raises(CalibrationError, match="texts and conversations"):
        load_text(str(path), conversation_renderer(plain))
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"refuses the messages of line 1 of .*roles must alternate"):
        load_text(str(path), conversation_renderer(plain))
