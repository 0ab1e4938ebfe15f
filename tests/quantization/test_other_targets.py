"""A checkpoint for one GPU that is made on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.errors import Apex4Error
from apex4_quant.format.layout_name import LayoutName
from apex4_quant.format.layouts import get_layout
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.quantization import run

from ..conftest import write_tiny_model


@pytest.mark.parametrize(("target", "here"), [("RTX 3090", LayoutName.SM90), ("none", LayoutName.SM80)])
def test_the_layout_of_the_gpu_that_quantizes_is_not_the_checkpoints(
    target: str, here: LayoutName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears that computed have their tensors in the order of this GPU's kernels, while the layer is still being written."""
    settings = QuantizeSettings(
        str(write_tiny_model(tmp_path / "model")), recipe="rtn", samples=2, seq_len=32, target=target, device="cpu"
    )
    quantize(settings, tmp_path / "plain")
    forward, moved = Apex4Linear.forward, set()

    def as_on_a_gpu(self: Apex4Linear, x: Any) -> torch.Tensor:
        layout = get_layout(here)
        if self.layout.name != layout.name:
            packed, scale = layout.pack(self.codes()), layout.pack_scales(self.scales())
            self.weight_packed = nn.Parameter(packed, requires_grad=False)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)
            self.layout = layout
            moved.add(id(self))
        return forward(self, x)

    monkeypatch.setattr(Apex4Linear, "forward", as_on_a_gpu)
    quantize(settings, tmp_path / "moved")
    assert moved
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "moved" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
@pytest.mark.parametrize("layout", [LayoutName.ROWMAJOR, LayoutName.SM80, LayoutName.SM90])
def test_a_shard_that_holds_something_else_than_was_rounded_is_not_committed(
    part: str, layout: LayoutName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=2)
    settings = QuantizeSettings(str(model), recipe="rtn", samples=2, seq_len=32, layout=layout, device="cpu")
    quantize(settings, tmp_path / "plain")
    name, written = f"model.layers.1.mlp.down_proj.{part}", run.write_tensors

    def damage(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if name in tensors:
            tensors = tensors | {name: tensors[name].flatten().roll(1).view_as(tensors[name])}
        written(path, tensors)

    monkeypatch.setattr(run, "write_tensors", damage)
    with pytest.raises(Apex4Error, match=r"^model.layers.1.mlp.down_proj has other codes or scales in model-00003-of-"):
        quantize(settings, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.undo()
    quantize(settings, tmp_path / "out", resume=True)
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
