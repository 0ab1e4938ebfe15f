"""The model's own tokenizer, loaded from its folder and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Apex4Error, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged JSON, unknown classes, missing companions: a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the tokenizer in {folder} cannot be loaded ({reason}): get its files again") from error
    # Long texts are cut into windows by us; the length warning would be noise.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer
