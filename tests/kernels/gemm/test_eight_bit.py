"""Which kernel multiplies 8-bit activations: asked of the family of the architecture, and refused where there is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from apex4_quant.errors import Apex4Error
from apex4_quant.kernels.gemm import eight_bit
from apex4_quant.kernels.gemm.configs import PlanSource
from apex4_quant.kernels.runtime.architectures import EIGHT_BIT_FAMILIES


def test_the_family_of_the_architecture_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    plan = SimpleNamespace()
    monkeypatch.setattr(eight_bit, "CHOOSERS", {"some": lambda *shape: asked.append(shape) or plan})
    monkeypatch.setitem(EIGHT_BIT_FAMILIES, 61, "some")
    source = PlanSource("forced", 3)
    assert eight_bit.choose_eight_bit_gemm(61, 20, 5, 70, 4, 2, "bf16", source) is plan
    monkeypatch.setenv("APEX4_GEMM", "from the environment")
    assert eight_bit.choose_eight_bit_gemm(61, 20, 5, 70, 4, 2, "fp16") is plan
    assert asked[0] == (61, 20, 5, 70, 4, 2, "bf16", source)
    assert asked[1][:7] == (61, 20, 5, 70, 4, 2, "fp16") and asked[1][7].forced == "from the environment"


def test_no_family_is_one_sentence() -> None:
    with pytest.raises(
        Apex4Error, match=r"^there is no kernel for 8-bit activations for sm_61: .*APEX4_KERNEL=reference$"
    ):
        eight_bit.choose_eight_bit_gemm(61, 20, 5, 70, 4, 1, "bf16")


def test_every_family_has_a_chooser() -> None:
    assert set(EIGHT_BIT_FAMILIES.values()) <= set(eight_bit.CHOOSERS)
