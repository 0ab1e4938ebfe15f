"""The learned group transform: its gradient, what it gains, what is stored, and linears that share one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.errors import Apex4Error
from apex4_quant.format.feedback import block_clips_of, transform_of
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat, QuantConfig
from apex4_quant.format.storage import REPORT_NAME
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.kernels import reference, torch_backend
from apex4_quant.kernels.hadamard import apply_block_matrix
from apex4_quant.models.families import Producer
from apex4_quant.nn.linear import Apex4Linear
from apex4_quant.rounding.activation_clip import BLOCK_CLIP_RATIOS
from apex4_quant.rounding.gptq import DAMPING, inverse_factor, quantize_weight_gptq
from apex4_quant.rounding.nearest import quantize_weight_rtn
from apex4_quant.transforms import learned_transform
from apex4_quant.transforms.block_transforms import (
    pad_input_features,
    transform_hessian,
    transform_input,
    transform_weight,
)
from apex4_quant.transforms.importance import scale_by_readers
from apex4_quant.transforms.learned_transform import (
    BlockStatistics,
    balanced_hadamard,
    block_errors,
    is_sound,
    learn_transform,
    moments_in_basis,
    peaks_and_slopes,
    round_to_halves,
    rows_of_step,
    slope_of_log_error,
    with_equal_peaks,
)

DENSE, FEEDBACK, SHARED = TransformKind.DENSE, TransformKind.FEEDBACK_16, TransformKind.SHARED


def dense_format(n: int, k: int, group: int | str = 128, owner: str | None = None) -> LinearFormat:
    return LinearFormat(n, k, group, get_layout("rowmajor"), DENSE, 1.0, owner)


def inputs_and_weight(n: int, k: int, tokens: int = 1024, outliers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated rows with heavy tails, and a weight whose columns differ in size."""
    generator = torch.Generator().manual_seed(n + k)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    tails = torch.distributions.StudentT(4.0)
    torch.manual_seed(k)
    x = (tails.sample((tokens, k)) @ mix) * (torch.rand(k, generator=generator) + 0.2)
    w = torch.randn(n, k, generator=generator) * (torch.rand(k, generator=generator) + 0.2)
    if outliers:
        x[:, 3] *= 60
        w[:, 3] /= 60
    return x, w


def output_error(x: torch.Tensor, w: torch.Tensor, format: LinearFormat, matrix: torch.Tensor | None) -> float:
    """Of the quantized linear, both sides rounded, against the float one; relative."""
    codes, scales = quantize_weight_rtn("w", w, format, matrix)
    y = torch_backend.linear(x, codes, scales, hadamard=format.transform == "hadamard128", matrix=matrix)
    exact = x @ w.t()
    return float((y - exact).norm() / exact.norm())


@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("input_weight", [1.0, 0.003])
@pytest.mark.parametrize("shared", [False, True])
def test_gradient_is_that_of_the_objective(shared: bool, input_weight: float, damping: float | None) -> None:
    x, w = inputs_and_weight(48, 256, tokens=64)
    blocks = BlockStatistics.of(x, [w])
    blocks.damping = damping
    torch.manual_seed(0)
    start = balanced_hadamard(blocks)[: 1 if shared else None]
    transform = start + 0.01 * torch.randn_like(start)
    direction = torch.randn_like(start)
    inverse = torch.linalg.inv(transform)
    rows = blocks.weight_rows, blocks.x @ transform, blocks.w @ inverse.transpose(1, 2)
    slope = slope_of_log_error(*rows, *moments_in_basis(blocks, transform, inverse), shared, input_weight)
    exact = BlockStatistics.of(x.double(), [w.double()])
    exact.input_weight, exact.damping = input_weight, damping
    at, step = transform.double(), 1e-6
    up, down = (block_errors(exact, at + s * at @ direction.double()).log() for s in (step, -step))
    torch.testing.assert_close((slope * direction).sum((1, 2)).double(), (up - down) / (2 * step), rtol=1e-3, atol=1e-4)


def test_on_a_gpu_slopes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 50, 128)
    values[1, 4] = 0.0
    values[2, 7, 5] = values[2, 7].abs().max() * -2
    mean, back = peaks_and_slopes(values)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    other_mean, other_back = peaks_and_slopes(values)
    torch.testing.assert_close(other_back, back)
    assert torch.equal(other_mean, mean)
    torch.testing.assert_close(mean, values.abs().amax(-1).square().mean(1), rtol=1e-4, atol=0)


class Chains:
    """What a GPU replays, run again in the same places: what a chain reads from elsewhere is as it was when it was captured."""

    def __init__(self, device: torch.device) -> None:
        self.captured: dict[object, Callable[[], None]] = {}

    def run(self, key: object, operations: Callable[[], None]) -> None:
        self.captured.setdefault(key, operations)()

    def forget(self) -> None:
        self.captured.clear()


@pytest.mark.parametrize("tokens", [2048, 2050])  # steps with as many rows, and with one row more or less
@pytest.mark.parametrize(("shared", "damping"), [(False, None), (True, None), (False, 0.01)])
def test_replayed_steps_are_the_same_steps(
    tokens: int, shared: bool, damping: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = inputs_and_weight(48, 256, tokens=tokens)
    blocks = BlockStatistics.of(x, [w])
    blocks.damping = damping
    start = balanced_hadamard(blocks)[: 1 if shared else None]
    kept = start.clone()
    expected = learned_transform.descend(blocks, start, 45)
    monkeypatch.setattr(learned_transform, "Replayed", Chains)
    monkeypatch.setattr(learned_transform, "replays_on", lambda device: True)
    # Steps magnify what two ways to an inverse differ by: the next test is about these.
    monkeypatch.setattr(learned_transform._ReplayedWalk, "invert", exact_in_place)
    torch.testing.assert_close(learned_transform.descend(blocks, start, 45), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(start, kept) and not torch.allclose(expected, start, rtol=0.01)


def exact_in_place(walk: Any) -> None:
    walk.inverse.copy_(torch.linalg.inv(walk.transform))


@pytest.mark.parametrize("damage", [0.0, 0.1, 100.0])  # 100: no iteration comes from there to the inverse
def test_the_inverse_of_replayed_steps_is_exact(damage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_transform, "Replayed", Chains)
    x, w = inputs_and_weight(48, 256, outliers=True)
    blocks = BlockStatistics.of(x, [w])
    walk = learned_transform._ReplayedWalk(blocks, balanced_hadamard(blocks))
    place = walk.inverse
    walk.inverse += damage * walk.inverse.abs().mean() * torch.randn_like(walk.inverse)
    walk.invert()
    off = walk.transform @ walk.inverse - torch.eye(128)
    assert walk.inverse is place and float(torch.linalg.matrix_norm(off, 2).max()) < 1e-4


def test_every_row_is_looked_at_before_one_is_again() -> None:
    rows = torch.arange(10.0).view(1, 10, 1).expand(2, -1, 128)
    seen = [rows_of_step(rows, 4, step)[0, :, 0].tolist() for step in range(4)]
    assert seen == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8], [0, 3, 6, 9]]
    assert rows_of_step(rows, 20, 3).shape == (2, 10, 128)


@pytest.mark.parametrize(("n", "k", "outliers"), [(192, 256, False), (64, 384, True), (300, 200, False)])
def test_output_error_is_well_below_that_of_the_hadamard_transform(n: int, k: int, outliers: bool) -> None:
    x, w = inputs_and_weight(n, k, outliers=outliers)
    format = dense_format(n, k)
    matrix = learn_transform(pad_input_features(x, format), [pad_input_features(w, format)])
    plain = LinearFormat(n, k, 128, get_layout("rowmajor"), "hadamard128", 1.0)
    fresh, _ = inputs_and_weight(n, k, tokens=1024, outliers=outliers)
    learned, hadamard = output_error(fresh, w, format, matrix), output_error(fresh, w, plain, None)
    assert learned < 0.85 * hadamard, (learned, hadamard)


def test_a_transform_for_eight_bits_is_for_the_weights() -> None:
    n, k = 192, 256
    x, w = inputs_and_weight(n, k)
    format = replace(dense_format(n, k), activation_bits=8)
    fresh, _ = inputs_and_weight(n, k, tokens=1024)

    def error(matrix: torch.Tensor) -> float:
        codes, scales = quantize_weight_rtn("w", w, format, matrix)
        y = torch_backend.linear(fresh, codes, scales, hadamard=False, matrix=matrix, activation_bits=8)
        return float((y - fresh @ w.t()).norm() / (fresh @ w.t()).norm())

    of_four, of_eight = (learn_transform(x, [w], activation_bits=bits) for bits in (4, 8))
    assert error(of_eight) < 0.97 * error(of_four), (error(of_eight), error(of_four))


def test_a_transform_for_gptq_leaves_to_it_what_it_does() -> None:
    """Of inputs with a steep spectrum, which feedback gains from."""
    n, k = 192, 256
    x, w = inputs_and_weight(n, k)
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(k, k, generator=generator) * torch.logspace(0, -2, k) @ torch.randn(k, k, generator=generator) / k
    x, fresh = (rows @ mix for rows in (x, inputs_and_weight(n, k, tokens=1024)[0]))
    format = replace(dense_format(n, k), activation_bits=8)

    def error(matrix: torch.Tensor) -> float:
        factor = inverse_factor("w", transform_hessian(x.t() @ x / len(x), format, matrix))
        codes, scales = quantize_weight_gptq("w", w, format, factor, matrix)
        y = torch_backend.linear(fresh, codes, scales, hadamard=False, matrix=matrix, activation_bits=8)
        return float((y - fresh @ w.t()).norm() / (fresh @ w.t()).norm())

    nearest, feedback = (
        error(learn_transform(x, [w], 40, activation_bits=8, damping=damping)) for damping in (None, DAMPING)
    )
    assert feedback < 0.96 * nearest, (feedback, nearest)


def test_blocks_of_a_token_are_made_of_one_size_for_eight_bits() -> None:
    """A block 2^6 times smaller than the others would have two codes to itself, and one of zeros stays as it is."""
    x, w = inputs_and_weight(64, 384)
    x[:, 128:256] /= 64
    w[:, 128:256] *= 64
    x[:, 256:] = 0
    of_four, of_eight = (learn_transform(x, [w], steps=0, activation_bits=bits) for bits in (4, 8))
    raised = of_eight.float() / of_four.float().where(of_four != 0, 1)
    factors = [raised[block][of_four[block] != 0].unique().tolist() for block in range(3)]
    assert all(len(found) == 1 for found in factors) and factors[2] == [1.0]
    peaks = [
        float((x[:, at] @ matrix.float()).abs().amax(1).square().mean().sqrt())
        for at, matrix in zip((slice(128), slice(128, 256)), of_eight, strict=False)
    ]
    assert 0.7 < peaks[0] / peaks[1] < 1.42
    assert is_sound(of_eight).all() and float(of_eight.abs().max()) <= 2.0**8
    huge = with_equal_peaks(of_four, torch.cat((x[:, :128] * 1e6, x[:, 128:]), 1))
    assert torch.equal(huge[1], of_four[1] * 2.0**8) and torch.equal(huge[0], of_four[0])


def test_one_matrix_for_all_blocks_gains_less_than_one_for_each() -> None:
    k = 384
    x, w = inputs_and_weight(192, k)
    balance = ((w.square().sum(0) / x.square().sum(0)) ** 0.25)[None]  # what the recipe merges into the weights
    x, w = x * balance, w / balance
    shared = learn_transform(x, [w], shared=True)
    assert shared.shape == (3, 128, 128) and torch.equal(shared, shared[:1].expand(3, -1, -1))
    format = dense_format(192, k)
    plain = LinearFormat(192, k, 128, get_layout("rowmajor"), "hadamard128", 1.0)
    errors = [
        output_error(x, w, format, learn_transform(x, [w])),
        output_error(x, w, format, shared),
        output_error(x, w, plain, None),
    ]
    assert errors == sorted(errors) and errors[1] < 0.95 * errors[2], errors


def test_rows_that_were_not_seen_gain_too() -> None:
    x, w = inputs_and_weight(192, 256, tokens=4096)
    matrix = learn_transform(x[:2048], [w])
    plain = LinearFormat(192, 256, 128, get_layout("rowmajor"), "hadamard128", 1.0)
    assert output_error(x[2048:], w, dense_format(192, 256), matrix) < 0.9 * output_error(x[2048:], w, plain, None)


@pytest.mark.parametrize("k", [128, 200, 384])
def test_product_is_preserved(k: int) -> None:
    x, w = inputs_and_weight(40, k)
    format = dense_format(40, k)
    matrix = learn_transform(pad_input_features(x, format), [pad_input_features(w, format)], steps=20)
    product = transform_input(x, format, matrix).double() @ transform_weight(w, format, matrix).double().t()
    exact = x.double() @ w.double().t()
    assert float((product - exact).norm() / exact.norm()) < 1e-5
    hessian = pad_input_features(x, format).t() @ pad_input_features(x, format) / len(x)
    basis = transform_input(x, format, matrix)
    expected = basis.t() @ basis / len(x)
    torch.testing.assert_close(transform_hessian(hessian, format, matrix), expected, rtol=1e-3, atol=1e-4)


def test_entries_are_exact_in_both_16_bit_formats() -> None:
    x, w = inputs_and_weight(64, 256, outliers=True)
    matrix = learn_transform(x * 1e4, [w / 1e4])
    assert matrix.dtype == torch.float16 and matrix.shape == (2, 128, 128)
    assert torch.equal(matrix.to(torch.bfloat16).to(torch.float16), matrix)
    sizes = matrix.abs()[matrix != 0].float()
    assert float(sizes.min()) >= 2.0**-14
    assert bool(((matrix.abs().amax((1, 2)) >= 0.5) & (matrix.abs().amax((1, 2)) <= 1)).all())


def test_same_arguments_same_bytes() -> None:
    x, w = inputs_and_weight(64, 256)
    torch.manual_seed(1)
    first = learn_transform(x, [w[:32], w[32:]])
    torch.manual_seed(2)
    assert torch.equal(first, learn_transform(x, [w[:32], w[32:]]))


def test_dead_channels_blocks_and_weights() -> None:
    x, w = inputs_and_weight(32, 512)
    x[:, 7] = 0  # a channel
    x[:, 128:256] = 0  # a block of inputs
    w[:, 256:384] = 0  # a block of weights
    matrix = learn_transform(x, [w]).double()
    assert bool(torch.isfinite(torch.linalg.inv(matrix)).all())
    hadamard = torch.full((128, 128), 128**-0.5).double()
    for block in (1, 2):  # nothing to learn from: plain Hadamard up to the power of two
        ratio = matrix[block].abs() / hadamard
        assert float(ratio.max() - ratio.min()) < 1e-2


def test_a_worse_result_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs_and_weight(32, 256)
    untouched = learn_transform(x, [w], steps=0)
    for bad in (torch.eye(128).expand(2, -1, -1), torch.full((2, 128, 128), torch.nan)):
        monkeypatch.setattr(learned_transform, "descend", lambda blocks, start, steps, bad=bad: bad.clone())
        assert torch.equal(learn_transform(x, [w]), untouched)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("of_x", "of_w"), [(1e19, 1.0), (1e36, 1.0), (1e-30, 1.0), (1.0, 1e25), (1e-30, 1e-30), (1e30, 1e30), (1e30, 1e-30)]
)
def test_any_size_of_inputs_and_weights(of_x: float, of_w: float, shared: bool) -> None:
    """The error is the same but for a factor, so what is learned gains as much; squares alone would leave float32."""
    x, w = inputs_and_weight(96, 256)
    matrix = learn_transform(x * of_x, [w[:32] * of_w, w[32:] * of_w], 40, shared)
    expected = learn_transform(x, [w], 40, shared)
    assert bool(is_sound(matrix).all())
    format = dense_format(96, 256)
    assert output_error(x, w, format, matrix) == pytest.approx(output_error(x, w, format, expected), rel=0.02)
    huge = learn_transform(x * of_x, [w * of_w], 5, shared, gradients=torch.randn(64, 256) * of_x)
    assert bool(is_sound(huge).all())


def test_weights_of_very_different_sizes() -> None:
    """The small ones do not matter beside the large ones, in whichever order they come."""
    x, w = inputs_and_weight(96, 256)
    expected = learn_transform(x, [w * 2.0**60], 20)
    for weights in ([w * 2.0**60, w * 1e-30], [w * 1e-30, w * 2.0**60]):
        found = learn_transform(x, weights, 20)
        assert output_error(x, w, dense_format(96, 256), found) < 1.05 * output_error(
            x, w, dense_format(96, 256), expected
        )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("factor", [1e4, 1e8, 1e15])
@pytest.mark.parametrize("divided", [False, True])
def test_one_channel_far_above_the_others(factor: float, divided: bool, shared: bool) -> None:
    """Its row of the matrix is far below the others': it must not be stored as zeros."""
    x, w = inputs_and_weight(96, 256)
    x[:, 200] *= factor
    if divided:
        w[:, 200] /= factor
    matrix = learn_transform(x, [w], 40, shared)
    assert bool(is_sound(matrix).all()) and bool((matrix != 0).any(2).all())
    if factor > 1e4:  # without a diagonal merged before, float32 cannot hold such a channel beside the others
        return
    product = transform_input(x, dense_format(96, 256), matrix).double()
    product = product @ transform_weight(w, dense_format(96, 256), matrix).double().t()
    exact = x.double() @ w.double().t()
    assert float((product - exact).norm() / exact.norm()) < 1e-3


def test_a_learned_matrix_that_cannot_be_stored_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the first block is below what is stored: that block starts from where it was, and only that one."""
    x, w = inputs_and_weight(32, 256)
    good, untouched = learn_transform(x, [w], 10), learn_transform(x, [w], 0)
    descend = learned_transform.descend

    def lose_a_row(blocks: BlockStatistics, start: torch.Tensor, steps: int) -> torch.Tensor:
        learned = descend(blocks, start, steps)
        learned[0, 3] *= 1e-6
        return learned

    monkeypatch.setattr(learned_transform, "descend", lose_a_row)
    told: list[str] = []
    errors = iter([torch.ones(2), torch.zeros(2)])
    monkeypatch.setattr(learned_transform, "block_errors", lambda blocks, matrix: next(errors))
    found = learn_transform(x, [w], 10, warn=told.append)
    assert torch.equal(found[0], untouched[0]) and torch.equal(found[1], good[1])
    assert told == ["1 of 2 learned transforms cannot be stored in 16 bits, their start is used"]


def test_an_outlier_channel_of_a_norm_is_quantized(
    tiny_model: Callable[..., Path], calib: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    """A gain 10^4 times larger, divided out of what reads it: the same function, and a checkpoint that is whole."""
    model = tiny_model()
    tensors = load_file(model / "model.safetensors")
    for norm, readers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        tensors[f"model.layers.0.{norm}.weight"][5] *= 1e4
        for reader in readers:
            tensors[f"model.layers.0.{reader}.weight"][:, 5] /= 1e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for recipe in ("apex4-fast", "apex4", "apex4-shared"):
        settings = QuantizeSettings(str(model), recipe, calib=str(calib), samples=3, seq_len=32, target="none")
        result = quantize(settings, tmp_path / recipe)
        assert max(record["error"] for record in result.records) < 0.3, recipe
        for file in (tmp_path / recipe).glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                if name.endswith("input_transform"):
                    assert bool(is_sound(transform_of(tensor)).all()), (recipe, name)
    assert invoke("check", tmp_path / "apex4", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("producer", "rows", "kv_heads"),
    [
        (Producer("v", per_head=True), 32, 2),
        (Producer("qkv", rows="value", per_head=True), 64 + 32 + 32, 2),
        (Producer("up"), 64, 1),
        (Producer("gate_up", rows="up"), 128, 1),
    ],
)
def test_importance_does_not_see_a_factor_between_producer_and_reader(
    producer: Producer, rows: int, kv_heads: int
) -> None:
    torch.manual_seed(3)
    weight, reader = torch.randn(rows, 24), torch.randn(16, 64)
    factors = torch.ones(32 if producer.per_head else 64)
    factors[5] = 40.0
    scaled, divided = weight.clone(), reader.clone()
    scaled[-len(factors) :] *= factors[:, None]
    divided /= factors.view(kv_heads, 1, -1).expand(-1, 64 // len(factors), -1).flatten()
    results = []
    for w, r in ((weight, reader), (scaled, divided)):
        result = w.clone()
        scale_by_readers(result, producer, [r], kv_heads)
        results.append(result)
    ratio = results[1][-len(factors) :] / results[0][-len(factors) :]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-4, atol=0)
    assert not torch.allclose(results[0][-len(factors) :], weight[-len(factors) :])
    assert torch.equal(results[0][: rows - len(factors)], weight[: rows - len(factors)])  # q, k and gate as they were


# --- the layer and the checkpoint -------------------------------------------------------------------------------------


def test_backend_is_the_reference() -> None:
    x, w = inputs_and_weight(48, 256, tokens=16)
    matrix = learn_transform(x, [w], steps=10)
    codes, scale = torch_backend.quantize_activation(x, 128, 0.9, matrix=matrix)
    expected, expected_scale = reference.quantize_activation(x, 128, 0.9, matrix=matrix)
    torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-5, atol=0)
    off = (codes.flatten(1).long() - expected).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 1e-3  # ties of float32 sums
    blocks = torch.stack([x[:, :128] @ matrix[0].float(), x[:, 128:] @ matrix[1].float()], dim=1)
    torch.testing.assert_close(apply_block_matrix(x, matrix.float()), blocks.flatten(1), rtol=1e-5, atol=1e-5)


def shared_pair() -> tuple[Apex4Linear, Apex4Linear, torch.Tensor]:
    x, w = inputs_and_weight(48, 200)
    owner_format, other_format = dense_format(48, 200), dense_format(48, 200, owner="first")
    matrix = learn_transform(pad_input_features(x, owner_format), [pad_input_features(w, owner_format)], steps=5)
    made = []
    for format in (owner_format, other_format):
        codes, scales = quantize_weight_rtn("w", w, format, matrix)
        made.append(Apex4Linear.from_codes(format, codes, scales, None, matrix))
    made[1].take_transform_from(made[0])
    return made[0], made[1], x


def test_a_transform_is_stored_once_and_used_by_both() -> None:
    owner, other, x = shared_pair()
    assert set(owner.state_dict()) == {"weight_packed", "weight_scale", "input_transform"}
    assert set(other.state_dict()) == {"weight_packed", "weight_scale"}
    assert torch.equal(owner(x), other(x))
    owner.input_transform.data.mul_(0.5)  # power of two: codes stay, scales halve
    torch.testing.assert_close(other(x), owner(x), rtol=0, atol=0)
    assert owner.format.stored_bytes - other.format.stored_bytes == 2 * 2 * 128 * 128


def test_casting_keeps_the_transform() -> None:
    owner, other, x = shared_pair()
    before = owner.input_transform.clone()
    owner.to(torch.bfloat16)
    other.double()
    assert owner.input_transform.dtype == torch.float16 and torch.equal(owner.input_transform, before)
    assert torch.isfinite(other(x)).all()


def test_a_linear_without_its_transform_refuses_to_run() -> None:
    _, other, x = shared_pair()
    other._transform_owner = ()
    with pytest.raises(Apex4Error, match="without the dense transform"):
        other(x)


@pytest.mark.parametrize(
    ("transform", "modules"),
    [
        ("hadamard128", {"b": {"transform_from": "a"}}),
        (DENSE, {"b": {"transform_from": 3}}),
        (DENSE, {"b": {"transform_from": "a"}, "a": {"transform_from": "c"}}),
    ],
)
def test_impossible_owners_are_refused(transform: str, modules: dict[str, object]) -> None:
    config = QuantConfig(transform=transform).to_dict() | {"modules": modules}
    with pytest.raises(Apex4Error, match="takes its transform from"):
        QuantConfig.from_dict(config)


@pytest.fixture
def dense_model(demo_checkpoint: Path) -> Path:
    """The recipe of the demo checkpoint learns them."""
    assert f'"transform": "{FEEDBACK.value}"' in (demo_checkpoint / "config.json").read_text()
    return demo_checkpoint


def test_checkpoint_names_the_owner_and_loads(dense_model: Path, tmp_path: Path) -> None:
    section = json.loads((dense_model / "config.json").read_text())["quantization_config"]
    prefix = "model.layers.0.self_attn."
    assert section["transform"] == FEEDBACK
    assert section["modules"][f"{prefix}v_proj"]["transform_from"] == f"{prefix}q_proj"
    assert "transform_from" not in section["modules"].get(f"{prefix}o_proj", {})
    model = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.transform_matrix() is not None
    assert torch.equal(attention.k_proj.transform_matrix(), attention.q_proj.input_transform)
    ids = torch.arange(40)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, expected)


def test_offloaded_owners_are_found(dense_model: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    device_map = {f"model.layers.{i}": "disk" if i in (1, 4) else "cpu" for i in range(6)} | {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    offloaded = AutoModelForCausalLM.from_pretrained(
        dense_model, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    ids = torch.arange(24)[None]
    assert torch.equal(offloaded(ids).logits, plain(ids).logits)


def test_a_shared_transform_is_one_matrix_an_input(
    tmp_path: Path, invoke: Callable[..., Result], one_sentence: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    quantize(QuantizeSettings("demo", recipe="apex4-shared", target="none", samples=2, seq_len=64, device="cpu"), out)
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    prefix = "model.layers.0."
    assert section["transform"] == SHARED and section["format_version"] == 1
    assert section["modules"][f"{prefix}self_attn.v_proj"]["transform_from"] == f"{prefix}self_attn.q_proj"
    file = (
        out
        / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][
            f"{prefix}mlp.down_proj.input_transform"
        ]
    )
    tensors = load_file(file)
    stored = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if "input_transform" in name}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        f"{name}.input_transform": (1, 128, 128)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    down = model.get_submodule(f"{prefix}mlp.down_proj")
    assert torch.equal(down.transform_matrix(), stored["mlp.down_proj.input_transform"].expand(6, -1, -1))
    x = torch.randn(3, 768)
    blocks = [block @ stored["mlp.down_proj.input_transform"][0].float() for block in x.split(128, dim=1)]
    torch.testing.assert_close(transform_input(x, down.format, down.transform_matrix()), torch.cat(blocks, 1))
    assert invoke("check", out, "--json").exit_code == 0
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)

    name = f"{prefix}mlp.down_proj.input_transform"
    tensors[name] = tensors[name].repeat(6, 1, 1)  # as with dense128
    save_file(tensors, file, metadata={"format": "pt"})
    (out / "apex4_report.json").unlink()
    one_sentence(invoke("check", out, "--json"), 1, name, "[6, 128, 128]", "[1, 128, 128]")


def test_damaged_transforms_are_found(
    dense_model: Path, tmp_path: Path, invoke: Callable[..., Result], one_sentence: Callable[..., str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(dense_model, damaged)
    (damaged / "apex4_report.json").unlink()  # its checksums would find any damage first
    name = "model.layers.0.self_attn.o_proj.input_transform"
    weight_map = json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"]
    file = damaged / weight_map[name]
    tensors = load_file(file)
    good = tensors[name].clone()
    tensors[name][0, 0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    one_sentence(invoke("check", damaged, "--json"), 1, name, "NaN")
    tensors[name] = good.clone()
    tensors[name][1, -1, 0] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    one_sentence(invoke("check", damaged, "--json"), 1, name, "clip ratio that is not positive")
    tensors[name] = good[:1]
    save_file(tensors, file, metadata={"format": "pt"})
    one_sentence(invoke("check", damaged, "--json"), 1, name, "[1, 185, 128]")
    with pytest.raises(Apex4Error, match=name):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_inspect_counts_the_transform(dense_model: Path, invoke: Callable[..., Result]) -> None:
    linears = {entry["name"]: entry for entry in json.loads(invoke("inspect", dense_model, "--json").stdout)["linears"]}
    q, k = (linears[f"model.layers.0.self_attn.{name}_proj"]["bytes"] for name in "qk")
    # q has twice k's rows and stores the transform of 256 channels, its error feedback and its clip ratios.
    assert q - 2 * k == 2 * 2 * 185 * 128


def test_searched_clip_ratios_are_used_by_the_loaded_model(dense_model: Path) -> None:
    report = json.loads((dense_model / REPORT_NAME).read_text())
    model = AutoModelForCausalLM.from_pretrained(dense_model)
    for name in (entry["name"] for entry in report["quantized"]):
        linear = model.get_submodule(name)
        assert linear.format.activation_clip == 1  # every block has its own
        clips = block_clips_of(linear.transform_matrix())
        assert set(clips.tolist()) <= set(round_to_halves(torch.tensor(BLOCK_CLIP_RATIOS)).tolist())
    assert len(set(clips.tolist())) > 1
