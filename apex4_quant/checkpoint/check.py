"""`apex4 check`: is this checkpoint whole and sane? Stops at the first damage, naming file and tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch

from ..calib.finite import all_finite
from ..errors import Apex4Error
from ..format.layouts import get_layout
from ..format.number_format import BITS, BLOCK
from ..format.quant_config import LinearFormat
from ..format.storage import REPORT_NAME
from ..hardware.devices import DTYPES, resolve_dtype
from ..models.experts import unfuse_experts
from ..models.source import read_tensors
from ..models.weight_files import index_of
from ..nn.arithmetic import arithmetic_of
from ..transforms.learned_transform import round_to_halves
from .inspect import Checkpoint
from .load import load_model, verify_checksums


def check(path: str, progress: Callable[[str], None] = lambda line: None) -> list[dict[str, str]]:
    """Run every check; returns what each one found. Raises UsageError or Apex4Error at the first that fails."""
    checkpoint = Checkpoint(path)
    done = []
    for name, run in (
        ("index and shards", _index),
        ("coverage", _coverage),
        ("checksums", _checksums),
        ("config and report", _config_of_report),
        ("shapes", _shapes),
        ("codes, scales and other values", _values),
        ("reload and one forward pass", _forward),
    ):
        found = run(checkpoint)
        progress(f"  ok  {name}: {found}")
        done.append({"check": name, "found": found})
    return done


def _index(checkpoint: Checkpoint) -> str:
    # Opening the checkpoint compared the index with every shard's header; what is left is files nobody names.
    named = {info.file.name for info in checkpoint.infos.values()}
    extra = sorted(p.name for p in checkpoint.folder.glob("*.safetensors") if p.name not in named)
    if extra:
        index = index_of(checkpoint.folder)
        by = index.name if index is not None else "its single file of weights, which transformers loads"
        raise Apex4Error(
            f"{checkpoint.folder / extra[0]} is no file of this model by {by}: remove it or get the model again"
        )
    return f"{len(checkpoint.infos)} tensors in {len(named)} files"


def _coverage(checkpoint: Checkpoint) -> str:
    kept = set(checkpoint.quant.modules_to_not_convert)
    linears = checkpoint.linears()
    for name in linears:
        packed, plain = f"{name}.weight_packed" in checkpoint.infos, f"{name}.weight" in checkpoint.infos
        if name in kept and not plain:
            raise Apex4Error(f"{name}.weight is missing, and the config says that it is not quantized")
        if name not in kept and not packed:
            raise Apex4Error(f"{name}.weight_packed is missing, and the config says that it is quantized")
        if packed and plain:
            raise Apex4Error(f"{name} is stored both quantized and not: the checkpoint is inconsistent")
    if checkpoint.report is not None:
        planned = {entry["name"] for entry in checkpoint.report["quantized"]}
        quantized = {name for name in linears if name not in kept}
        if planned != quantized:
            name = sorted(planned ^ quantized)[0]
            raise Apex4Error(f"{name} differs between the plan in the report and the checkpoint")
        for entry in checkpoint.report["kept"]:
            if entry["name"] not in checkpoint.infos:
                raise Apex4Error(f"{entry['name']} was kept by the plan and is missing from the checkpoint")
    untouched = sum(name in kept for name in linears)
    return f"{len(linears) - untouched} linears quantized, {untouched} kept on request"


def _checksums(checkpoint: Checkpoint) -> str:
    return "all files as recorded" if verify_checksums(checkpoint.folder) else "none recorded (no apex4_report.json)"


def _config_of_report(checkpoint: Checkpoint) -> str:
    """What a reader computes with is what the run decided: a clip that config.json lost changes results in silence."""
    if checkpoint.report is None:
        return "not compared (no apex4_report.json)"
    quant, settings = checkpoint.quant, checkpoint.report.get("settings") or {}
    advice = "one of them was changed, get the checkpoint again"
    decided = settings.get("transform", quant.transform)
    if decided != quant.transform:
        raise Apex4Error(
            f"the transform is '{quant.transform}' in config.json and '{decided}' in {REPORT_NAME}: {advice}"
        )
    for entry in checkpoint.report["quantized"]:
        transform = quant.transform_of(entry["name"])
        decided = entry.get("transform", transform)
        if decided != transform:
            raise Apex4Error(
                f"{entry['name']} has transform '{transform}' in config.json and '{decided}' in {REPORT_NAME}: {advice}"
            )
        bits, decided = quant.activation_bits_of(entry["name"]), entry.get("activation_bits", BITS)
        if decided != bits:
            raise Apex4Error(
                f"{entry['name']} has {bits}-bit activations in config.json and {decided!r} in {REPORT_NAME}: {advice}"
            )
        clip = quant.modules.get(entry["name"], {}).get("activation_clip", quant.activation_clip)
        decided = entry.get("activation_clip", clip)
        if decided != clip:
            raise Apex4Error(
                f"{entry['name']} has activation_clip {clip!r} in config.json and {decided!r} in {REPORT_NAME}: {advice}"
            )
    found = sorted({quant.transform_of(entry["name"]) for entry in checkpoint.report["quantized"]})
    return f"{quant.name}, transform {' and '.join(found)} and all activation clips as in the report"


def stored_formats(checkpoint: Checkpoint) -> Iterator[tuple[str, LinearFormat]]:
    """Every quantized linear with the format its true shape implies; true shapes come from the model's class."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        del config.quantization_config
        with init_empty_weights():
            skeleton = getattr(transformers, checkpoint.family.auto_class).from_config(config)
        unfuse_experts(skeleton)
        linears = {
            name: skeleton.get_submodule(name)
            for name in checkpoint.linears()
            if name not in checkpoint.quant.modules_to_not_convert
        }
    except Exception as error:  # transformers raises whatever the missing or odd field leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Apex4Error(f"{checkpoint.folder / 'config.json'} does not describe a model ({reason})") from error
    for name, linear in linears.items():
        yield name, checkpoint.quant.linear_format(name, int(linear.out_features), int(linear.in_features))


def _shapes(checkpoint: Checkpoint) -> str:
    count = 0
    for name, format in stored_formats(checkpoint):
        parts: list[tuple[str, tuple[int, ...], str]] = [
            ("weight_packed", format.packed_shape, "U8"),
            ("weight_scale", format.scale_shape, "F16"),
        ]
        if format.transform_shape is not None:
            parts.append(("input_transform", format.transform_shape, "F16"))
        for part, shape, dtype in parts:
            info = checkpoint.infos.get(f"{name}.{part}")
            if info is None:
                raise Apex4Error(f"{name}.{part} is missing from the checkpoint")
            if (info.shape, info.dtype) != (shape, dtype):
                raise Apex4Error(f"{name}.{part} is {info.dtype} {list(info.shape)} and must be {dtype} {list(shape)}")
            count += 1
        if format.is_padded and "shape" not in checkpoint.quant.modules.get(name, {}):
            raise Apex4Error(f"{name} is padded and config.json does not record its true shape")
    return f"{count} quantized tensors, groups of {BLOCK} or more"


def _values(checkpoint: Checkpoint) -> str:
    elements = 0
    for name, info in checkpoint.infos.items():
        tensor = read_tensors(checkpoint.infos, [name])[name]
        if name.endswith(".weight_packed"):
            if get_layout(checkpoint.quant.layout).has_forbidden_code(tensor):
                raise Apex4Error(f"{name} in {info.file} holds the code -8, which is never written")
            elements += prod(info.shape) * 2
        elif name.endswith(".weight_scale"):
            if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
                raise Apex4Error(f"{name} in {info.file} holds a zero, negative, NaN or infinite scale")
        elif tensor.is_floating_point() and not all_finite(tensor):
            raise Apex4Error(f"{name} in {info.file} holds NaN or infinity")
        elif name.endswith(".input_transform") and not torch.equal(round_to_halves(tensor.float()), tensor):
            raise Apex4Error(f"{name} in {info.file} holds a number that float16 and bfloat16 do not both hold exactly")
    return f"{elements} codes in -7..7, all scales positive, everything finite"


@torch.no_grad()
def _forward(checkpoint: Checkpoint) -> str:
    dtype = resolve_dtype("auto", checkpoint.config)
    model = load_model(checkpoint.folder, "cuda" if torch.cuda.is_available() else "cpu", DTYPES[dtype])
    vocabulary = int(checkpoint.config["vocab_size"])
    tokens = torch.arange(16, device=model.device)[None] * 97 % vocabulary
    logits: Any = model(input_ids=tokens, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise Apex4Error(f"{checkpoint.folder} gives logits that are not finite: the checkpoint is damaged")
    bits = " and ".join(map(str, arithmetic_of(model)["activation_bits"]))
    return f"logits {list(logits.shape)} are finite in {dtype}, computed with {bits}-bit activations"
