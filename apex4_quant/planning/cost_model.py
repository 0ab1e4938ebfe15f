"""How long a linear takes on a GPU of the table: a prediction, not a measurement. Torch-free.

For M tokens, N outputs, K inputs (padded) in G groups:

    arithmetic   M N K / 128 products, each the clocks that the account of issue slots gives the compiled main loop on
                 this GPU (issue_model.py: tensor cores, CUDA cores, shared memory, issue; one fitted efficiency)
    memory       B = (N K / 2 + 2 N G + M K / 2 + 4 M G + 2 M N) / bandwidth
    GEMM           = max(arithmetic, B)
    8-bit activations: M K + 4 M for M K / 2 + 4 M G, here and below, and the account of the 8-bit main loop
    quantization   = (2 M K + M K / 2 + 4 M G) / bandwidth  of the activations, once per input; a learned transform adds
                     2 R K bytes of matrices, and its 2 R M K operations at the 16-bit rate overlap with the memory: R
                     is 128, and with error feedback 128 + 56, which is as many rows and as many products; a row of
                     clip ratios is read, and not multiplied

`dequantization_load` is lambda = c rho / g: CUDA-core time over tensor-core time of one GEMM. c counts the FP32
instruction slots per accumulator and group, rho is the GPU's INT4 rate over its FP32 rate, g the group size. A mainloop
that overlaps both hides its dequantization while lambda, and what else its CUDA cores do, is <= 1.
Not modelled: waves that do not fill the GPU, launch latency, small tiles at few tokens, the arithmetic of rounding (with
error feedback its steps wait for each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..format.number_format import (
    BLOCK,
    CHANNEL,
    CLIP_ROWS,
    GroupSize,
    group_count,
    group_length,
    padded_in_features,
)
from ..format.transform_kind import TransformKind
from ..hardware.gpus import GPUS, Gpu, resolve_target
from . import issue_model
from .issue_model import FP16_SHARE, MEMORY_SHARE


@dataclass(frozen=True)
class Mainloop:
    """How a kernel turns integer sums into floats; what it costs is counted in kernels/mainloop_counts.json."""

    name: str
    summary: str
    ours: bool

    def loop(self, gpu: Gpu, blocks_per_group: float = 1) -> issue_model.Loop:
        return issue_model.best_loop(gpu, blocks_per_group) if self.ours else issue_model.control(gpu)

    def slots(self, gpu: Gpu) -> float:
        """c: FP32-rate slots per accumulator and group on this GPU.

        What a row or column of accumulators shares (scales made ready) is not in it: counts are rounded.
        """
        counts, rates = self.loop(gpu).classes, issue_model.RATES[gpu.sm]
        per_accumulator = {name: round(counts.get(name, 0)) for name in ("ffma", "fmul", "i2f")}
        return per_accumulator["ffma"] + per_accumulator["fmul"] + per_accumulator["i2f"] * rates.i2f / rates.fma


MAINLOOPS: dict[str, Mainloop] = {
    loop.name: loop
    for loop in (
        Mainloop("two-ffma", "this project's: two FFMA, overlapped", ours=True),
        # The conversion waits for the mma and the next mma for the conversion. A model with overlap cannot give the
        # published ratios of A100 and RTX 3090 at once.
        Mainloop("naive", "I2F, FMUL and FFMA, in turns with the mma", ours=False),
    )
}
OURS, NAIVE = MAINLOOPS["two-ffma"], MAINLOOPS["naive"]

DEFAULT_BUDGET = (
    1.05  # a plan may take this multiple of the fastest plan's predicted time: what lambda <= 1 costs, and no more
)
DEFAULT_TOKENS = 2048
_EXAMPLE_K = 4096  # for tables of GPUs: the hidden size of an 8B model
_LEARNED = {  # by key of gpus --json
    "dense_transform": TransformKind.DENSE,
    "feedback_transform": TransformKind.FEEDBACK_16,
}
_EXAMPLE_LAYER = (([4096, 1024, 1024], 4096), ([4096], 4096), ([14336, 14336], 4096), ([4096], 14336))


def get_mainloop(name: str) -> Mainloop:
    if name not in MAINLOOPS:
        raise UsageError(f"mainloop {name!r} is not known: give one of {', '.join(MAINLOOPS)}")
    return MAINLOOPS[name]


def get_gpu(target: str) -> Gpu:
    """The GPU of the table that `--target` names. Raises UsageError where times cannot be predicted."""
    name = resolve_target(target).gpu
    if name is None:
        raise UsageError(f"target {target!r} is no GPU whose rates are known: give one of {', '.join(GPUS)}")
    return GPUS[name]


def dequantization_load(gpu: Gpu, in_features: int, group_size: GroupSize, mainloop: Mainloop = OURS) -> float:
    """lambda = c * rho / g, CUDA-core time over tensor-core time of one GEMM."""
    return mainloop.slots(gpu) * gpu.rho / group_length(in_features, group_size)


def _memory_seconds(gpu: Gpu, size: float) -> float:
    return size / (gpu.memory_gbs * 1e9 * MEMORY_SHARE)


def gemm_seconds(
    gpu: Gpu, m: int, n: int, k: int, group_size: GroupSize, mainloop: Mainloop = OURS, activation_bits: int = 4
) -> float:
    """Predicted seconds of the GEMM alone: x [m, k] quantized to 4 or 8 bits, weight [n, k], y [m, n] in 16 bits.

    With 8 bits the groups cost nothing, whatever their size, and `mainloop` says nothing.
    """
    padded, groups = padded_in_features(k, group_size), group_count(k, group_size)
    blocks_per_group = padded / BLOCK / groups
    if activation_bits == 8:
        loop = issue_model.best_loop(gpu, activation_bits=8)
        activations = m * padded + 4 * m
    else:
        loop = mainloop.loop(gpu, blocks_per_group)
        activations = m * padded // 2 + 4 * m * groups
    arithmetic = issue_model.mainloop_seconds(gpu, loop, m, n, padded, blocks_per_group)
    memory = _memory_seconds(gpu, n * padded / 2 + 2 * n * groups + activations + 2 * m * n)
    return max(arithmetic, memory)


def activation_seconds(
    gpu: Gpu,
    m: int,
    k: int,
    group_size: GroupSize,
    transform: TransformKind = TransformKind.HADAMARD,
    activation_bits: int = 4,
) -> float:
    """Predicted seconds of transforming x [m, k] and quantizing it from 16 bits. Transforms that are not learned take none."""
    padded, groups = padded_in_features(k, group_size), group_count(k, group_size)
    stored = m * padded / 2 + 4 * m * groups if activation_bits == 4 else m * padded + 4 * m
    moved = 2 * m * k + stored
    if not transform.is_learned:
        return _memory_seconds(gpu, moved)
    matrices = 2 * transform.matrix_count(padded // BLOCK) * transform.matrix_rows * BLOCK
    multiplied = transform.matrix_rows - CLIP_ROWS * transform.has_block_clips
    products = 2 * m * padded * multiplied / (gpu.fp16_tflops * 1e12 * FP16_SHARE)
    return max(_memory_seconds(gpu, moved + matrices), products)


def input_group_seconds(
    gpu: Gpu,
    m: int,
    outputs: Sequence[int],
    k: int,
    group_size: GroupSize,
    mainloop: Mainloop = OURS,
    transform: TransformKind = TransformKind.HADAMARD,
    activation_bits: int = 4,
) -> float:
    """Predicted seconds of the linears [n, k], n in `outputs`, that share one input: it is transformed and quantized once."""
    gemms = sum(gemm_seconds(gpu, m, n, k, group_size, mainloop, activation_bits) for n in outputs)
    return gemms + activation_seconds(gpu, m, k, group_size, transform, activation_bits)


def fp16_seconds(gpu: Gpu, m: int, n: int, k: int) -> float:
    """Predicted seconds of the same linear in 16 bits through cuBLAS."""
    return max(2 * m * n * k / (gpu.fp16_tflops * 1e12 * FP16_SHARE), _memory_seconds(gpu, 2 * (n * k + m * k + m * n)))


def learned_transform_cost(gpu: Gpu, tokens: int, transform: TransformKind) -> float:
    """Predicted time of the linears of a Llama-3-8B layer at g128 with a learned transform over that with Hadamard's."""
    return _layer_seconds(gpu, tokens, 128, transform=transform) / _layer_seconds(gpu, tokens, 128)


def _layer_seconds(
    gpu: Gpu,
    tokens: int,
    group_size: GroupSize,
    mainloop: Mainloop = OURS,
    transform: TransformKind = TransformKind.HADAMARD,
) -> float:
    return sum(
        input_group_seconds(gpu, tokens, outputs, k, group_size, mainloop, transform) for outputs, k in _EXAMPLE_LAYER
    )


def default_choice(gpu: Gpu, mainloop: Mainloop = OURS, learned: TransformKind = TransformKind.FEEDBACK_16) -> str:
    """What the planner does on this GPU with a Llama-3-8B and 4-bit activations, in words that `apex4 gpus` explains.

    `learned` is the recipe's transform. Where the dearest fits, which is the default, the other does.
    """

    def within_budget(transform: TransformKind) -> bool:
        fastest = min(_layer_seconds(gpu, DEFAULT_TOKENS, size, mainloop) for size in (128, 256, 512, CHANNEL))
        return _layer_seconds(gpu, DEFAULT_TOKENS, 128, mainloop, transform) <= DEFAULT_BUDGET * fastest

    if within_budget(learned):
        return "g128, learned"
    return "g128, some learned" if within_budget(TransformKind.HADAMARD) else "some g128, learned"


def gpus_as_dict() -> dict[str, Any]:
    """What `apex4 gpus --json` prints."""
    return {
        "slots_per_group": OURS.slots(GPUS["A100"]),
        "channel_in_features": _EXAMPLE_K,
        "gpus": [
            {
                "name": gpu.name,
                "sm": gpu.sm,
                "tensor_tops": gpu.tensor_tops,
                "tensor_bits": 8 if gpu.int4_tops is None else 4,
                "fp16_tflops": gpu.fp16_tflops,
                "fp32_tflops": gpu.fp32_tflops,
                "memory_gbs": gpu.memory_gbs,
                "note": gpu.note,
                "rho": round(gpu.rho, 2),
                "lambda": {
                    str(size): round(dequantization_load(gpu, _EXAMPLE_K, size), 4) for size in (128, 256, 512, CHANNEL)
                },
                **{
                    key: {
                        str(tokens): round(learned_transform_cost(gpu, tokens, transform), 4)
                        for tokens in (1, DEFAULT_TOKENS)
                    }
                    for key, transform in _LEARNED.items()
                },
                "default": default_choice(gpu),
            }
            for gpu in GPUS.values()
        ],
    }


def gpus_as_text() -> str:
    """The table of `apex4 gpus`."""
    values = gpus_as_dict()
    header = f"{'GPU':9} {'sm':>3} {'tensor TOPS':>11} {'FP16':>6} {'FP32':>6} {'GB/s':>5} {'rho':>5}"
    header += "".join(f" {'l@' + size[:3]:>5}" for size in values["gpus"][0]["lambda"])
    header += "".join(f" {key[0].upper() + '@' + tokens:>6}" for key in _LEARNED for tokens in values["gpus"][0][key])
    lines = [header + "  default"]
    for gpu in values["gpus"]:
        tops = f"{gpu['tensor_tops']:g} {'INT4' if gpu['tensor_bits'] == 4 else '8bit'}"
        row = f"{gpu['name']:9} {gpu['sm']:3} {tops:>11} {gpu['fp16_tflops']:6g} {gpu['fp32_tflops']:6g}"
        row += f" {gpu['memory_gbs']:5g}"
        loads = "".join(f" {load:5.3f}" for load in gpu["lambda"].values())
        learned = "".join(f" {cost:5.2f}x" for key in _LEARNED for cost in gpu[key].values())
        lines.append(f"{row} {gpu['rho']:5.1f}{loads}{learned}  {gpu['default']}")
    lines += [
        "FP16, FP32: dense TFLOPS. rho: tensor rate / FP32 rate.",
        f"l@g: lambda = c * rho / g with c = {values['slots_per_group']:g} FP32 slots per accumulator and group "
        f"(mainloop {OURS.name});",
        f"     cha: per channel, g = K = {values['channel_in_features']}. lambda <= 1 hides behind the tensor cores.",
        f"D@M, F@M: time of the linears of a Llama-3-8B layer, M tokens, with {TransformKind.DENSE} and with "
        f"{TransformKind.FEEDBACK_16} transforms",
        "     over that with Hadamard's.",
        "Default: what the planner takes with 4-bit activations, as --mode w4a4.",
        f"Within {DEFAULT_BUDGET:g}x of the fastest: g128, learned = groups of 128 everywhere and the recipe's learned "
        "transform for every",
        "input that gains by it; some = where most is gained.",
        "All predicted from datasheet rates and counted instructions, nothing is measured.",
        *(f"{gpu['name']}: {gpu['note']}." for gpu in values["gpus"] if gpu["note"]),
    ]
    return "\n".join(lines)
