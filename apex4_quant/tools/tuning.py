"""`apex4 kernels tune`: time every plan of the W4A4 GEMM for the shapes of a model on this GPU, and keep the winners.

What is kept decides from then on (tuned.py); the heuristic decides for other shapes, and its own plan stays where
no other is faster by more than `MARGIN`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..environment import GEMM as VARIABLE
from ..errors import Apex4Error, UsageError
from ..format.number_format import BLOCK, CODE_MAX
from ..kernels.gemm import tuned
from ..kernels.gemm.configs import GemmPlan, candidates, choose_gemm
from ..progress import Progress
from .bench import SHAPES, BenchSettings, Timer, parse_list

MARGIN = 0.02  # what two runs of one plan may differ by
_OUT = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class TuneSettings:
    shapes: tuple[str, ...]  # as `apex4 bench --shapes`
    tokens: tuple[int, ...] = tuned.TOKENS
    out: str = "bf16"
    repeats: int = 10
    device: str = "cuda"

    def check(self) -> None:
        if not self.shapes:
            raise UsageError(f"no shapes to tune for: give --shapes with {', '.join(SHAPES)}, MODEL:LAYER, or NxK")
        wrong = [m for m in self.tokens if m not in tuned.TOKENS]
        if wrong:
            raise UsageError(f"plans are kept for {', '.join(map(str, tuned.TOKENS))} tokens, not for {wrong[0]}")


def settings_of(shapes: str, tokens: str, out: str, repeats: int) -> TuneSettings:
    """From the command line's texts. Raises UsageError."""
    parts = parse_list(tokens)
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{tokens!r} is no list of numbers of tokens")
    return TuneSettings(parse_list(shapes), tuple(map(int, parts)) or tuned.TOKENS, out, repeats)


@contextmanager
def plan_forced(plan: GemmPlan) -> Iterator[None]:
    """The operators use this plan."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = plan.label
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def winner(times: list[tuple[GemmPlan, float]], heuristic: GemmPlan) -> tuple[GemmPlan, float]:
    """The fastest plan, or the heuristic's own where that is as fast."""
    best = min(times, key=lambda each: each[1])
    own = next((each for each in times if each[0] == heuristic), None)
    return own if own is not None and own[1] <= (1 + MARGIN) * best[1] else best


def tune(settings: TuneSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, keep, report. Raises Apex4Error without a GPU that has kernels, UsageError for settings."""
    import torch

    from ..kernels.catalogue import kernel_family

    settings.check()
    layers = BenchSettings(shapes=settings.shapes).layers()
    if not torch.cuda.is_available():
        raise Apex4Error("tuning needs an NVIDIA GPU and finds none")
    device = torch.device(settings.device)
    properties = torch.cuda.get_device_properties(device)
    sm, sm_count = 10 * properties.major + properties.minor, properties.multi_processor_count
    if kernel_family(sm) is None:
        raise Apex4Error(f"{properties.name} is sm_{sm}, for which there are no kernels to tune")
    timer = Timer(device, settings.repeats)
    measured: dict[str, dict[str, Any]] = {}
    for name, n, k in layers:
        for m in settings.tokens:
            entry = _tune_shape(sm, sm_count, m, n, k, settings, timer, device)
            measured[tuned.key(m, n, -(-k // BLOCK), 1, settings.out)] = entry
            if progress is not None:
                progress.line(
                    f"{name or f'{n}x{k}':20} M {m:5}  {entry['plan']:24} {entry['microseconds']:9.1f} us, "
                    f"heuristic {entry['heuristic']:24} {entry['heuristic_microseconds']:9.1f} us"
                )
    file = tuned.add(sm, sm_count, properties.name, measured)
    return {"gpu": properties.name, "file": str(file), "shapes": measured}


def _tune_shape(
    sm: int, sm_count: int, m: int, n: int, k: int, settings: TuneSettings, timer: Timer, device: Any
) -> dict[str, Any]:
    import torch

    from ..format.layouts import get_layout
    from ..kernels import ops

    k_blocks = -(-k // BLOCK)
    family = "sm90" if sm == 90 else "sm80"
    generator = torch.Generator(device).manual_seed(0)
    codes_w = torch.randint(-CODE_MAX, CODE_MAX + 1, (n, k_blocks * BLOCK), generator=generator, device=device)
    layout = get_layout(family)
    packed = layout.pack(codes_w.to(torch.int8))
    scales = layout.pack_scales((torch.rand(n, k_blocks, generator=generator, device=device) + 0.1).half())
    dtype = getattr(torch, _OUT[settings.out])
    x = torch.randn(m, k, dtype=dtype, device=device, generator=generator)
    codes, factors = ops.quantize(x, None, k_blocks * BLOCK, BLOCK, 1.0, True, family)
    options = candidates(sm, sm_count, m, n, k_blocks, 1, settings.out)
    times = []
    for plan in options:
        with plan_forced(plan):
            times.append(
                (plan, timer.seconds(lambda: ops.gemm(codes, factors, packed, scales, None, None, m, n, dtype)))
            )
    heuristic = choose_gemm(sm, sm_count, m, n, k_blocks, 1, settings.out, measured=False)
    best, seconds = winner(times, heuristic)
    own = next((each for plan, each in times if plan == heuristic), seconds)
    return {
        "plan": best.label,
        "microseconds": round(seconds * 1e6, 2),
        "heuristic": heuristic.label,
        "heuristic_microseconds": round(own * 1e6, 2),
    }
