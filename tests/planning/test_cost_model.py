"""The cost model against numbers worked out by hand, and against the published ratios of the naive kernel.

The account of issue slots below it has its own file, test_issue_model.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.number_format import CHANNEL
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.hardware.gpus import GPUS
from apex4_quant.planning.choosing import choose
from apex4_quant.planning.cost_model import (
    DEFAULT_TOKENS,
    MEMORY_SHARE,
    NAIVE,
    OURS,
    activation_seconds,
    default_choice,
    dequantization_load,
    fp16_seconds,
    gemm_seconds,
    get_gpu,
    input_group_seconds,
    learned_transform_cost,
)
from apex4_quant.planning.issue_model import EFFICIENCY, EFFICIENCY_EIGHT_BIT, best_loop
from apex4_quant.planning.options import choices_of
from apex4_quant.planning.planner import group_options
from apex4_quant.planning.sensitivity import GroupSensitivity

DENSE, FEEDBACK, HADAMARD = TransformKind.DENSE, TransformKind.FEEDBACK, TransformKind.HADAMARD

Call = Callable[..., Any]
PREFILL = (2048, 4096, 8192)  # tokens at which a GEMM of an 8B model is bound by compute
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # [N, K] of an 8B model


def ratio(name: str, m: int, n: int, k: int, group_size: int | str, mainloop: Any) -> float:
    """Predicted speed-up over FP16, quantization of the activations included."""
    gpu = GPUS[name]
    return fp16_seconds(gpu, m, n, k) / input_group_seconds(gpu, m, [n], k, group_size, mainloop)


@pytest.mark.parametrize(
    ("name", "group_size", "mainloop", "expected"),
    [
        ("A100", 128, OURS, 1.0),  # 2 * 64 / 128
        ("A100", 256, OURS, 0.5),
        ("A100", 512, OURS, 0.25),
        ("A100", CHANNEL, OURS, 0.03125),  # K = 4096
        ("A100", 128, NAIVE, 3.0),  # 6 * 64 / 128
        ("RTX 3090", 128, OURS, 2 * 568 / 35.6 / 128),
        ("RTX 3090", 128, NAIVE, 4 * 568 / 35.6 / 128),  # 0.50
        ("L40S", 128, OURS, 2 * 1466 / 91.6 / 128),
        ("H200", 128, OURS, 1979 / 66.9 / 128),  # 0.23: the scales are multiplied on the tensor cores
    ],
)
def test_lambda(name: str, group_size: int | str, mainloop: Any, expected: float) -> None:
    assert dequantization_load(GPUS[name], 4096, group_size, mainloop) == pytest.approx(expected, rel=1e-3)


def test_slots() -> None:
    assert [OURS.slots(GPUS[name]) for name in ("A100", "RTX 3090", "H200")] == [2, 2, 1]
    assert [NAIVE.slots(GPUS[name]) for name in ("A100", "RTX 3090", "L40S")] == [6, 4, 4]


@pytest.mark.parametrize("m", PREFILL)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_naive_mainloop_has_the_published_ratios(m: int, n: int, k: int) -> None:
    """The control: one fitted number, two GPUs, two published ranges (arXiv 2606.08761, compute bound, g128)."""
    assert 0.43 <= ratio("A100", m, n, k, 128, NAIVE) <= 0.47
    assert 2.0 <= ratio("RTX 3090", m, n, k, 128, NAIVE) <= 2.5


def test_times_by_hand() -> None:
    a100, rtx3090 = GPUS["A100"], GPUS["RTX 3090"]
    # 4 schedulers a SM, 32 accumulators a warp, 32 groups; at least 4 clocks of tensor cores each on the A100, and at least
    # 2 FFMA of 2 clocks; on the 3090 8 clocks of tensor cores.
    tensor = 2 * 4096**3 / (1248e12 * EFFICIENCY)
    assert tensor == pytest.approx(4096**2 * 32 / (32 * 4 * 108) * 4 / 1.41e9 / EFFICIENCY, rel=1e-3)
    assert 1.0 < gemm_seconds(a100, 4096, 4096, 4096, 128) / tensor < 1.3
    assert gemm_seconds(rtx3090, 4096, 4096, 4096, 128) == pytest.approx(2 * 4096**3 / (568e12 * EFFICIENCY), rel=1e-3)
    # In turns: mma 4, conversion 8, and FMUL, FFMA, scales and addresses, 2 clocks each.
    assert 16 / 4 < gemm_seconds(a100, 4096, 4096, 4096, 128, NAIVE) / tensor < 18 / 4
    # 4096 tokens of 4096 inputs: two bytes read, half a byte of codes and 32 scales of four bytes written
    assert activation_seconds(a100, 4096, 4096, 128) == pytest.approx(
        4096 * (2 * 4096 + 2048 + 128) / (2039e9 * MEMORY_SHARE)
    )
    # one token: the weight's codes and scales, N K (0.5 + 2/128) bytes
    floor = 14336 * 4096 * (0.5 + 2 / 128) / (2039e9 * MEMORY_SHARE)
    assert gemm_seconds(a100, 1, 14336, 4096, 128) == pytest.approx(floor, rel=2e-3)
    assert fp16_seconds(a100, 1, 14336, 4096) == pytest.approx(14336 * 4096 * 2 / (2039e9 * MEMORY_SHARE), rel=2e-3)


def test_padding_costs() -> None:
    """768 inputs in groups of 512 are computed as 1024."""
    l40 = GPUS["L40"]
    assert gemm_seconds(l40, 4096, 4096, 768, 512) == pytest.approx(gemm_seconds(l40, 4096, 4096, 1024, 512))
    assert gemm_seconds(l40, 4096, 4096, 768, 512) > gemm_seconds(l40, 4096, 4096, 768, 256)


def test_linears_of_one_input_quantize_it_once() -> None:
    gpu = GPUS["RTX 3090"]
    together = input_group_seconds(gpu, 512, [4096, 1024, 1024], 4096, 128)
    apart = sum(input_group_seconds(gpu, 512, [n], 4096, 128) for n in (4096, 1024, 1024))
    assert apart - together == pytest.approx(2 * activation_seconds(gpu, 512, 4096, 128))


@pytest.mark.parametrize("name", GPUS)
def test_g128_is_within_the_default_budget_everywhere(name: str) -> None:
    """lambda <= 1 with two slots on every GPU of the table; not so on the A100 with the naive six. Learned transforms fit too."""
    assert default_choice(GPUS[name]) == default_choice(GPUS[name], learned=DENSE) == "g128, learned"
    assert dequantization_load(GPUS[name], 4096, 128) <= 1
    assert default_choice(GPUS["A100"], NAIVE) == "some g128, learned"


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("mainloop", [OURS, NAIVE])
@pytest.mark.parametrize("learned", [DENSE, FEEDBACK])
def test_the_default_in_words_is_what_the_planner_chooses(name: str, mainloop: Any, learned: TransformKind) -> None:
    """For the linears of a Llama-3-8B, of which every one loses by larger groups and gains by a learned transform."""
    groups = []
    for outputs, k in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)):
        loss = {128: 1.0, 256: 1.1, 512: 1.2, CHANNEL: 1.3}
        losses = {
            c: loss[c.group_size] * (0.5 if c.transform == learned else 1) for c in choices_of(k, (HADAMARD, learned))
        }
        sensitivity = GroupSensitivity(0, 0, (), outputs, k, False, {}, losses)
        groups.append(group_options(sensitivity, GPUS[name], DEFAULT_TOKENS, mainloop))
    chosen = {each.choice for each in choose(groups)}
    assert (chosen == {(128, learned, 4)}) == (default_choice(GPUS[name], mainloop, learned) == "g128, learned")


def test_targets_without_rates() -> None:
    assert get_gpu("rtx3090").name == "RTX 3090"
    for target in ("sm_86", "none"):
        with pytest.raises(UsageError, match=f"{target}.*no GPU whose rates are known.*A100"):
            get_gpu(target)


def test_gpus_command(run_cli: Call, invoke: Call) -> None:
    result = run_cli("gpus", "--json", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "apex4_quant.hardware.gpus" in imported and not {"torch", "numpy", "yaml", "transformers"} & imported
    values = json.loads(result.stdout)
    assert values["slots_per_group"] == 2
    rows = {gpu["name"]: gpu for gpu in values["gpus"]}
    assert list(rows) == list(GPUS)
    assert rows["A100"]["lambda"] == {"128": 1.0, "256": 0.5, "512": 0.25, "channel": 0.0312}
    assert (rows["A100"]["rho"], rows["A100"]["tensor_bits"], rows["H200"]["tensor_bits"]) == (64.0, 4, 8)
    assert {gpu["default"] for gpu in values["gpus"]} == {"g128, learned"}
    for key, transform in (("dense_transform", DENSE), ("feedback_transform", TransformKind.FEEDBACK_16)):
        costs = {str(tokens): learned_transform_cost(GPUS["A100"], tokens, transform) for tokens in (1, 2048)}
        assert rows["A100"][key] == pytest.approx(costs, abs=1e-4)
    text = invoke("gpus").stdout
    assert all(name in text for name in GPUS) and "c = 2" in text and "predicted" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_dense_transform_reads_its_matrices_and_its_products_hide_where_fp16_is_fast() -> None:
    a100, rtx3090 = get_gpu("A100"), get_gpu("RTX 3090")
    extra = activation_seconds(a100, 1, 4096, 128, DENSE) - activation_seconds(a100, 1, 4096, 128)
    assert extra == pytest.approx(4096 * 128 * 2 / (a100.memory_gbs * 1e9 * 0.85))
    # 256 operations an input at 71 * 0.85 TFLOPS take longer than its 2.53 bytes at 936 * 0.85 GB/s.
    products = 2 * 8192 * 4096 * 128 / (71e12 * 0.85)
    assert activation_seconds(rtx3090, 8192, 4096, 128, DENSE) == pytest.approx(products)
    assert learned_transform_cost(a100, 2048, DENSE) < 1.01 < learned_transform_cost(rtx3090, 2048, DENSE) < 1.05
    # 6.2 % more bytes: (4096 * 3 + 14336) * 256 of matrices to 218 M codes of half a byte and their scales.
    weights = sum(sum(outputs) * k for outputs, k in (([6144], 4096), ([4096], 4096), ([28672], 4096), ([4096], 14336)))
    share = (3 * 4096 + 14336) * 256 / (weights * (0.5 + 2 / 128))
    assert learned_transform_cost(a100, 1, DENSE) == pytest.approx(1 + share, rel=0.01)


def test_error_feedback_by_hand() -> None:
    """184 rows for the 128 of a dense transform: of 128 numbers of two bytes to read, and of products."""
    a100, rtx3090 = get_gpu("A100"), get_gpu("RTX 3090")
    # One token, 32 blocks: 368 bytes an input of matrices, 2.53 of the input, its codes and scales.
    moved = 32 * 184 * 128 * 2 + 4096 * 2 + 4096 / 2 + 4 * 32
    assert activation_seconds(a100, 1, 4096, 128, FEEDBACK) == pytest.approx(moved / (2039e9 * 0.85))
    # On the A100 the products of many tokens hide: 368 operations an input at 312 TFLOPS are faster than 2.53 bytes.
    moved = 8192 * (4096 * 2 + 4096 / 2 + 4 * 32) + 32 * 184 * 128 * 2
    assert activation_seconds(a100, 8192, 4096, 128, FEEDBACK) == pytest.approx(moved / (2039e9 * 0.85))
    # On the RTX 3090 they do not: 128 + 56 products of 128 for a dense transform's 128.
    products = 2 * 8192 * 4096 * 184 / (71e12 * 0.85)
    assert activation_seconds(rtx3090, 8192, 4096, 128, FEEDBACK) == pytest.approx(products)
    assert products == pytest.approx(activation_seconds(rtx3090, 8192, 4096, 128, DENSE) * (128 + 56) / 128)
    # It is in the time of an input once, whatever reads it.
    seconds = {
        kind: input_group_seconds(rtx3090, 8192, [4096, 1024], 4096, 128, transform=kind)
        for kind in (HADAMARD, FEEDBACK)
    }
    hidden = activation_seconds(rtx3090, 8192, 4096, 128)
    assert seconds[FEEDBACK] - seconds[HADAMARD] == pytest.approx(products - hidden)
    dense, feedback = (learned_transform_cost(a100, 1, kind) for kind in (DENSE, FEEDBACK))
    assert (feedback - 1) / (dense - 1) == pytest.approx(184 / 128, rel=1e-6)
    # A row of clip ratios more is read, and not multiplied.
    sixteen = TransformKind.FEEDBACK_16
    assert (learned_transform_cost(a100, 1, sixteen) - 1) / (dense - 1) == pytest.approx(185 / 128, rel=1e-6)
    assert activation_seconds(rtx3090, 8192, 4096, 128, sixteen) == pytest.approx(products)


def test_one_shared_matrix_is_read_once() -> None:
    a100 = get_gpu("A100")
    extra = activation_seconds(a100, 1, 4096, 128, TransformKind.SHARED) - activation_seconds(a100, 1, 4096, 128)
    assert extra == pytest.approx(128 * 128 * 2 / (2039e9 * 0.85))


def test_an_eight_bit_linear_by_hand() -> None:
    """Compute bound: the account of its main loop; memory bound: the bytes of the weights are those of 4 bits, and a unit."""
    for name in ("A100", "RTX 3090", "L40S"):
        gpu = get_gpu(name)
        clocks = best_loop(gpu, activation_bits=8).product_clocks(gpu)
        seconds = 8192 * 4096 * 4096 / 128 / 128 * clocks / gpu.sms / (gpu.clock_mhz * 1e6) / EFFICIENCY_EIGHT_BIT
        for group_size in (128, 512, CHANNEL):
            assert gemm_seconds(gpu, 8192, 4096, 4096, group_size, activation_bits=8) == pytest.approx(seconds)
        assert gemm_seconds(gpu, 8192, 4096, 4096, 128) < seconds  # four bits are faster on all of these
        few = (14336 * 4096 / 2 + 2 * 14336 * 32 + 4096 + 4 + 2 * 14336) / (gpu.memory_gbs * 1e9 * 0.85)
        assert gemm_seconds(gpu, 1, 14336, 4096, 128, activation_bits=8) == pytest.approx(few)
        moved = (3 * 8192 * 4096 + 4 * 8192) / (gpu.memory_gbs * 1e9 * 0.85)
        assert activation_seconds(gpu, 8192, 4096, 128, activation_bits=8) == pytest.approx(moved)
        both = input_group_seconds(gpu, 8192, [4096, 4096], 4096, 128, activation_bits=8)
        assert both == pytest.approx(2 * seconds + moved)
