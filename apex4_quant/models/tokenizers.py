"""The model's own tokenizer, loaded from its folder and nowhere else, and how its model expects text to begin."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Apex4Error, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Bos(StrEnum):
    """Whether windows of text begin with the tokenizer's BOS token. The value is what --bos takes."""

    AUTO = "auto"  # where the tokenizer puts one before a text
    ALWAYS = "always"
    NEVER = "never"


_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def require_known(largest: int, config: Mapping[str, Any], name: str) -> None:
    """Raise Apex4Error if the largest token of a text is beyond the embedding of the model `name`."""
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise Apex4Error(
            f"the tokenizer of {name} makes token {largest} and the model knows {vocabulary}: "
            "tokenizer and model do not belong together"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises UsageError if the folder has none, or one that cannot be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise UsageError(
            f"{folder} has no tokenizer (none of {', '.join(_FILES[:3])}): add the model's tokenizer files"
        )
    try:
        with _without_advice_of_libraries():
            # False, not left away: transformers would ask on the terminal whether to run a tokenizer's own code.
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged JSON, unknown classes, missing companions: a dozen types
        if packages := missing_packages(folder):
            raise UsageError(
                f"the tokenizer in {folder} needs packages that are not installed: pip install {' '.join(packages)}"
            ) from error
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"the tokenizer in {folder} is made by code of its own, which apex4 does not run: add a tokenizer.json"
            ) from error
        _require_config(folder)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the tokenizer in {folder} cannot be loaded ({reason}): get its files again") from error
    # Long texts are cut into windows by us; the length warning would be noise.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _require_config(folder: Path) -> None:
    """transformers looks into config.json for the tokenizer too: Apex4Error where that is what cannot be read."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1].strip()
        raise Apex4Error(
            f"{folder / 'config.json'} does not describe a model ({type(error).__name__}: {reason}): get it again"
        ) from error


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


def missing_packages(folder: Path) -> list[str]:
    """What pip has to install so that the tokenizer's files can be read, by their content: transformers guesses it."""
    if (folder / "tokenizer.json").is_file():
        return []
    needed: set[str] = set()
    if (folder / "tekken.json").is_file():
        needed.add("mistral-common")
    for path in (*folder.glob("*.model"), *folder.glob("*.tiktoken")):
        with path.open("rb") as file:
            lines_of_tokens = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", file.read(4096)) is not None
        needed |= {"tiktoken"} if lines_of_tokens else {"sentencepiece", "protobuf"}
    return [name for name, module in _MODULES.items() if name in needed and not _is_installed(module)]


_MODULES = {
    "sentencepiece": "sentencepiece",
    "protobuf": "google.protobuf",
    "tiktoken": "tiktoken",
    "mistral-common": "mistral_common",
}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


@contextmanager
def _without_advice_of_libraries() -> Iterator[None]:
    """transformers warns in many lines of packages that it does without: what is missing in the end, we say."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
