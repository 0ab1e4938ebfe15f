"""`apex4 export`: a checkpoint in the format of another program, which runs it without apex4. No quantization is done.

vllm-humming   stock vLLM from 0.33 on, whose quantization method "humming" multiplies INT4 by INT4 in groups of 128 on both
               sides. Of a linear it reads
                   weight        int32 [N, K / 8]    code + 8 of input feature k in bits 4 (k mod 8) .. of word k / 8
                   weight_scale  [N, K / 128]        float16 as in apex4; vLLM rounds them to the model's dtype
                   bias          as it is
               Its online transform is x H_128 / sqrt(128) in Sylvester's order, as ours (kernels/hadamard.py). Scales of
               activations are absmax / 7 as ours, so that activations that are clipped have no counterpart.

One weight file is in memory at a time. config.json is written last, so that a stopped export leaves nothing that loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import Apex4Error, UsageError
from ..format.export_format import ExportFormat
from ..format.number_format import BITS, BLOCK
from ..format.quant_config import LinearFormat
from ..format.storage import (
    new_folder,
    require_empty,
    require_free_space,
    require_outside,
    write_json,
    write_tensors,
)
from ..format.transform_kind import TransformKind
from ..models.companions import companions_of, copy_companions
from ..models.families import expert_of
from ..models.place import CHECKPOINT, require_there
from ..models.source import read_tensors
from ..models.weight_files import INDEX_NAME
from .check import stored_formats
from .inspect import Checkpoint
from .load import verify_checksums

PER_WORD = 8  # codes in an int32
RECIPES = (
    "'rtn' or 'gptq', or a recipe file with transform hadamard128 or none and neither search_clip nor activation_clip"
)
# Linears that vLLM runs in one layer, and that layer: how it names what stays unquantized.
_LAYERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def export(path: str, out: Path, to: str, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """What `apex4 export --json` prints. Raises UsageError for a checkpoint that the format cannot hold, or Apex4Error."""
    if to not in list(ExportFormat):
        raise UsageError(f"format {to!r} is not known: give one of {', '.join(ExportFormat)}")
    out = Path(out)
    require_there(path, kind=CHECKPOINT)
    require_empty(out)
    checkpoint = Checkpoint(path)
    require_outside(out, checkpoint.folder)
    verify_checksums(checkpoint.folder)
    formats = dict(stored_formats(checkpoint))
    section = humming_section(formats, checkpoint.linears())
    require_free_space(out, sum(info.bytes for info in checkpoint.infos.values()))
    with new_folder(out):
        total = _write(checkpoint, out, formats, section, progress)
    return {"model": path, "output": str(out), "format": str(to), "linears": len(formats), "bytes": total}


def _write(
    checkpoint: Checkpoint,
    out: Path,
    formats: dict[str, LinearFormat],
    section: dict[str, Any],
    progress: Callable[[str], None],
) -> int:
    """All files of the exported checkpoint, config.json last. Returns the bytes of its tensors."""
    files = sorted({info.file for info in checkpoint.infos.values()})
    total, names = 0, dict[str, str]()
    for number, file in enumerate(files, 1):
        stored = read_tensors(checkpoint.infos, [name for name, info in checkpoint.infos.items() if info.file == file])
        tensors = dict(_exported(name, tensor, formats) for name, tensor in stored.items())
        write_tensors(out / file.name, tensors)
        total += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        names |= dict.fromkeys(tensors, file.name)
        progress(f"  {number}/{len(files)}  {file.name}")
        del stored, tensors
    companions = companions_of(checkpoint.folder)[0]
    copy_companions(checkpoint.folder, companions, out)
    if (checkpoint.folder / INDEX_NAME).is_file():
        write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))})
    write_json(out / "config.json", checkpoint.stored_config | {"quantization_config": section})
    return total


def humming_section(formats: dict[str, LinearFormat], linears: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` for vLLM's method "humming". `linears`: all of the decoder layers, quantized or not.

    Raises UsageError, naming a linear, for what the method cannot compute.
    """
    transforms: dict[TransformKind, str] = {}
    for name, format in formats.items():
        advice = f"quantize with --recipe {RECIPES}"
        if expert_of(name) is not None:
            raise UsageError(
                f"{name} is of a mixture of experts, which Humming does not run with 4-bit activations in vLLM 0.33: serve the "
                "checkpoint with the apex4 plugin"
            )
        if format.transform.is_learned:
            raise UsageError(f"{name} has a learned transform ({format.transform}), which Humming has not: {advice}")
        if format.activation_bits != BITS:
            raise UsageError(
                f"{name} has {format.activation_bits}-bit activations, and the export is for {BITS}-bit ones"
            )
        if format.activation_clip != 1:
            raise UsageError(
                f"{name} clips its activations at {format.activation_clip}, which Humming does not: {advice}"
            )
        if format.group_size != BLOCK:
            raise UsageError(
                f"{name} has groups of {format.group_size}, and the export is for groups of {BLOCK} on both sides: quantize "
                f"with --group-size {BLOCK}"
            )
        if format.in_features % BLOCK:
            raise UsageError(
                f"{name} has {format.in_features} input features, and Humming has no padding to groups of {BLOCK}: serve the "
                "checkpoint with the apex4 plugin"
            )
        transforms.setdefault(format.transform, name)
    if len(transforms) > 1:
        first, second = transforms.values()
        raise UsageError(
            f"{first} has a Hadamard transform and {second} has none: quantize with one --transform for all"
        )
    if not transforms:
        raise UsageError("no linear of the checkpoint is quantized: there is nothing to export")
    return {
        "quant_method": "humming",
        "b_dtype": "uint4",
        "weight_scale_group_size": BLOCK,
        "hadamard_block_size": BLOCK if TransformKind.HADAMARD in transforms else 0,
        "a_dtype": "int4",
        "input_scale_group_size": BLOCK,
        "allow_fallback": False,  # with it vLLM would take 16-bit activations where INT4 is slow
        "ignored_layers": ["lm_head", *(f"re:{re.escape(name)}$" for name in _kept_layers(formats, linears))],
    }


def _kept_layers(formats: dict[str, LinearFormat], linears: Iterable[str]) -> list[str]:
    """The layers of vLLM that stay unquantized. Raises UsageError for one of which only a part does."""
    layers: dict[str, list[str]] = {}
    for name in linears:
        parent, _, last = name.rpartition(".")
        together = next((layer for layer, members in _LAYERS.items() if last in members), last)
        layers.setdefault(f"{parent}.{together}", []).append(name)
    kept = []
    for layer, members in layers.items():
        plain = [name for name in members if name not in formats]
        if plain and len(plain) < len(members):
            other = next(name for name in members if name in formats)
            raise UsageError(
                f"vLLM runs {plain[0]}, which is not quantized, and {other}, which is, in one layer: quantize both or neither"
            )
        kept += [layer] if plain else []
    return kept


def _exported(name: str, tensor: torch.Tensor, formats: dict[str, LinearFormat]) -> tuple[str, torch.Tensor]:
    """Name and tensor in the exported checkpoint."""
    linear, _, part = name.rpartition(".")
    format = formats.get(linear)
    if format is None or part not in ("weight_packed", "weight_scale"):
        return name, tensor
    if part == "weight_scale":
        return name, format.layout.unpack_scales(tensor, format.out_features)
    if format.layout.has_forbidden_code(tensor):
        raise Apex4Error(f"{name} holds the code -8, which is never written: the file is damaged")
    return f"{linear}.weight", pack_words(format.layout.unpack(tensor, format.out_features))


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [N, K] -> int32 [N, K / 8] of code + 8, the first in the lowest bits."""
    nibbles = (codes.to(torch.int64) + 8).unflatten(1, (-1, PER_WORD))
    words = (nibbles << (4 * torch.arange(PER_WORD))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
