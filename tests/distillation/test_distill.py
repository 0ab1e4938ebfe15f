"""Distillation of the bundled model: it helps, what is stored is what was learned, and a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apex4_quant import quantize
from apex4_quant.checkpoint.check import check
from apex4_quant.distillation.error_moments import error_moments
from apex4_quant.distillation.own_text import write_windows
from apex4_quant.distillation.trained_linear import TrainedInput, TrainedLinear
from apex4_quant.errors import Stopped, UsageError
from apex4_quant.evaluation.evaluate import EvalSettings, evaluate
from apex4_quant.format.feedback import block_clips_of, feedback_of
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.storage import sha256
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.progress import Progress
from apex4_quant.quantization import distilling
from apex4_quant.quantization.settings import QuantizeSettings

RECIPE: dict[str, Any] = {"name": "short", "rounding": "gptq", "search_clip": True, "distill_steps": 6}
TEXT = {"samples": 24, "seq_len": 64}


def settings(model: Path | str = "demo", **changes: Any) -> QuantizeSettings:
    return QuantizeSettings(str(model), RECIPE | changes, target="none", device="cpu", **TEXT)


@pytest.fixture(scope="module")
def few_tokens() -> Any:
    """Steps of four windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apex4_quant.distillation.distill.STEP_TOKENS", 4 * 64)
        yield


@pytest.fixture(scope="module")
def pair(few_tokens: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("distill"), "dense128", 24)


def make_pair(folder: Path, transform: str, steps: int) -> tuple[Path, Path]:
    """The same run without distillation and with it."""
    for name, count in (("before", 0), ("after", steps)):
        quantize(settings(transform=transform, transform_steps=2, distill_steps=count), folder / name)
    return folder / "before", folder / "after"


def test_the_predictions_come_nearer(pair: tuple[Path, Path]) -> None:
    before, after = (
        evaluate(EvalSettings(str(out), "demo", seq_len=64, limit=24, device="cpu"))["divergence"] for out in pair
    )
    assert after < before  # on other text: by 2 to 4 %, as rounding falls
    report = json.loads((pair[1] / "apex4_report.json").read_text())["distillation"]
    assert report["steps"] == 24 and report["tokens"] == 24 * 4 * 64
    assert report["divergence_after"] < report["divergence_before"]
    assert report["tokens_of_text"] == [
        (24 * 4 + 32 - 8) * 64
    ]  # more windows than calibration takes; every 16th is held out


@pytest.fixture(scope="module")
def pair_with_feedback(few_tokens: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("distill"), "feedback128x16", 12)


def test_error_feedback_is_worked_out_anew(pair_with_feedback: tuple[Path, Path]) -> None:
    """And it is what the student was measured with."""
    before, after = pair_with_feedback
    quality = [
        evaluate(EvalSettings(str(out), "demo", seq_len=64, limit=24, device="cpu"))["divergence"]
        for out in (before, after)
    ]
    name = "model.layers.0.self_attn.q_proj.input_transform"
    stored = [
        next(load_file(file)[name] for file in sorted(out.glob("*.safetensors")) if name in load_file(file))
        for out in (before, after)
    ]
    assert stored[0].shape == stored[1].shape == (2, 185, 128)
    for matrix in stored:
        feedback = feedback_of(matrix.float())
        assert bool((feedback.abs().amax((1, 2)) > 0.02).all())
    assert not torch.equal(stored[0][:, 128:184], stored[1][:, 128:184])
    clips = [block_clips_of(matrix.float()) for matrix in stored]
    assert bool(((clips[1] / clips[0]).log().abs() < 0.05).all()), clips
    assert quality[1] < quality[0]
    check(str(after))
    report = json.loads((after / "apex4_report.json").read_text())["distillation"]
    assert report["divergence_after"] < report["divergence_before"]
    without = after.parent / "without"
    shutil.copytree(after, without)
    for file in without.glob("*.safetensors"):
        tensors = load_file(file)
        for key in tensors:
            if key.endswith("input_transform"):
                tensors[key][:, 128:184] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    (without / "apex4_report.json").unlink()
    assert (
        evaluate(EvalSettings(str(without), "demo", seq_len=64, limit=24, device="cpu"))["divergence"]
        > 1.1 * quality[1]
    )


def test_error_moments_are_those_of_the_gradients() -> None:
    """Of a student of one linear, whose gradients are known: the logits' times the weights, by blocks."""
    torch.manual_seed(0)
    format = LinearFormat(40, 200, 128, get_layout("rowmajor"), TransformKind.FEEDBACK, 1.0)
    matrix = torch.cat((torch.linalg.qr(torch.randn(2, 128, 128))[0], torch.zeros(2, 56, 128)), 1).half()
    codes, scales = torch.randint(-7, 8, (40, 256)).to(torch.int8), torch.full((40, 2), 0.01).half()

    class One:
        def __init__(self) -> None:
            self.input = TrainedInput(format, matrix, torch.device("cpu"))
            self.linear = TrainedLinear(format, self.input, codes, scales, torch.randn(40, 200), None)
            self.states = torch.randn(50, 200)

        def logits_and_inputs(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            self.input.keeps_unrounded = True
            logits = self.linear(self.states[ids])
            return logits, {"one": self.input.unrounded}

        def forget(self) -> None:
            self.input.forget()

    student, ids = One(), torch.randint(50, (40, 30))
    found = error_moments(student, ids, 4, 3)["one"]  # type: ignore[arg-type]
    assert found.shape == (2, 128, 128) and found.dtype == torch.float64
    assert torch.equal(found, found.transpose(1, 2))
    # The mean over draws of g g^T is W^T (diag p - p p^T) W; of 1200 tokens, their sum, to within sampling.
    weight = (codes * 0.01).double()
    with torch.no_grad():
        scores = student.linear(student.states[ids]).double().flatten(0, 1)
    likely = torch.softmax(scores, -1)
    expected = weight.t() @ (torch.diag(likely.sum(0)) - likely.t() @ likely) @ weight
    for block in range(2):
        part = slice(128 * block, 128 * block + 128)
        assert float((found[block] - expected[part, part]).norm() / expected[part, part].norm()) < 0.25


def test_the_checkpoint_is_whole(pair: tuple[Path, Path]) -> None:
    check(str(pair[1]))
    assert not (pair[1] / ".apex4-run").exists()


class Lines(Progress):
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def line(self, text: str) -> None:
        self._lines.append(text)


class Stop:
    """Says yes when it is asked for the n-th time."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("transform", ["hadamard128", "feedback128", "feedback128x16"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    transform: str, few_tokens: None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    asked = settings(tiny_model(), transform=transform, transform_steps=2)
    quantize(asked, tmp_path / "whole")
    stop = Stop(2 + 3)  # two layers, three steps
    with pytest.raises(Stopped, match="steps of distillation"):
        quantize(asked, tmp_path / "parts", should_stop=stop)
    quantize(asked, tmp_path / "parts", resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert sha256(path) == sha256(tmp_path / "parts" / path.name), path.name


def test_a_kill_while_shards_are_replaced_is_made_up_for(
    few_tokens: None, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tiny_model())
    quantize(asked, tmp_path / "whole")
    written, write = [], distilling.write_tensors

    def killed(path: Path, tensors: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tensors)

    monkeypatch.setattr(distilling, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, tmp_path / "parts")
    monkeypatch.setattr(distilling, "write_tensors", write)
    quantize(asked, tmp_path / "parts", resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert sha256(path) == sha256(tmp_path / "parts" / path.name), path.name


OWN: dict[str, Any] = {"distill_own_tokens": 40 * 64}


def test_it_learns_on_text_that_the_original_writes(
    few_tokens: None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    lines: list[str] = []
    quantize(settings(tiny_model(), **OWN), tmp_path / "whole", progress=Lines(lines))
    report = json.loads((tmp_path / "whole" / "apex4_report.json").read_text())["distillation"]
    # Half of what the steps read, and what may be held out of it, is calibration text.
    assert report["tokens_of_text"] == [(12 + 32 - 2) * 64, (40 - 2) * 64]
    assert any(f"{40 * 64} tokens of text that the original model writes" in line for line in lines)
    # Stopped while it writes, in the sixth step and not at all it ends with the same bytes.
    for asked in (2 + 10, 2 + 63 + 63 + 5):
        with pytest.raises(Stopped):
            quantize(settings(tiny_model(), **OWN), tmp_path / f"{asked}", should_stop=Stop(asked))
        quantize(settings(tiny_model(), **OWN), tmp_path / f"{asked}", resume=True)
        for path in (tmp_path / "whole").glob("*.safetensors"):
            assert sha256(path) == sha256(tmp_path / f"{asked}" / path.name), (asked, path.name)


def test_own_text_is_drawn_from_the_predictions(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    starts = torch.tensor([5, 6, 7]).repeat(30)
    windows = write_windows(model, starts, 12, 3, [1])
    assert windows is not None and windows.shape == (90, 12)
    assert torch.equal(windows[:, 0], torch.ones(90, dtype=torch.int64)) and torch.equal(windows[:, 1], starts)
    assert torch.equal(windows, write_windows(model, starts, 12, 3, [1]))
    assert not torch.equal(windows, write_windows(model, starts, 12, 4, [1]))
    with torch.no_grad():  # as probable as what a model draws is: its entropy
        log_p = model(input_ids=windows).logits[:, 1:-1].double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    surprise = -log_p.gather(-1, windows[:, 2:, None]).mean()
    assert abs(surprise - entropy) < 0.1 * entropy
    stop = Stop(4)
    assert write_windows(model, starts, 12, 3, [1], stop=stop) is None and stop.left == -1


def test_one_window_is_too_few(few_tokens: None, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    asked = QuantizeSettings(str(tiny_model()), RECIPE, target="none", device="cpu", samples=1, seq_len=16)
    with pytest.raises(UsageError, match="distillation needs two calibration windows"):
        quantize(asked, tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("distill_own_tokens: 5", "distill_own_tokens = 5 and no steps of distillation: add distill_steps"),
        ("distill_steps: 5\ndistill_own_tokens: -1", "distill_own_tokens = -1: give a whole number from 0"),
        ("distill_steps: 5\ndistill_own_tokens: 1.5", "distill_own_tokens = 1.5: give a whole number"),
    ],
)
def test_wrong_keys(keys: str, said: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"rounding: gptq\n{keys}\n")
    result = invoke("quantize", "demo", "--recipe", recipe, "--dry-run")
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("key", ["rotation: true", "diagonal: 0.25"])
def test_what_excludes_it(key: str, tmp_path: Path, invoke: Callable[..., Result]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"rounding: gptq\ndistill_steps: 5\n{key}\n")
    result = invoke("quantize", "demo", "--recipe", recipe, "--dry-run")
    assert result.exit_code == 2 and f"distill_steps and '{key}', which exclude each other" in result.stderr
