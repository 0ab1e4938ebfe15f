"""The benchmark without a GPU: what it refuses, what it prints, and that nothing is left out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apex4_quant.errors import UsageError
from apex4_quant.hardware.gpus import GPUS
from apex4_quant.tools import bench
from apex4_quant.tools.bench import SHAPES, TOKENS, BenchSettings, Row
from apex4_quant.tools.pictures import save_picture

ONE_FUSED_LAYER = {"qkv", "o", "gate_up", "down"}


class Clock:
    """In the place of bench.Timer: runs the call, and says a time."""

    eager = True

    def seconds(self, call: Callable[[], Any], capture: bool = True) -> float:
        call()
        return 1e-3


def test_shapes_are_those_of_the_models() -> None:
    for layers in SHAPES.values():
        assert set(layers) == ONE_FUSED_LAYER
        hidden = layers["o"][0]
        assert layers["qkv"][1] == layers["gate_up"][1] == hidden and layers["down"][0] == hidden
        assert layers["gate_up"][0] == 2 * layers["down"][1]
    assert BenchSettings().rows() == TOKENS
    names = BenchSettings().layers()
    assert len({(n, k) for _, n, k in names}) == len(names) == 15  # o of the 7B and the 8B are one


def test_filters() -> None:
    settings = BenchSettings(shapes=("Llama-3-8B:down", "4096x4096"), tokens=(3,), contenders=("bf16",))
    assert settings.layers() == [("Llama-3-8B down", 4096, 14336), ("", 4096, 4096)] and settings.rows() == (3,)
    quick = BenchSettings(quick=True)
    assert len(quick.layers()) == 3 and quick.rows() == (1, 16, 2048, 8192)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (BenchSettings(shapes=("Llama-9",)), "'Llama-9' is not known.*Llama-3-8B"),
        (BenchSettings(shapes=("Llama-3-8B:head",)), "'Llama-3-8B:head' is not known"),
        (BenchSettings(tokens=(0,)), "at least 1"),
        (BenchSettings(contenders=("cutlass",)), "'cutlass' is not known.*humming-w4a4"),
    ],
)
def test_refusals(settings: BenchSettings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings.check()


def test_tokens_are_numbers() -> None:
    assert bench.parse_tokens("1, 16,") == (1, 16)
    with pytest.raises(UsageError, match="'x' is no number of tokens"):
        bench.parse_tokens("1,x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(invoke: Callable[..., Any], one_sentence: Callable[..., str]) -> None:
    one_sentence(invoke("bench", "--quick"), 1, "bench needs an NVIDIA GPU")
    one_sentence(invoke("bench", "--m", "x"), 2, "no number of tokens")
    one_sentence(invoke("bench", "--shapes", "x"), 2, "shape 'x'")


def test_floors() -> None:
    memory, tensor = bench.floors(GPUS["A100"], 4096, 4096, 4096)
    assert tensor == pytest.approx(2 * 4096**3 / 1248e12)
    assert memory == pytest.approx((4096 * 4096 * (1 + 6 / 128) + 2 * 4096**2) / 2039e9)


def test_a_contender_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(weight: torch.Tensor) -> dict[str, Any]:
        return {"apex4": lambda x: lambda: 2 * (x @ weight.t()), "apex4+q": lambda x: lambda: 1 / 0}

    monkeypatch.setitem(bench._FAMILIES, "apex4", half)
    settings = BenchSettings(tokens=(2,), contenders=("apex4", "apex4+q", "bf16", "humming-w4a4"))
    (row,) = bench._bench_layer("layer", 64, 128, settings, torch.device("cpu"), Clock(), GPUS["H200"])  # type: ignore[arg-type]
    assert row.seconds == {"bf16": 1e-3} and row.errors["bf16"] == 0
    assert row.gaps["apex4"] == "wrong result (relative error 1)"
    assert row.gaps["apex4+q"].startswith("ZeroDivisionError") and "not installed" in row.gaps["humming-w4a4"]
    text = bench.row_as_text(row, settings.contenders)
    assert "1000.0 0 1.00x" in text and "bf16: timed without a CUDA graph" in text and text.count("\n") == 4
    assert row.as_dict()["gaps"] == row.gaps and json.dumps(row.as_dict())


@pytest.mark.parametrize(("capability", "k"), [((8, 6), 256), ((8, 6), 320), ((9, 0), 320)])
def test_the_caller_of_our_operators(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], k: int) -> None:
    """What a GPU would be given, computed by the operators' CPU implementation: weights, formats, padding of K."""
    pytest.importorskip("apex4_quant.kernels.ops")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    settings = BenchSettings(tokens=(5,), contenders=("apex4", "apex4+q", "bf16"))
    with torch.inference_mode():
        (row,) = bench._bench_layer("layer", 192, k, settings, torch.device("cpu"), Clock(), None)  # type: ignore[arg-type]
    assert row.gaps == {} and row.errors["apex4"] == row.errors["apex4+q"]
    assert 0.1 < row.errors["apex4"] < bench.MAX_ERROR["apex4"]


def test_report() -> None:
    rows = [
        Row("a", m, 64, 128, {"bf16": 4e-6, "apex4": 2e-6, "apex4+q": s}, memory_floor=1e-6, tensor_floor=5e-7)
        for m, s in ((1, 1e-6), (1, 4e-6), (16, 8e-6))
    ]
    assert rows[0].as_dict()["of_floor"] == {"apex4": 0.5, "apex4+q": 1.0}
    by_m = bench.means(rows, ("apex4", "apex4+q", "bf16", "fp8"))
    assert by_m == {"1": {"apex4": 2.0, "apex4+q": 2.0}, "16": {"apex4": 2.0, "apex4+q": 0.5}}
    result = {"gpu": "GPU", "torch": "2", "cuda": "13", "geometric_mean_speedup": by_m}
    assert "apex4+q 0.50x" in bench.as_text(result)
    assert "50%" in bench.row_as_text(rows[0], ("apex4",)) and "apex4" in bench.header(("apex4",))


def test_pictures(tmp_path: Path) -> None:
    """A picture shows what was measured, in the format of its name, byte for byte the same when drawn again."""
    by_m = {"1": {"apex4": 2.0, "fp8": 1.5}, "16": {"apex4": 3.0}}
    result = {"gpu": "GPU", "geometric_mean_speedup": by_m}
    lines = {str(line.get_label()): line for line in bench.draw(result).axes[0].get_lines()}
    assert list(lines["apex4"].get_ydata()) == [2.0, 3.0] and list(lines["fp8"].get_xdata()) == [0]
    first, second, png = (tmp_path / name for name in ("a.svg", "b.svg", "c.png"))
    for path in (first, second, png):
        save_picture(path, lambda: bench.draw(result))
    assert first.read_bytes() == second.read_bytes()
    assert ">apex4</text>" in first.read_text("utf-8") and png.read_bytes().startswith(b"\x89PNG")
    save_picture(first, lambda: bench.draw(result | {"geometric_mean_speedup": {}}))  # nothing could be timed


def test_a_picture_that_cannot_be_written_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Callable[..., Any], one_sentence: Callable[..., str]
) -> None:
    one_sentence(invoke("bench", "--plot", "speed.jpg"), 2, "written as .svg or .png, not 'speed.jpg'")
    one_sentence(invoke("bench", "--plot", tmp_path / "absent" / "speed.svg"), 2, "its folder does not exist")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    one_sentence(invoke("bench", "--plot", "speed.svg"), 1, "pip install 'apex4-quant[plot]'")
