"""What of a model's folder goes with it and is no weight: tokenizers of any make, chat templates, configurations, licence.

Which files those are is not listed: every tokenizer class has names of its own, and a template may be in any file. Listed
is what nobody reads who loads the model: weights in all their formats, traces of its training, pictures, data, its card.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..format.storage import REPORT_NAME, TEMPORARY_SUFFIX, copy_file, make_folder
from .source import CHECKSUMS_NAME

# Folders that transformers reads beside the files at the top.
FOLDERS = ("additional_chat_templates", "custom_generate")
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack",
    "*.ot", "*.npz", "*.npy", "*.tflite", "*.pdparams", "*.mlmodel", "*.pkl", "*.safetensors.index.json",
    "*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json",
)  # fmt: skip
_WRITTEN = ("config.json", REPORT_NAME)  # by us
_NOT_READ = (
    "README*", "apex4_*", "train*", "*_results.json", "events.out.tfevents.*", "*.log", CHECKSUMS_NAME, "params.json",
    "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4", "*.wav", "*.mp3", "*.html", "*.ipynb",
    "*.csv", "*.tsv", "*.jsonl", "*.parquet", "*.arrow", "*.zip", "*.tar", "*.gz", "*.xz", "*.7z",
)  # fmt: skip
_SHOWN = 8


def companions_of(folder: Path, everything: bool = False) -> tuple[list[str], list[str]]:
    """(taken over, left behind) of a model's folder, as sorted paths below it; weights and hidden files are in neither.

    `everything`: of a checkpoint of ours that is written anew, also its card, measurements and pictures.
    """
    taken: list[str] = []
    left: list[str] = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if hidden or not path.is_file() or path.suffix in (TEMPORARY_SUFFIX, ".lock"):
            continue
        at_top = len(relative.parts) == 1
        if _is_any(path.name, _WEIGHTS) or (at_top and path.name in _WRITTEN):
            continue
        read = not _is_any(path.name, _NOT_READ) if at_top else relative.parts[0] in FOLDERS
        (taken if read or everything else left).append(relative.as_posix())
    return taken, left


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def copy_companions(folder: Path, names: Sequence[str], out: Path) -> None:
    """Copy files below `folder` to the same places below `out`. Raises Apex4Error."""
    for name in names:
        target = out / name
        make_folder(target.parent)
        copy_file(folder / name, target)


def left_behind_as_text(folder: Path, names: Sequence[str]) -> str:
    """The line for people."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"left behind in {folder}, as nothing that loads the model reads it: {', '.join(names[:_SHOWN])}{more}"
