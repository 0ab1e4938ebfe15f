"""What transformers reads of the original and is no weight is there afterwards; what stays behind is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex4_quant.models.companions import companions_of, left_behind_as_text
from apex4_quant.models.tokenizers import load_tokenizer

Call = Callable[..., Any]  # the fixtures of conftest.py
TAKEN = (
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "custom_generate/generate.py",
    "LICENSE.txt",
    "USE_POLICY.md",
    "bpe.codes",
    "configuration_custom.py",
    "generation_config.json",
    "prophetnet.tokenizer",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "source.spm",
    "tekken.json",
    "video_preprocessor_config.json",
    "vocab-src.json",
)
LEFT = (
    "README.md", "all_results.json", "checksums.json", "figures/loss.png", "original/params.json", "params.json", "plot.PNG",
    "trainer_state.json",
)  # fmt: skip
WEIGHTS = (
    "consolidated.00.pth", "model.gguf", "onnx/model.onnx", "optimizer.pt", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "tf_model.h5",
)  # fmt: skip
HIDDEN = (".gitattributes", ".cache/huggingface/download/config.json.metadata", "model.tmp", "x.lock")
SMALL = ("--samples", 2, "--seq-len", 32, "--target", "none", "--recipe", "rtn")


@pytest.fixture
def crowded(tiny_model: Call) -> Path:
    folder = tiny_model()
    for name in TAKEN + LEFT + WEIGHTS + HIDDEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else f"this is {name}: {{{{ messages[0].content }}}}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_quantize_and_repack_take_everything_over(crowded: Path, calib: Path, tmp_path: Path, invoke: Call) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    result = invoke("quantize", crowded, "-o", out, "--calib", calib, *SMALL)
    assert result.exit_code == 0
    assert f"left behind in {crowded}, as nothing that loads the model reads it: {', '.join(LEFT)}" in result.stderr
    before, after = files(crowded), files(out)
    # The tokenizer's own files came with the model.
    expected = {*TAKEN, "tokenizer.json", "tokenizer_config.json"}
    ours = {"config.json", "apex4_report.json", "model.safetensors.index.json"}
    assert {name for name in after if not name.endswith(".safetensors")} == expected | ours
    assert all(after[name] == before[name] for name in expected)
    (out / "README.md").write_text("a card")
    (out / "apex4_pictures").mkdir()
    (out / "apex4_pictures" / "errors.png").write_text("a picture")
    (out / "apex4_evaluation.json").write_text("{}")
    result = invoke("repack", out, "-o", again, "--target", "H200")
    assert result.exit_code == 0 and "apex4_evaluation.json stays behind" in result.stderr
    repacked = files(again)
    assert set(repacked) == set(after) | {"README.md", "apex4_pictures/errors.png"}
    assert all(repacked[name] == before[name] for name in expected)
    for folder in (crowded, out, again):
        tokenizer = load_tokenizer(folder)
        messages = [{"role": "user", "content": "hello"}]
        said = tokenizer.apply_chat_template(messages, chat_template="tool_use", tokenize=False)
        assert said == "this is additional_chat_templates/tool_use.jinja: hello"


def test_what_was_left_behind_is_in_the_result(crowded: Path, calib: Path, tmp_path: Path, invoke: Call) -> None:
    result = invoke("quantize", crowded, "-o", tmp_path / "out", "--calib", calib, *SMALL, "--json")
    assert json.loads(result.stdout)["left_behind"] == sorted(LEFT) == companions_of(crowded)[1]


def test_many_names_are_cut() -> None:
    names = [f"{number}.png" for number in range(10)]
    assert left_behind_as_text(Path("m"), names).endswith(
        "reads it: 0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png and 2 more"
    )
