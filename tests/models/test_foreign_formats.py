"""What others have quantized is named, also where config.json does not say it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Call = Callable[..., Any]  # the fixtures of conftest.py
USAGE = 2
INT4 = {"qweight": (16, 128), "qzeros": (1, 16), "scales": (1, 128)}  # of a linear [128, 128]: GPTQ's order
Tensors = dict[str, torch.Tensor]


def packed(shapes: dict[str, tuple[int, ...]], **more: torch.Tensor) -> Tensors:
    return {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()} | more


# What stands for the weight [N, K] of a linear, after its name.
TENSORS: dict[str, tuple[str, Tensors]] = {
    "GPTQ": ("GPTQ", packed(INT4, g_idx=torch.zeros(128, dtype=torch.int32))),
    "GPTQ without g_idx": ("GPTQ", packed(INT4)),
    "AWQ": ("AWQ", packed(INT4 | {"qweight": (128, 16)})),
    "compressed-tensors": (
        "compressed-tensors",
        {
            "weight_packed": torch.zeros(128, 16, dtype=torch.int32),
            "weight_scale": torch.ones(128, 1),
            "weight_shape": torch.tensor([128, 128]),
        },
    ),
    "compressed-tensors of 8 bits": (
        "compressed-tensors",
        {"weight": torch.zeros(128, 128, dtype=torch.int8), "weight_scale": torch.ones(128, 1)},
    ),
    "FP8": ("FP8", {"weight": torch.zeros(128, 128).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)}),
    "FP8 of blocks": (
        "FP8",
        {"weight": torch.zeros(128, 128).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
    ),
    "bitsandbytes": (
        "bitsandbytes",
        {"weight": torch.zeros(8192, 1, dtype=torch.uint8), "weight.absmax": torch.ones(256)},
    ),
    "MLX": (
        "MLX",
        {
            "weight": torch.zeros(128, 16, dtype=torch.uint32),
            "scales": torch.ones(128, 2),
            "biases": torch.ones(128, 2),
        },
    ),
    "HQQ": ("HQQ", {"W_q": torch.zeros(64, 128, dtype=torch.uint8)}),
}


def replace_linears(folder: Path, stored: Tensors) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        del tensors[name]
        tensors |= {f"{name.removesuffix('weight')}{part}": value.clone() for part, value in stored.items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case: str, tiny_model: Call, quantize_badly: Call, invoke: Call, one_sentence: Call) -> None:
    name, stored = TENSORS[case]
    folder = tiny_model()
    replace_linears(folder, stored)
    one_sentence(quantize_badly(folder), USAGE, f"already quantized ({name})", "16-bit")
    one_sentence(invoke("eval", folder, "--json", "--limit", 1), USAGE, f"is quantized ({name})")
    one_sentence(invoke("check", folder, "--json"), USAGE, f"is quantized ({name})")


@pytest.mark.parametrize(
    ("file", "name"), [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("quanto_qmap.json", "quanto")]
)
def test_files(file: str, name: str, tiny_model: Call, quantize_badly: Call, one_sentence: Call) -> None:
    folder = tiny_model()
    (folder / file).write_text("{}")
    one_sentence(quantize_badly(folder), USAGE, f"already quantized ({name})")


def test_keys_of_config(tiny_model: Call, quantize_badly: Call, one_sentence: Call) -> None:
    folder = tiny_model()
    config = json.loads((folder / "config.json").read_text())
    for key, name in (("compression_config", "compressed-tensors"), ("quantization", "MLX")):
        (folder / "config.json").write_text(json.dumps(config | {key: {"bits": 4}}))
        one_sentence(quantize_badly(folder), USAGE, f"already quantized ({name})")


def test_ours_without_its_section(
    demo_checkpoint: Path, tmp_path: Path, quantize_badly: Call, invoke: Call, one_sentence: Call
) -> None:
    folder = Path(shutil.copytree(demo_checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    one_sentence(quantize_badly(folder), USAGE, "already quantized (apex4)")
    for command in ("eval", "check", "inspect"):
        one_sentence(invoke(command, folder, "--json"), USAGE, "is quantized (apex4)", "config.json")
