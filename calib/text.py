"""Where text comes from: a file, JSON lines, a Hub data set, or what is bundled.

bundled                        the bundled calibration text (never the held-out one)
heldout                        the bundled held-out text
wikitext2                      the test split that quantization papers evaluate on (Hub)
path/to/file.txt               plain text
path/to/file.jsonl             one JSON object a line: its "text", or its conversation, "messages", as the model's
                               chat template renders it
ORG/NAME[:CONFIG[:SPLIT]]      a Hub data set with a "text" column; the split is "train" unless given
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CalibrationError

BUNDLED = Path(__file__).resolve().parent / "bundled"
_NAMED = {"bundled": BUNDLED / "calibration.txt", "heldout": BUNDLED / "heldout.txt"}
_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
_HUB_TEXT_LIMIT = 32_000_000  # characters: more than any calibration draws, less than fills memory


# A conversation, [{"role": ..., "content": ...}, ...], to text.
Render = Callable[[list[dict[str, Any]]], str]


def load_text(source: str, render: Render | None = None) -> str:
    """The whole text of `source`, documents joined by blank lines, conversations (`render`) one behind the other.

    Raises CalibrationError.
    """
    if source in _NAMED:
        return _NAMED[source].read_text("utf-8")
    if source == "wikitext2":
        return _load_hub(*_WIKITEXT2)
    path = Path(source).expanduser()
    if path.is_file():
        return _load_jsonl(path, render) if path.suffix == ".jsonl" else _read(path)
    if path.suffix in (".txt", ".jsonl", ".json", ".md") or source.startswith((".", "/", "~")) or "/" not in source:
        raise CalibrationError(
            f"text {source!r} is not a file: give a .txt or .jsonl file, a Hub data set, or 'bundled'"
        )
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return _load_hub(name, config or None, split or "train")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"text file {path} is not UTF-8 (byte {error.start}): convert it first") from error


def _load_jsonl(path: Path, render: Render | None) -> str:
    texts: list[str] = []
    conversations: list[str] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            text, messages = values.get("text"), values.get("messages")
        except (ValueError, AttributeError) as error:
            raise CalibrationError(f"line {number} of {path} is not a JSON object with a 'text' field") from error
        if isinstance(messages, list):
            conversations.append(_rendered(messages, render, f"line {number} of {path}"))
        elif isinstance(text, str):
            texts.append(text)
        elif text is None:
            raise CalibrationError(f"line {number} of {path} is not a JSON object with a 'text' field, or 'messages'")
        else:
            raise CalibrationError(f"line {number} of {path} has a 'text' field that is not a string")
    if texts and conversations:
        raise CalibrationError(f"{path} has texts and conversations ('messages'): give one kind in a file")
    return "".join(conversations) or "\n\n".join(texts)


def _rendered(messages: list[Any], render: Render | None, where: str) -> str:
    if render is None:
        raise CalibrationError(f"{where} is a conversation and the model has no chat template: give plain text")
    try:
        return render(messages)
    except Exception as error:  # whatever the model's template raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"the chat template of the model refuses the messages of {where} ({reason})") from error


def _load_hub(name: str, config: str | None, split: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(f"data set {name} needs the package 'datasets': pip install datasets") from error
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the library raises a dozen types for "not there" and "no network"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"data set {name} ({config or 'default'}, {split}) cannot be loaded from the Hub ({reason}): "
            "check the name and the network, or give a local text file"
        ) from error
    if "text" not in rows.column_names:
        raise CalibrationError(f"data set {name} has no 'text' column: it has {', '.join(rows.column_names)}")
    texts, size = [], 0
    for row in rows:
        texts.append(row["text"])
        size += len(row["text"])
        if size > _HUB_TEXT_LIMIT:
            break
    return "\n\n".join(texts)
