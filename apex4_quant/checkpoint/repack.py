"""`apex4 repack`: a checkpoint rewritten for another GPU. The same codes and scales in another order, file by file.

One weight file is in memory at a time. The result is byte for byte what quantizing for the new target would have
written. config.json is written last, so that a stopped repack leaves nothing that loads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import Apex4Error
from ..format.layouts import get_layout
from ..format.quant_config import LinearFormat
from ..format.storage import (
    REPORT_NAME,
    new_folder,
    require_empty,
    require_free_space,
    require_outside,
    sha256,
    write_json,
    write_tensors,
)
from ..hardware.gpus import Target, resolve_target
from ..models.companions import companions_of, copy_companions
from ..models.place import CHECKPOINT, require_there
from ..models.source import read_tensors
from ..models.weight_files import INDEX_NAME, NAMED_IN_CONFIG, index_of
from .check import stored_formats
from .inspect import Checkpoint
from .load import verify_checksums

MEASUREMENTS_NAME = "apex4_evaluation.json"  # of publishing/records.py: belongs to the weight files by their checksums


def repack(path: str, out: Path, target: str, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """What `apex4 repack --json` prints. Raises UsageError or Apex4Error; `out` is complete or has no config.json."""
    out = Path(out)
    require_there(path, kind=CHECKPOINT)
    wanted = resolve_target(target)
    require_empty(out)
    checkpoint = Checkpoint(path)
    require_outside(out, checkpoint.folder)
    verify_checksums(checkpoint.folder)  # damage must not get new checksums
    before = dict(stored_formats(checkpoint))
    layout = get_layout(wanted.layout)
    after = {name: replace(format, layout=layout) for name, format in before.items()}
    require_free_space(out, _bytes_after(checkpoint, after))
    with new_folder(out):
        total = _write(checkpoint, out, wanted, before, after, progress)
    return {
        "model": path,
        "output": str(out),
        "target": wanted.gpu or wanted.arch or "none",
        "layout_before": checkpoint.quant.layout,
        "layout": wanted.layout,
        "linears": len(after),
        "bytes": total,
    }


def _write(
    checkpoint: Checkpoint,
    out: Path,
    wanted: Target,
    before: dict[str, LinearFormat],
    after: dict[str, LinearFormat],
    progress: Callable[[str], None],
) -> int:
    """All files of the repacked checkpoint, config.json last. Returns the bytes of its tensors."""
    files = sorted({info.file for info in checkpoint.infos.values()})
    total, recorded = 0, {}
    for number, file in enumerate(files, 1):
        tensors = read_tensors(checkpoint.infos, [name for name, info in checkpoint.infos.items() if info.file == file])
        for name in tensors:
            tensors[name] = _reordered(name, tensors[name], before, after)
        write_tensors(out / file.name, tensors)
        total += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        recorded[file.name] = {"bytes": (out / file.name).stat().st_size, "sha256": sha256(out / file.name)}
        progress(f"  {number}/{len(files)}  {file.name}")
        del tensors
    companions = companions_of(checkpoint.folder, everything=True)[0]
    if MEASUREMENTS_NAME in companions and (checkpoint.report or {}).get("files") != recorded:
        companions.remove(MEASUREMENTS_NAME)
        progress(
            f"  {MEASUREMENTS_NAME} stays behind, it is of the old files: measure again with 'apex4 eval --record'"
        )
    copy_companions(checkpoint.folder, companions, out)
    config = dict(checkpoint.stored_config)
    if index_of(checkpoint.folder) is not None:
        config.pop(NAMED_IN_CONFIG, None)
        weight_map = {name: info.file.name for name, info in checkpoint.infos.items()}
        write_json(
            out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )
    if checkpoint.report is not None:
        write_json(out / REPORT_NAME, _report(checkpoint.report, wanted, before, after, recorded))
    section = replace(
        checkpoint.quant,
        layout=wanted.layout,
        target={"gpu": wanted.gpu, "arch": wanted.arch},
        modules=_overrides(checkpoint, after),
    )
    write_json(out / "config.json", config | {"quantization_config": section.to_dict()})
    return total


def _bytes_after(checkpoint: Checkpoint, after: dict[str, LinearFormat]) -> int:
    others = [
        info.bytes for name, info in checkpoint.infos.items() if not name.endswith((".weight_packed", ".weight_scale"))
    ]
    return sum(others) + sum(prod(f.packed_shape) + 2 * prod(f.scale_shape) for f in after.values())


def _reordered(
    name: str, tensor: torch.Tensor, before: dict[str, LinearFormat], after: dict[str, LinearFormat]
) -> torch.Tensor:
    """`tensor` in the new order, or as it is if the layout does not concern it. Raises Apex4Error for damage."""
    linear, _, part = name.rpartition(".")
    if linear not in before or part not in ("weight_packed", "weight_scale"):
        return tensor
    old, new = before[linear], after[linear]
    if tuple(tensor.shape) != (old.packed_shape if part == "weight_packed" else old.scale_shape):
        raise Apex4Error(f"{name} has shape {list(tensor.shape)}, not the one config.json implies: see 'apex4 check'")
    if part == "weight_scale":
        return new.layout.pack_scales(old.layout.unpack_scales(tensor, old.out_features))
    if old.layout.has_forbidden_code(tensor):
        raise Apex4Error(f"{name} holds the code -8, which is never written: the file is damaged")
    return new.layout.pack(old.layout.unpack(tensor, old.out_features))


def _overrides(checkpoint: Checkpoint, after: dict[str, LinearFormat]) -> dict[str, dict[str, Any]]:
    """`modules` of the configuration with the true shapes of what is padded now, in the order of a quantization."""
    stored = checkpoint.quant.modules
    planned: dict[str, dict[str, Any]] = {}
    for name, format in after.items():
        entry = dict(stored.get(name, {}))
        if format.is_padded:
            entry["shape"] = [format.out_features, format.in_features]
        else:
            entry.pop("shape", None)
        order = ("group_size", "transform", "shape", "transform_from", "activation_bits")
        if kept := {key: entry[key] for key in order if key in entry}:
            planned[name] = kept
    for name in after:
        if "activation_clip" in stored.get(name, {}):
            planned.setdefault(name, {})["activation_clip"] = stored[name]["activation_clip"]
    return planned


def _report(
    report: dict[str, Any],
    target: Target,
    before: dict[str, LinearFormat],
    after: dict[str, LinearFormat],
    files: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    settings = report.get("settings", {}) | {
        "target": target.gpu or target.arch or "none",
        "layout": target.layout,
    }
    quantized = [
        entry | ({"bytes": after[entry["name"]].stored_bytes} if "bytes" in entry else {})
        for entry in report["quantized"]
    ]
    changed = dict(report) | {"quantized": quantized, "settings": settings, "files": files}
    grown = sum(after[name].stored_bytes - before[name].stored_bytes for name in before)
    if "bytes_after" in report:
        changed["bytes_after"] = report["bytes_after"] + grown
    if "bits_per_weight" in report:
        elements = sum(format.out_features * format.in_features for format in before.values())
        changed["bits_per_weight"] = round(8 * sum(format.stored_bytes for format in after.values()) / elements, 4)
    return changed
