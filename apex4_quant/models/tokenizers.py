"""The model's own tokenizer, loaded from its folder and nowhere else, and how its model expects text to begin."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Bos(StrEnum):
    """Whether windows of text begin with the tokenizer's BOS token. The value is what --bos takes."""

    AUTO = "auto"  # where the tokenizer puts one before a text
    ALWAYS = "always"
    NEVER = "never"


_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises UsageError if the folder has none, or one that cannot be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise UsageError(
            f"{folder} has no tokenizer (none of {', '.join(_FILES[:3])}): add the model's tokenizer files"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged JSON, unknown classes, missing companions: a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the tokenizer in {folder} cannot be loaded ({reason}): get its files again") from error
    # Long texts are cut into windows by us; the length warning would be noise.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def beginning_of(tokenizer: PreTrainedTokenizerBase, bos: str) -> list[int]:
    """The tokens that every window begins with: BOS, or none. Raises UsageError for --bos always without such a token."""
    token = tokenizer.bos_token_id
    if bos == Bos.NEVER:
        return []
    if bos == Bos.ALWAYS:
        if not isinstance(token, int):
            raise UsageError("--bos is always and the model's tokenizer has no BOS token: leave --bos away")
        return [token]
    return [token] if isinstance(token, int) and tokenizer.encode("a")[:1] == [token] else []


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of `text` alone: nothing is put before it or behind it."""
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def conversation_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], str] | None:
    """A conversation to text by the model's chat template; None if it ships none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False))
