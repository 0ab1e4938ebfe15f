"""One quantized linear: the same bits by kernels' operators and by PyTorch, its tensors through casts and state dicts, its mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.format.feedback import clip_row
from apex4_quant.format.layouts import LAYOUTS, get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels import reference, torch_backend
from apex4_quant.nn.linear import Apex4Linear

K, N = 200, 70


def made(
    layout: str = "rowmajor",
    transform: TransformKind = TransformKind.HADAMARD,
    group: int | str = 128,
    **format: Any,
) -> Apex4Linear:
    generator = torch.Generator().manual_seed(1)
    of = LinearFormat(N, K, group, get_layout(layout), transform, 1.0 if transform.has_block_clips else 0.9, **format)
    codes = torch.randint(-7, 8, (N, of.padded_k), dtype=torch.int8, generator=generator)
    scales = (torch.rand(N, of.groups, generator=generator) * 0.01 + 1e-3).half()
    matrix = torch.randn(of.padded_k // 128, of.transform.matrix_rows, 128, generator=generator).half() * 0.1
    if of.transform.has_block_clips:
        matrix[:, -1:] = clip_row(1.0625 - 0.125 * torch.arange(len(matrix)))
    bias = torch.randn(N, generator=generator).bfloat16()
    return Apex4Linear.from_codes(of, codes, scales, bias, matrix if of.transform_shape else None)


def some_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("transform", TransformKind)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["sm80", "sm90", None])
def test_every_layout_and_kernel_computes_the_same(layout: str, kernel: str | None, transform: TransformKind) -> None:
    linear, x = made(layout, transform), some_input(2, 3)
    expected = made("rowmajor", transform).reference(x)
    linear.prepare(kernel)
    assert torch.equal(linear(x), expected) and torch.equal(linear.reference(x), expected)
    assert linear.layout.name == (kernel or layout) and linear.format.layout.name == layout


@pytest.mark.parametrize("transform", TransformKind)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [128, 256, "channel"])
def test_eight_bits_are_the_same_by_operators_and_by_pytorch(
    layout: str, group: int | str, transform: TransformKind
) -> None:
    if transform.fitting(group, 4) != transform:
        pytest.skip("no linear is stored so")
    linear, x = made(layout, transform, group), some_input(2, 3)
    linear.prepare(None, 8)
    y = linear(x)
    how = {"hadamard": transform is TransformKind.HADAMARD, "matrix": linear.transform_matrix(), "activation_bits": 8}
    assert torch.equal(y, torch_backend.linear(x, linear.codes(), linear.scales(), linear.bias, **how))
    linear.prepare("s8")
    assert linear.activation_bits == 8 and linear.layout.name == "s8" and not linear.quantizes_by_torch
    assert torch.equal(linear(x), y) and torch.equal(linear.reference(x), y)
    linear.prepare(None, 4)
    assert linear.folded is None and torch.equal(linear(x), made(layout, transform, group).reference(x))
    assert not torch.equal(linear(x), y)


def test_a_cast_or_a_new_state_is_folded_anew() -> None:
    linear, x = made(), some_input(5)
    linear.prepare("s8")
    expected, state = linear(x), linear.state_dict()
    linear.weight_scale.data.fill_(1)
    linear.weight_packed.data.zero_()
    linear.to(torch.float32)
    assert not torch.equal(linear(x), expected)
    linear.load_state_dict(state)
    assert torch.equal(linear.to(torch.bfloat16)(x), expected)


@pytest.mark.parametrize(
    ("asked", "stored", "keeps", "bits"),
    [(None, 4, False, 4), (None, 8, False, 8), ("auto", 4, False, 4), ("4", 4, False, 4), ("4", 8, False, 8), ("8", 4, False, 8),
     ("8", 4, True, 4), ("4", 8, True, 8)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bits_on_a_cpu(asked: str | None, stored: int, keeps: bool, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked is None:
        monkeypatch.delenv("APEX4_ACTIVATIONS", raising=False)
    else:
        monkeypatch.setenv("APEX4_ACTIVATIONS", asked)
    linear, x = made(activation_bits=stored), some_input(3)
    linear.keeps_activation_bits = keeps
    y = linear(x)
    assert linear.activation_bits == bits
    linear.prepare(None, bits)
    assert torch.equal(y, linear(x))


def test_more_inputs_than_an_integer_sums_keep_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_ACTIVATIONS", "8")
    format = LinearFormat(1, 2**17 + 1, "channel", get_layout("rowmajor"), TransformKind.HADAMARD, 1.0)
    linear = Apex4Linear(format, False, torch.bfloat16, device="meta")
    assert linear.arithmetic_on(torch.device("cpu")) == (None, 4)


def test_bits_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APEX4_ACTIVATIONS", "5")
    with pytest.raises(UsageError, match=r"^APEX4_ACTIVATIONS=5 is not known: give 4, 8 or auto$"):
        made()(some_input(3))


@pytest.mark.parametrize("kernel", ["sm80", "sm90", "s8"])
def test_a_state_is_in_the_checkpoints_layout(kernel: str) -> None:
    linear, other, x = made(), made(), some_input(5)
    for each in (linear, other):
        each.prepare(None, 8 if kernel == "s8" else 4)
    expected, stored = linear(x), {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    linear.prepare(kernel)
    assert not torch.equal(linear.weight_packed.flatten()[:64], stored["weight_packed"].flatten()[:64])
    state = linear.state_dict()
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)
    other.weight_packed.data.zero_()
    other.prepare("s8" if kernel == "s8" else "sm90")
    assert not torch.equal(other(x), expected)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_leaves_scales_and_transforms_exact(dtype: torch.dtype) -> None:
    linear = made(transform=TransformKind.DENSE).to(dtype)
    assert linear.weight_scale.dtype == torch.float16 and linear.bias is not None and linear.bias.dtype == dtype
    assert linear.input_transform is not None and linear.input_transform.dtype == torch.float16
    before = made(transform=TransformKind.DENSE)
    assert torch.equal(linear.weight_scale, before.weight_scale)
    assert before.input_transform is not None and torch.equal(linear.input_transform, before.input_transform)


@pytest.mark.parametrize("kernel", [None, "s8"])
@pytest.mark.parametrize("kind", [TransformKind.FEEDBACK, TransformKind.FEEDBACK_16])
def test_with_eight_bits_feedback_is_left_away(kernel: str | None, kind: TransformKind) -> None:
    """The bits of the dense transform with the same matrix; with four they differ."""
    linear, dense, x = made(transform=kind), made(transform=TransformKind.DENSE), some_input(2, 3)
    assert linear.input_transform is not None and dense.input_transform is not None
    dense.load_state_dict(linear.state_dict() | {"input_transform": linear.input_transform[:, :128]})
    for each in (linear, dense):
        each.prepare(kernel, 8)
    assert torch.equal(linear(x), dense(x))
    for each in (linear, dense):
        each.prepare("sm80" if kernel else None, 4)
    assert not torch.equal(linear(x), dense(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_feedback_is_what_the_format_says(dtype: torch.dtype) -> None:
    """Saved, loaded into another linear, cast: y of the reference's codes."""
    linear, other, x = made("sm80", TransformKind.FEEDBACK), made("sm80", TransformKind.FEEDBACK), some_input(9)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    assert state["input_transform"].shape == (2, 184, 128)
    for tensor in (other.weight_packed, other.weight_scale, other.input_transform):
        assert tensor is not None
        tensor.data.zero_()
    other.load_state_dict(state)
    other.to(dtype)
    assert other.input_transform is not None and torch.equal(other.input_transform, state["input_transform"])
    x = x.to(dtype)
    padded = torch.nn.functional.pad(x, (0, 56))
    codes, scale = reference.quantize_activation(padded, 128, 0.9, False, state["input_transform"])
    expected = reference.linear(codes, scale, linear.codes(), linear.scales(), linear.bias)
    assert (other(x).double() - expected).norm() < (0.004 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
    plain = reference.quantize_activation(padded, 128, 0.9, False, state["input_transform"][:, :128])
    other_codes = reference.linear(*plain, linear.codes(), linear.scales(), linear.bias)
    assert (other_codes - expected).norm() > 0.05 * expected.norm(), "without feedback it would not be"


def test_a_transform_is_taken_from_another_linear() -> None:
    owner, reader = made(transform=TransformKind.DENSE), made(transform=TransformKind.DENSE, transform_from="owner")
    assert reader.input_transform is None
    with pytest.raises(Apex4Error, match="without the dense transform of its input: load the model as a whole"):
        reader(some_input(2))
    reader.take_transform_from(owner)
    assert [name for name, _ in reader.named_modules()] == [""], "the owner is no child"
    for kernel in (None, "sm90"):
        reader.prepare(kernel)
        assert torch.equal(reader(some_input(2)), owner.reference(some_input(2)))


def damage(linear: Apex4Linear, what: str) -> None:
    with torch.no_grad():
        if what == "weight_packed":
            linear.weight_packed[0, 0, 0] = 0x08
        elif what == "weight_scale":
            linear.weight_scale[3, 0, 0] = 0
        else:
            assert linear.input_transform is not None
            linear.input_transform[1, 2, 3] = float("nan")


@pytest.mark.parametrize("what", ["weight_packed", "weight_scale", "input_transform"])
def test_a_damaged_tensor_is_named(what: str) -> None:
    linear = made(transform=TransformKind.DENSE)
    linear.require_legal("layers.0.q_proj")
    damage(linear, what)
    with pytest.raises(Apex4Error, match=rf"^layers\.0\.q_proj\.{what} holds .*damaged"):
        linear.require_legal("layers.0.q_proj")


def test_it_says_what_it_is() -> None:
    linear = made()
    linear.prepare("sm80")
    assert repr(linear) == f"Apex4Linear(in={K}, out={N}, group=128, layout=sm80)"
    linear.prepare("s8")
    assert repr(linear) == f"Apex4Linear(in={K}, out={N}, group=128, activations=8 bits, layout=s8)"
