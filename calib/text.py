"""Where text comes from: a file, JSON lines, a Hub data set, or what is bundled.

bundled                        the bundled calibration text (never the held-out one)
heldout                        the bundled held-out text
wikitext2                      the test split that quantization papers evaluate on (Hub)
path/to/file                   plain text, JSON Lines or JSON, compressed or not (files.py)
ORG/NAME[:CONFIG[:SPLIT]]      a Hub data set with a "text" column; the split is "train" unless given
"""

from __future__ import annotations

from pathlib import Path

from .errors import CalibrationError
from .files import COMPRESSED, JSON_LINES, Render, read_file

BUNDLED = Path(__file__).resolve().parent / "bundled"
_NAMED = {"bundled": BUNDLED / "calibration.txt", "heldout": BUNDLED / "heldout.txt"}
_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
_HUB_TEXT_LIMIT = 32_000_000  # characters: more than any calibration draws, less than fills memory


def load_text(source: str, render: Render | None = None) -> str:
    """The whole text of `source`, documents joined by blank lines, conversations (`render`) one behind the other.

    Raises CalibrationError, also if there is none in it.
    """
    text = _load(source, render)
    if not text.strip():
        raise CalibrationError(f"text {source!r} has nothing in it but blanks: give another")
    return text


def names_a_file(source: str) -> bool:
    """Whether a source that is no file here can only be meant as one, not as a Hub data set."""
    suffix = Path(source).suffix.lower()
    return source.startswith((".", "/", "~")) or suffix in (".txt", ".json", ".md", *JSON_LINES, *COMPRESSED)


def _load(source: str, render: Render | None) -> str:
    if source in _NAMED:
        return _NAMED[source].read_text("utf-8")
    if source == "wikitext2":
        return _load_hub(*_WIKITEXT2)
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path, render)
    if names_a_file(source) or "/" not in source:
        raise CalibrationError(
            f"text {source!r} is not a file: give a .txt or .jsonl file, a Hub data set, or 'bundled'"
        )
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return _load_hub(name, config or None, split or "train")


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
    for number, row in enumerate(rows):
        if not isinstance(row["text"], str):
            raise CalibrationError(f"row {number} of data set {name} has a 'text' that is not a string: give another")
        texts.append(row["text"])
        size += len(row["text"])
        if size > _HUB_TEXT_LIMIT:
            break
    return "\n\n".join(texts)
