"""Float models of every architecture, and single layers of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from apex4_quant.models.families import InputGroup
from apex4_quant.models.layer_runner import LayerRunner
from apex4_quant.models.source import ModelSource
from apex4_quant.recipes import Recipe
from apex4_quant.transforms.function_preserving import merged_by_norm


def _zoo() -> ModuleType:
    """The models of test_families.py; under --import-mode=importlib test files do not see each other."""
    spec = importlib.util.spec_from_file_location(
        "apex4_test_zoo", Path(__file__).parents[1] / "models" / "test_families.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ZOO = _zoo()
GEMMAS = ("gemma2", "gemma3", "gemma3 vision")
# Whose language models are those of other families, layer by layer.
WITH_VISION = ("mistral3", "gemma3 vision")
ROTATABLE = [name for name in ZOO.MODELS if name not in (*GEMMAS, "olmo2")]
ROTATED, BALANCED = Recipe("rotated", "", rotation=True), Recipe("balanced", "", diagonal=0.25)
BOTH = Recipe("both", "", rounding="gptq", rotation=True, diagonal=0.25)

# Float32 rounds at 6e-8, relative to a product's terms; the roundings of a product of width K <= 400 add up at random to
# about sqrt(K) / 2 of one where terms cancel as sqrt(K) do, so 6e-7 relative to the result. The some twenty products that
# a value passes (rotations and two layers) make that 3e-6, also at random; measured 2.6e-6. A tensor that is not
# folded changes outputs by ten percent.
SAME, BROKEN = 1e-5, 5e-2


@pytest.fixture
def float_model(tmp_path: Path) -> Callable[..., ModelSource]:
    """float_model(name, dtype=float32) -> a model of test_families.py in that dtype."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> ModelSource:
        folder = tmp_path / str(dtype)
        ZOO.write_model(folder, name).to(dtype).save_pretrained(folder)
        return ModelSource(str(folder))

    return make


def runner_of(source: ModelSource, seq_len: int = 48) -> LayerRunner:
    runner = LayerRunner(source, "cpu", torch.float32)
    runner.prepare(seq_len)
    return runner


def relative_tensors(source: ModelSource, index: int) -> dict[str, torch.Tensor]:
    prefix = source.family.layer_prefix(index)
    tensors = source.read(source.layer_tensors(index))
    return {name.removeprefix(prefix): tensor.float() for name, tensor in tensors.items()}


def output_of(
    runner: LayerRunner, source: ModelSource, index: int, relative: dict[str, torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    prefix = source.family.layer_prefix(index)
    runner.load_layer(index, {prefix + name: tensor.clone() for name, tensor in relative.items()})
    return runner.run_layer(index, hidden)


def random_hidden(source: ModelSource) -> torch.Tensor:
    """[2, 48, hidden]; every channel at a strength of its own, as in real models."""
    generator = torch.Generator().manual_seed(5)
    width = source.config["hidden_size"]
    return torch.randn(2, 48, width, generator=generator) * torch.rand(width, generator=generator).mul(2).exp()


def difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def groups_of(source: ModelSource, index: int) -> list[InputGroup]:
    return merged_by_norm(source.family.groups(source.config, index))
