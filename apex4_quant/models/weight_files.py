"""Which files of a folder are the model's weights, and what is in them by their headers.

What counts is what transformers loads: the file that `transformers_weights` in config.json names; else the single file,
also where an index stands beside it; else the shards that the index names. A folder of which transformers would make
something else than its index says (a tensor stored twice with different values) is refused.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import Apex4Error, UsageError
from ..format.storage import read_json
from ..format.tensor_info import TensorInfo

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMED_IN_CONFIG = (
    "transformers_weights"  # of config.json: another name for either, which transformers removes on saving
)
_PYTORCH = ("*.bin", "*.pth", "*.pt")
_INDEX_SUFFIX = ".index.json"


def index_of(folder: Path) -> Path | None:
    """The index whose shards are the model, None where the weights are one file. Raises UsageError without weights."""
    named = _named_in_config(folder)
    if named is not None:
        path = folder / named
        if not path.is_file():
            raise UsageError(f"{folder / 'config.json'} names {named} as its weights, which is not there: get the file")
        return path if named.endswith(_INDEX_SUFFIX) else None
    if (folder / SINGLE_NAME).is_file():
        return None
    if (folder / INDEX_NAME).is_file():
        return folder / INDEX_NAME
    raise UsageError(f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}: {_instead(folder)}")


def _named_in_config(folder: Path) -> str | None:
    """`transformers_weights` of config.json. Raises Apex4Error for what transformers refuses."""
    config = folder / "config.json"
    content = read_json(config) if config.is_file() else {}
    named = content.get(NAMED_IN_CONFIG) if isinstance(content, dict) else None
    if named is None:
        return None
    legal = isinstance(named, str) and named.endswith((".safetensors", f".safetensors{_INDEX_SUFFIX}"))
    if not legal or Path(named).name != named:
        raise Apex4Error(f"{NAMED_IN_CONFIG} in {config} is {named!r} and must name a safetensors file of the folder")
    return str(named)


def _instead(folder: Path) -> str:
    """What to do where there are no weights, from what is there."""
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{found[0]} is a GGUF file, which is quantized already: give the original 16-bit model"
    if any(any(folder.glob(pattern)) for pattern in _PYTORCH):
        return "only PyTorch .bin files are there: convert them to safetensors"
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"transformers does not load {found[0]}, which is there: give it that name, or get the other weights"
    return "get the weights first"


def read_tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of all tensors of a safetensors model, from the files' headers.

    Raises UsageError if there are no weights; Apex4Error if a shard is absent, truncated or damaged, or disagrees with
    the index.
    """
    index = index_of(folder)
    if index is None:
        return read_header(folder / (_named_in_config(folder) or SINGLE_NAME))
    weight_map = _weight_map(index)
    infos: dict[str, TensorInfo] = {}
    copies: list[TensorInfo] = []
    names: list[str] = []
    for name in sorted(set(weight_map.values())):
        for tensor, info in read_header(folder / name).items():
            if weight_map.get(tensor) == name:
                infos[tensor] = info
            elif tensor in weight_map:  # stored again: transformers takes one of them, the index says which is right
                copies.append(info)
                names.append(tensor)
            else:
                raise Apex4Error(f"{index} and {name} disagree on {tensor}: index and shards are not of one model")
    for tensor in weight_map:
        if tensor not in infos and tensor in names:
            raise Apex4Error(
                f"{index} and {weight_map[tensor]} disagree on {tensor}: index and shards are not of one model"
            )
        if tensor not in infos:
            raise Apex4Error(f"{index} names {tensor}, which no shard holds: index and shards are not of one model")
    for tensor, copy in zip(names, copies, strict=True):
        _require_same(tensor, infos[tensor], copy)
    return infos


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file} of an index. Raises Apex4Error if it is damaged or a file is not there."""
    content = read_json(index)
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise Apex4Error(f"{index} has no weight_map: the file is damaged, get it again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise Apex4Error(f"{index} names {name!r}, which is no safetensors file of the folder: get the index again")
        if not (index.parent / name).is_file():
            raise Apex4Error(f"{index} names {name}, which is not there: get the missing shard")
    return weight_map


def _require_same(tensor: str, one: TensorInfo, other: TensorInfo) -> None:
    """Raise Apex4Error unless both files store the tensor with the same bytes."""
    if (one.dtype, one.shape) == (other.dtype, other.shape):
        values = []
        for info in (one, other):
            try:
                with safe_open(info.file, "pt", backend="pread") as file:
                    values.append(file.get_tensor(tensor).reshape(-1).view(torch.uint8))
            except (SafetensorError, OSError) as error:
                raise Apex4Error(f"{info.file} cannot be read ({error}): get the file again") from error
        if torch.equal(values[0], values[1]):
            return
    raise Apex4Error(
        f"{one.file} and {other.file.name} disagree on {tensor}, which both hold: get the model again, or remove the file "
        "that is not of it"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file, checked against the file's size by the library. Raises Apex4Error."""
    try:
        with safe_open(path, "pt", backend="pread"):
            pass  # validates header and size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise Apex4Error(f"{path} is truncated or damaged ({error}): get the file again") from error
    entries.pop("__metadata__", None)
    return {name: TensorInfo(path, e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
