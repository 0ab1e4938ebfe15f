"""Who gets which kernel, and what is said where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.kernels import dispatch
from apex4_quant.kernels.runtime.architectures import EIGHT_BIT_FAMILIES

GPU = torch.device("cuda", 0)


def clear_caches() -> None:
    for cached in (dispatch._format_of_gpu, dispatch._architecture, dispatch.say_of_eight_bits):
        cached.cache_clear()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fake_gpu((8, 6)) makes torch report one GPU of that capability, with everything installed."""

    def fake(capability: tuple[int, int]) -> None:
        clear_caches()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(dispatch, "_require_tools", lambda index: None)

    yield fake
    clear_caches()


@pytest.mark.parametrize(
    ("capability", "format"), [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90")]
)
def test_architectures_with_kernels(capability: tuple[int, int], format: str, fake_gpu: Any) -> None:
    fake_gpu(capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.kernel_format(GPU) == dispatch.kernel_format(torch.device("cuda")) == format
        assert dispatch.kernel_format(torch.device("cpu")) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (10, 0), (12, 0)])
def test_an_architecture_without_kernels_says_so_once(capability: tuple[int, int], fake_gpu: Any) -> None:
    fake_gpu(capability)
    with pytest.warns(RuntimeWarning) as caught:
        assert [dispatch.kernel_format(GPU) for _ in range(3)] == [None] * 3
    (warning,) = caught
    text = str(warning.message)
    assert f"sm_{capability[0]}{capability[1]}" in text and "sm_90" in text and "PyTorch operations" in text


def test_missing_tools_are_named_once(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu((9, 0))

    def missing(index: int) -> None:
        raise Apex4Error("cuda-core is needed and is not installed: pip install 'apex4-quant[cuda13]'")

    monkeypatch.setattr(dispatch, "_require_tools", missing)
    with pytest.warns(RuntimeWarning) as caught:
        assert [dispatch.kernel_format(GPU) for _ in range(3)] == [None] * 3
    (warning,) = caught
    assert "pip install" in str(warning.message) and "PyTorch operations" in str(warning.message)


def test_the_variable(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu((9, 0))
    monkeypatch.setenv("APEX4_KERNEL", "reference")
    assert dispatch.kernel_format(GPU) is None
    monkeypatch.setenv("APEX4_KERNEL", "")
    assert dispatch.kernel_format(GPU) == "sm90"
    monkeypatch.setenv("APEX4_KERNEL", "marlin")
    for device in (GPU, torch.device("cpu")):
        with pytest.raises(UsageError, match=r"APEX4_KERNEL=marlin.*'reference'"):
            dispatch.kernel_format(device)


# ---- bits of activations ---------------------------------------------------------------------------------------------


def have_families(monkeypatch: pytest.MonkeyPatch, families: dict[int, str]) -> None:
    for sm in list(EIGHT_BIT_FAMILIES):
        monkeypatch.delitem(EIGHT_BIT_FAMILIES, sm)
    for sm, family in families.items():
        monkeypatch.setitem(EIGHT_BIT_FAMILIES, sm, family)


@pytest.fixture
def eight_bit_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Hopper, Ampere and Blackwell."""
    have_families(monkeypatch, {80: "gemm_s8", 90: "gemm_sm90_s8", 100: "gemm_s8"})
    monkeypatch.delenv("APEX4_KERNEL", raising=False)


@pytest.mark.parametrize(
    ("capability", "asked", "stored", "bits", "format"),
    [
        ((9, 0), "", 4, 8, "s8"), ((9, 0), "auto", 4, 8, "s8"), ((9, 0), "4", 4, 4, "sm90"), ((9, 0), "4", 8, 8, "s8"),
        ((10, 0), "auto", 4, 8, "s8"), ((8, 0), "auto", 4, 4, "sm80"), ((8, 0), "auto", 8, 8, "s8"), ((8, 0), "8", 4, 8, "s8"),
        ((8, 6), "auto", 4, 4, "sm80"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("eight_bit_kernels")
def test_bits_of_a_gpu(
    capability: tuple[int, int], asked: str, stored: int, bits: int, format: str, fake_gpu: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake_gpu(capability)
    monkeypatch.setenv("APEX4_ACTIVATIONS", asked)
    assert dispatch.activation_bits(GPU, stored) == bits and dispatch.kernel_format(GPU, bits) == format


def test_without_an_eight_bit_kernel_nothing_changes_and_its_lack_is_said(
    fake_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_families(monkeypatch, {80: "gemm_s8"})
    fake_gpu((8, 6))
    monkeypatch.delenv("APEX4_ACTIVATIONS", raising=False)
    assert dispatch.activation_bits(GPU, 4) == 4
    with pytest.warns(RuntimeWarning, match=r"sm_86, and apex4 has kernels for 8-bit activations for sm_80; .*PyTorch"):
        assert dispatch.kernel_format(GPU, 8) is None


@pytest.mark.usefixtures("eight_bit_kernels")
def test_more_bits_than_stored_are_said_once(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu((9, 0))
    monkeypatch.delenv("APEX4_ACTIVATIONS", raising=False)
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            dispatch.say_of_eight_bits(GPU)
    (warning,) = caught
    assert str(warning.message) == (
        "apex4: on Some GPU linears quantized for 4-bit activations compute with 8 bits, which is faster there for many tokens "
        "and more exact; set APEX4_ACTIVATIONS=4 to compute with 4"
    )
    dispatch.say_of_eight_bits.cache_clear()
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    with pytest.warns(UserWarning, match=r"^apex4: APEX4_ACTIVATIONS=8: linears .* more exact$"):
        dispatch.say_of_eight_bits(torch.device("cpu"))


@pytest.mark.parametrize("value", ["5", "w4a8", "-8"])
def test_other_bits_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_ACTIVATIONS", value)
    with pytest.raises(UsageError, match=rf"^APEX4_ACTIVATIONS={value} is not known: give 4, 8 or auto$"):
        dispatch.activation_bits(torch.device("cpu"), 8)
