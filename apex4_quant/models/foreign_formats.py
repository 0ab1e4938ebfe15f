"""Names for what others have quantized, from config.json, file names and tensor names.

A folder whose config.json lost its `quantization_config`, or never had one, would else be reported as incomplete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..format.tensor_info import TensorInfo

# Where config.json of other tools says what was done, besides `quantization_config`.
_CONFIG_KEYS = {"compression_config": "compressed-tensors", "quantization": "MLX"}
# Files that stand beside such weights and nowhere else.
_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
}
# Ends of tensor names that only this format has. The first that fits is the answer.
_ENDS = (
    (".g_idx", "GPTQ"),
    (".W_q", "HQQ"),
    (".codebooks", "AQLM"),
    (".q_weight", "EXL2"),
    (".trellis", "EXL3"),
    (".Qidxs", "QuIP#"),
    (".SCB", "bitsandbytes"),
    (".absmax", "bitsandbytes"),
    (".quant_state.bitsandbytes__nf4", "bitsandbytes"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes"),
    (".weight._data", "quanto"),
    (".weight_shape", "compressed-tensors"),
    (".weight_scale_inv", "FP8"),
    (".weight_scale_2", "ModelOpt"),
    (".input_transform", "apex4"),
)


def foreign_format(folder: Path, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> str | None:
    """The name of the format in which the weights of a folder are quantized; None where none is recognised."""
    section = config.get("quantization_config")
    if section:
        return str(section.get("quant_method", "some method"))
    for key, name in _CONFIG_KEYS.items():
        if config.get(key):
            return name
    return _of_tensors(infos) or next((name for file, name in _FILES.items() if (folder / file).is_file()), None)


def _of_tensors(infos: Mapping[str, TensorInfo]) -> str | None:
    for end, name in _ENDS:
        if any(tensor.endswith(end) for tensor in infos):
            return name
    for tensor, info in infos.items():
        stem, _, part = tensor.rpartition(".")
        scale = infos.get(f"{stem}.scales")
        if part == "qweight":  # 4-bit codes are packed along K by GPTQ (N columns, as many as scales), along N by AWQ
            along_k = scale is not None and info.shape[-1:] == scale.shape[-1:]
            return "GPTQ" if along_k else "AWQ"
        if part == "weight_packed":
            return "apex4" if info.dtype == "U8" and len(info.shape) == 3 else "compressed-tensors"
        if part == "weight" and info.dtype == "U32" and scale is not None:
            return "MLX"
        if part == "weight_scale":
            return "FP8" if getattr(infos.get(f"{stem}.weight"), "dtype", "").startswith("F8") else "compressed-tensors"
    return None
