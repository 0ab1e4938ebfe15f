"""`apex4 repack`: the same bytes as quantizing for the new target, whatever the two layouts; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from apex4_quant.checkpoint.repack import repack
from apex4_quant.format.storage import new_folder

Call = Callable[..., Any]
SMALL = ("--samples", 2, "--seq-len", 32, "--recipe", "gptq", "--transform", "dense128", "--json")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def quantized(tiny_model: Call, calib: Path, tmp_path: Path, invoke: Call) -> Callable[..., Path]:
    """quantized(target, ...) -> a model of ragged shapes, quantized for that target."""
    made: dict[str, Path] = {}

    def make(target: str, *options: object) -> Path:
        if target not in made:
            model = tmp_path / "ragged" if made else tiny_model("ragged", intermediate_size=200)
            out = made[target] = tmp_path / f"direct {target}"
            ignored = ("--ignore", "layers.0.self_attn.k_proj", "--calib", calib, "--target", target)
            assert invoke("quantize", model, "-o", out, *SMALL, *ignored, *options).exit_code == 0
        return made[target]

    return make


def test_repacking_is_quantizing_for_the_other_target(quantized: Call, tmp_path: Path, invoke: Call) -> None:
    targets = ("none", "RTX 3090", "H200")
    direct = {target: contents(quantized(target)) for target in targets}
    assert len({files["model-00002-of-00004.safetensors"] for files in direct.values()}) == 3
    for source, target in (("none", "H200"), ("H200", "RTX 3090"), ("RTX 3090", "none"), ("H200", "H200")):
        out = tmp_path / f"{source} to {target}"
        result = invoke("repack", quantized(source), "-o", out, "--target", target, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert (found["output"], found["target"], found["linears"]) == (str(out), target, 13)
        got = contents(out)
        assert got.keys() == direct[target].keys()
        for name, data in direct[target].items():
            assert got[name] == data, f"{source} to {target}: {name}"
    assert invoke("check", tmp_path / "none to H200", "--json").exit_code == 0


def test_a_checkpoint_in_one_file_without_a_report(quantized: Call, tmp_path: Path) -> None:
    source, single = quantized("none"), tmp_path / "single"
    single.mkdir()
    shards = [load_file(path) for path in sorted(source.glob("*.safetensors"))]
    save_file({n: t for shard in shards for n, t in shard.items()}, single / "model.safetensors")
    shutil.copy(source / "config.json", single)
    (single / "chat_template.jinja").write_text("kept")
    repack(str(single), tmp_path / "out", "H100")
    assert sorted(contents(tmp_path / "out")) == ["chat_template.jinja", "config.json", "model.safetensors"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    direct = [load_file(path) for path in sorted(quantized("H200").glob("*.safetensors"))]
    for name, tensor in ((n, t) for shard in direct for n, t in shard.items()):
        assert stored[name].equal(tensor), name
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["layout"] == "sm90" and section["target"] == {"gpu": "H100", "arch": "sm_90"}


def test_refusals(quantized: Call, tmp_path: Path, invoke: Call, one_sentence: Call) -> None:
    source = quantized("none")
    out = tmp_path / "out"
    one_sentence(invoke("repack", source, "-o", out, "--target", "H20", "--json"), 2, "'H20'", "H200")
    one_sentence(invoke("repack", source, "-o", source, "--target", "H200", "--json"), 2, str(source), "not empty")
    one_sentence(invoke("repack", tmp_path / "ragged", "-o", out, "--target", "H200", "--json"), 2, "not quantized")
    one_sentence(invoke("repack", tmp_path / "nothing", "-o", out, "--target", "H200", "--json"), 2, "does not exist")
    one_sentence(invoke("repack", source, "-o", source / "sub", "--target", "H200", "--json"), 2, "would be published")
    assert not out.exists() and not (source / "sub").exists()
    with new_folder(out):  # as another process does
        one_sentence(
            invoke("repack", source, "-o", out, "--target", "H200", "--json"), 1, str(out), "another apex4 process"
        )
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    shard = damaged / "model-00003-of-00004.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("up_proj.weight_packed"))
    tensors[name].view(-1)[5] = 0x18
    save_file(tensors, shard, metadata={"format": "pt"})
    one_sentence(invoke("repack", damaged, "-o", out, "--target", "H200", "--json"), 1, shard.name, "checksum")
    (damaged / "apex4_report.json").unlink()
    one_sentence(invoke("repack", damaged, "-o", out, "--target", "H200", "--json"), 1, name, "-8")
    assert list(out.iterdir()) == []
