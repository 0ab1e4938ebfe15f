"""`apex4 eval --record`: what was measured, kept in the checkpoint's folder as apex4_evaluation.json.

    {"version": 1,
     "weights": SHA-256 over the recorded checksums of all weight files,
     "records": [{"kind": "quality" or "throughput", "date": ..., "command": ..., "versions": {...}, "device": {...},
                  "activations": {"bits": 4, 8 or [4, 8], "kernels": [...]}, "result": what `apex4 eval --json` printed}]}

`activations` says what the linears computed with, which may be more bits than the checkpoint says. A measurement made again with
the same settings and so computed takes the place of the first one. Measurements belong to the weights they
were made with: those of other weights are refused, when they are written and when they are read.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Apex4Error, UsageError
from ..evaluation.engine import EngineName
from ..format.storage import read_json, write_json
from ..models.place import CHECKPOINT, require_there
from .folder import RECORDS_NAME, CheckpointFolder

VERSION = 1
QUALITY, THROUGHPUT = "quality", "throughput"
# What makes two measurements the same one, made again.
_SETTINGS = {
    QUALITY: ("text", "seq_len", "bos", "tokens", "baseline", "device", "dtype", "kv_cache_bits", "engine"),
    THROUGHPUT: ("batch", "prompt_len", "gen_len", "device", "engine"),
}
_USUAL = {"engine": EngineName.TRANSFORMERS}  # of records that do not say it
_PACKAGES = ("torch", "transformers", "lm_eval", "safetensors")


def require_recordable(path: str) -> CheckpointFolder:
    """The folder that measurements of `path` can be kept in. Raises UsageError; called before anything is measured."""
    require_there(path, kind=CHECKPOINT)
    if not Path(path).expanduser().is_dir():
        raise UsageError(f"--record writes into the checkpoint, and {path!r} is no local folder: leave it away")
    checkpoint = CheckpointFolder(Path(path).expanduser())
    read_records(checkpoint)
    if not os.access(checkpoint.folder, os.W_OK):
        raise UsageError(f"--record writes into {checkpoint.folder}, which is read-only: leave it away")
    return checkpoint


def read_records(checkpoint: CheckpointFolder) -> list[dict[str, Any]]:
    """The measurements of this checkpoint, none if there are none.

    Raises UsageError for those of another one, Apex4Error for a damaged file.
    """
    path = checkpoint.folder / RECORDS_NAME
    if not path.is_file():
        return []
    try:
        content = read_json(path)
    except Apex4Error as error:  # it was written here: there is nowhere to get it from
        raise Apex4Error(f"{path} cannot be read: the file is damaged, remove it and measure again") from error
    records = content.get("records") if isinstance(content, dict) else None
    if not isinstance(records, list) or not all(isinstance(one, dict) and "result" in one for one in records):
        raise Apex4Error(f"{path} holds no measurements: the file is damaged, remove it and measure again")
    if content.get("version") != VERSION:
        raise Apex4Error(f"{path} has version {content.get('version')!r} and this apex4 reads {VERSION}: update apex4")
    if content.get("weights") != checkpoint.weights_digest:
        raise UsageError(
            f"{path} holds measurements of other weights than those in {checkpoint.folder}: remove it and measure again "
            f"with 'apex4 eval {checkpoint.folder} --record'"
        )
    return records


def record_evaluation(path: str, result: dict[str, Any], command: Sequence[str]) -> Path:
    """Keep `result`, what `apex4 eval --json` prints of `path` (with or without --throughput), in its folder.

    `command` is the command line without the program's name. Returns the file written. Raises UsageError or Apex4Error.
    """
    checkpoint = require_recordable(path)
    kind = THROUGHPUT if "prompt_len" in result else QUALITY
    record = {
        "kind": kind,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["apex4", *map(public_name, command)]),
        "versions": _versions(result),
        "device": describe_device(str(result["device"])),
        "activations": _activations(result["result"] if kind == THROUGHPUT else result),
        "result": _public(result),
    }
    kept = [one for one in read_records(checkpoint) if _identity(one) != _identity(record)]
    write_json(
        checkpoint.folder / RECORDS_NAME,
        {"version": VERSION, "weights": checkpoint.weights_digest, "records": [*kept, record]},
    )
    return checkpoint.folder / RECORDS_NAME


def public_name(name: str) -> str:
    """`name`, or its last part if it is an absolute path: a record is published, the folders of a disk are not."""
    return Path(name).name if Path(name).is_absolute() else name


def _public(result: dict[str, Any]) -> dict[str, Any]:
    changed = {
        key: public_name(result[key]) for key in ("model", "baseline", "text") if isinstance(result.get(key), str)
    }
    for part in ("result", "baseline"):
        if isinstance(result.get(part), dict):
            changed[part] = result[part] | {"model": public_name(str(result[part]["model"]))}
    return result | changed


def _identity(record: dict[str, Any]) -> tuple[Any, ...]:
    result = record["result"]
    tasks = tuple(sorted(result.get("tasks") or {}))
    kind = record.get("kind", QUALITY)
    bits = str(record.get("activations", {}).get("bits"))
    return (kind, tasks, bits, *(str(result.get(name, _USUAL.get(name))) for name in _SETTINGS[kind]))


def _versions(result: dict[str, Any]) -> dict[str, str]:
    found = {"apex4": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if result.get("engine") == EngineName.VLLM:
        found["vllm"] = str(result["engine_version"])
    return found


def describe_device(device: str) -> dict[str, str]:
    """Name, and for GPUs their driver, of the `device` that measured: "cpu", "cuda", "cuda:N", or several of them and "disk", as
    "cuda:0, cuda:1, disk"."""
    gpus = [place for place in device.split(", ") if place.startswith("cuda")]
    if not gpus:
        return {"device": device, "name": _processor()}
    import torch

    names = Counter(torch.cuda.get_device_name(torch.device(gpu).index or 0) for gpu in gpus)
    described = (name if count == 1 else f"{count} x {name}" for name, count in names.items())
    found = {"device": device, "name": " and ".join(described)}
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        found["driver"] = answer.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass  # a container without the tool: the driver stays unnamed
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _activations(measured: dict[str, Any]) -> dict[str, Any]:
    bits = list(measured["activation_bits"])
    return {"bits": bits[0] if len(bits) == 1 else bits, "kernels": list(measured["kernels"])}
