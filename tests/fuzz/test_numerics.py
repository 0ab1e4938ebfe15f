"""Random small models of all families, with outliers, dead channels and biases, through several recipes.

What comes out is finite, passes `apex4 check`, and is at most 1.2 times as far from the original as the plainest quantization
of the same model, written here by hand: every group of 128 weights and activations, as it is or times Hadamard's matrix, is
divided by its largest over 7.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from transformers import AutoModelForCausalLM

from apex4_quant.calib.text import load_text
from apex4_quant.checkpoint.check import check
from apex4_quant.models.families import FAMILIES
from apex4_quant.models.place import DEMO_PATH
from apex4_quant.models.tokenizers import load_tokenizer
from apex4_quant.quantization.run import quantize
from apex4_quant.quantization.settings import QuantizeSettings

from ..conftest import TOKENIZER_FILES
from ..models.test_families import MODELS, SIZES

RECIPES = ("rtn", "gptq", "apex4-fast")
MARGIN, FLOOR = 1.2, 2e-3  # nats a token: below, both are roundings of bfloat16
BLOCK = 128
# All recipes spread a block's values by a transform, which loses where one channel alone decides what a model predicts: it is
# exact by itself, and not when it is spread. So the plainest quantization is taken with and without Hadamard's; and with the
# signs of its rows drawn, because there a rounding that falls the other way moves all (0.085 to 0.168 nats for four draws).
HADAMARD = torch.from_numpy(hadamard(BLOCK) / BLOCK**0.5)
SIGNS = torch.randint(0, 2, (3, BLOCK, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
TRANSFORMS = (torch.eye(BLOCK).double(), HADAMARD, *(SIGNS * HADAMARD))
WIDTHS = {"hidden_size": (128, 192, 256, 320), "intermediate_size": (128, 328, 384, 520)}


def disturb(model: nn.Module, drawn: random.Random) -> dict[str, Any]:
    """Give a model what real ones have; returns what was done."""
    done: dict[str, Any] = {"outliers": [], "dead": 0}
    for name, module in model.named_modules():
        if "norm" not in name.rsplit(".", 1)[-1] or not hasattr(module, "weight") or ".layers." not in name:
            continue
        if drawn.random() < 0.5:
            channel, factor = drawn.randrange(module.weight.numel()), 10.0 ** drawn.uniform(-9, 5)
            module.weight.data[channel] = factor
            done["outliers"].append((name, channel, f"{factor:.2g}"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name and drawn.random() < 0.15:
            weight = module.weight.data
            kind = drawn.choice(["column", "row", "scale", "tiny"])
            if kind == "column":
                weight[:, drawn.randrange(weight.shape[1])] = 0
            elif kind == "row":
                weight[drawn.randrange(weight.shape[0])] = 0
            elif kind == "scale":
                weight[drawn.randrange(weight.shape[0])] *= 10.0 ** drawn.uniform(0, 1.5)
            else:
                weight[drawn.randrange(weight.shape[0])] *= 1e-9
            done["dead"] += 1
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=drawn.choice([0.0, 0.02, 1.0]))
    return done


def rounded(x: torch.Tensor, transform: torch.Tensor) -> torch.Tensor:
    """[..., K] -> [..., K filled up with zeros to blocks], every block times an orthogonal matrix and rounded."""
    blocks = nn.functional.pad(x.double(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)) @ transform
    scale = (blocks.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-12)
    return ((blocks / scale).round().clamp(-7, 7) * scale).flatten(-2).to(x.dtype)


def quantize_by_hand(model: nn.Module, transform: torch.Tensor) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith(".gate"):
            module.weight.data = rounded(module.weight.data, transform)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], transform),))


@torch.no_grad()
def divergence(model: nn.Module, expected: torch.Tensor, ids: torch.Tensor) -> float:
    log_q = torch.log_softmax(model(ids).logits.double(), -1)
    assert bool(torch.isfinite(log_q).all())
    return float((expected.exp() * (expected - log_q)).sum(-1).mean())


def test_random_models(
    moments: Callable[[int], random.Random],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = moments(4)
    # Random models react to tokens that calibration never showed: of both there are enough, from texts of one kind.
    text = tmp_path / "text.txt"
    text.write_text(load_text("bundled")[:30_000])
    ids = torch.tensor(load_tokenizer(DEMO_PATH).encode(load_text("heldout")[:12_000])[:1024]).view(16, 64)
    # Experts are no linears in transformers, which `quantize_by_hand` could round.
    families = {name: FAMILIES[type(make()).__name__] for name, make in MODELS.items()}
    names = [
        name
        for name, family in families.items()
        if family.experts is None and family.auto_class == AutoModelForCausalLM.__name__
    ]
    worst = 0.0
    for number in range(drawn.count):  # type: ignore[attr-defined]
        seed, name = drawn.randrange(2**31), drawn.choice(names)
        torch.manual_seed(seed)
        for size, choices in WIDTHS.items():
            monkeypatch.setitem(SIZES, size, drawn.choice(choices))
        model = MODELS[name]()
        done = disturb(model, drawn)
        folder = tmp_path / str(number)
        model.to(torch.bfloat16).save_pretrained(folder)
        for file in TOKENIZER_FILES:
            shutil.copy(DEMO_PATH / file, folder)

        def load(of: Path) -> nn.Module:
            loaded: nn.Module = AutoModelForCausalLM.from_pretrained(of, dtype=torch.float32)
            return loaded.eval()

        with torch.no_grad():
            expected = torch.log_softmax(load(folder)(ids).logits.double(), -1)
        plainest = []
        for transform in TRANSFORMS:
            by_hand = load(folder)
            quantize_by_hand(by_hand, transform)
            plainest.append(divergence(by_hand, expected, ids))
        allowed = MARGIN * max(plainest) + FLOOR
        for recipe in RECIPES:
            out = tmp_path / f"{number}-{recipe}"
            settings = QuantizeSettings(
                str(folder), recipe, target="none", samples=48, seq_len=64, calib=str(text), device="cpu"
            )
            quantize(settings, out)
            check(str(out))
            found = divergence(load(out), expected, ids)
            worst = max(worst, found / allowed)
            assert found <= allowed, (
                f"{name}, {model.config.hidden_size}, {model.config.intermediate_size}, seed {seed}, {recipe}: {found:.5f} nats, {allowed:.5f} allowed; {done}"
            )
            shutil.rmtree(out)
        shutil.rmtree(folder)
    record_property("worst", worst)
