"""`apex4 inspect`: what is in a checkpoint, from its headers and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..format.number_format import BITS
from ..format.quant_config import QuantConfig
from ..format.storage import format_bytes
from ..format.tensor_info import TensorInfo
from ..models.families import Family, family_of
from ..models.foreign_formats import foreign_format
from ..models.place import CHECKPOINT
from ..models.source import language_settings, read_config, require_sizes, resolve_model
from ..models.weight_files import read_tensor_infos
from .load import quant_config_of, read_report


class Checkpoint:
    """An apex4 checkpoint opened for reading: config, headers, and the linears its architecture has.

    Raises UsageError if the folder is no apex4 checkpoint, Apex4Error if it is damaged.
    """

    def __init__(self, path: str) -> None:
        self.folder: Path = resolve_model(path, CHECKPOINT)
        self.stored_config = read_config(self.folder, CHECKPOINT)
        quant = quant_config_of(self.stored_config)
        if quant is None:
            other = foreign_format(self.folder, self.stored_config, read_tensor_infos(self.folder))
            if other is not None:
                raise UsageError(f"{path} is quantized ({other}), and its config.json does not say so: get it again")
            raise UsageError(f"{path} is not quantized: give a folder that 'apex4 quantize' wrote")
        self.quant: QuantConfig = quant
        self.family: Family = family_of(self.stored_config, path)
        self.config = language_settings(self.folder, self.stored_config)
        require_sizes(self.config, self.folder)
        self.infos: dict[str, TensorInfo] = read_tensor_infos(self.folder)
        self.report = read_report(self.folder)

    def linears(self) -> list[str]:
        """Every linear of every decoder layer, whether the checkpoint stores it quantized or not."""
        return [
            self.family.layer_prefix(layer) + part
            for layer in range(int(self.config["num_hidden_layers"]))
            for part in self.family.linears(self.config, layer)
        ]


def inspect(path: str) -> dict[str, Any]:
    """What `apex4 inspect --json` prints."""
    checkpoint = Checkpoint(path)
    reported = {entry["name"]: entry for entry in (checkpoint.report or {}).get("quantized", [])}
    linears = []
    for name in checkpoint.linears():
        packed = checkpoint.infos.get(f"{name}.weight_packed")
        plain = checkpoint.infos.get(f"{name}.weight")
        scale = checkpoint.infos.get(f"{name}.weight_scale")
        override = checkpoint.quant.modules.get(name, {})
        transform = checkpoint.infos.get(f"{name}.input_transform")
        stored = [info for info in (packed, scale, transform, plain) if info]
        tiles = packed and (packed.shape[0] * packed.shape[2] // 64, packed.shape[1] * 128)
        shape = override.get("shape") or (list(tiles) if tiles else list(plain.shape) if plain else None)
        of_run = reported.get(name, {})
        linears.append(
            {
                "name": name,
                "quantized": packed is not None,
                "shape": shape,
                "group_size": override.get("group_size", checkpoint.quant.group_size) if packed else None,
                "transform": checkpoint.quant.transform_of(name) if packed else None,
                "activation_bits": checkpoint.quant.activation_bits_of(name) if packed else None,
                "bytes": sum(info.bytes for info in stored),
                "error": of_run.get("error"),
            }
            | {key: of_run[key] for key in ("calibration_tokens", "fallback") if key in of_run}
        )
    total = sum(info.bytes for info in checkpoint.infos.values())
    in_linears = sum(linear["bytes"] for linear in linears)
    return {
        "path": path,
        "architecture": checkpoint.family.architecture,
        "format": checkpoint.quant.name,
        "quantization_config": {k: v for k, v in checkpoint.quant.to_dict().items() if k != "modules"},
        "linears": linears,
        "bytes": total,
        "bytes_other": total - in_linears,
        "report": {k: v for k, v in (checkpoint.report or {}).items() if k in ("model", "settings", "versions")}
        or None,
    }


def inspection_as_text(result: dict[str, Any]) -> str:
    quant = result["quantization_config"]
    target = quant["target"]["gpu"] or quant["target"]["arch"] or "no GPU in particular"
    lines = [
        f"{result['path']}: {result['architecture']}, {format_bytes(result['bytes'])}",
        f"  {result['format']}, group {quant['group_size']}, transform {quant['transform']}, "
        f"recipe {quant['recipe']}, layout {quant['layout']}, for {target}",
    ]
    width = max(len(linear["name"]) for linear in result["linears"])
    for linear in result["linears"]:
        shape = " x ".join(map(str, linear["shape"] or ()))
        how = f"group {linear['group_size']} {linear['transform']}" if linear["quantized"] else "not quantized"
        if linear["activation_bits"] not in (None, BITS):
            how += f" A{linear['activation_bits']}"
        error = f"output error {linear['error']:.4f}" if linear["error"] is not None else ""
        if "fallback" in linear:
            error += f"  {linear['fallback']} ({linear['calibration_tokens']} tokens of its own)"
        lines.append(
            f"  {linear['name']:{width}}  {shape:>15}  {how:21}  {format_bytes(linear['bytes']):>9}  {error}".rstrip()
        )
    lines.append(f"  everything else: {format_bytes(result['bytes_other'])}")
    shared = sum("fallback" in linear for linear in result["linears"])
    if shared:
        lines.append(
            f"  {shared} linears of experts that few calibration tokens reached were quantized with shared statistics: "
            "more --samples give more experts statistics of their own"
        )
    return "\n".join(lines)
