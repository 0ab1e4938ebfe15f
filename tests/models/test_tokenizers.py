"""A tokenizer that cannot be loaded: the sentence says what to install, and nothing is asked on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.models import tokenizers
from apex4_quant.models.tokenizers import load_tokenizer, missing_packages

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
