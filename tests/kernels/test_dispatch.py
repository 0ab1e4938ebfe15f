"""Who gets which kernel, and what is said where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.kernels import dispatch

GPU = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """fake_gpu((8, 6)) makes torch report one GPU of that capability, with everything installed."""

    def fake(capability: tuple[int, int]) -> None:
        dispatch._format_of_gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(dispatch, "_require_tools", lambda index: None)

    yield fake
    dispatch._format_of_gpu.cache_clear()


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
