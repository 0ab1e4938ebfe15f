"""`apex4 eval --throughput`: tokens a second of prefill and of decoding, and peak memory, of a model and its original.

What a run is, and how it is timed, is the engine's: generation_speed.py (transformers), vllm_engine.py. Tokens are random.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.load import quant_config_of
from ..errors import UsageError
from ..format.storage import format_bytes
from ..hardware.devices import resolve_dtype
from ..kernels.dispatch import asked_activations
from ..models.place import require_there
from ..models.source import language_settings, read_config, resolve_model
from ..progress import Progress
from .engine import RUNS, EngineName, Load, where
from .engines import open_engine


@dataclass(frozen=True)
class ThroughputSettings:
    """`batch` requests of `prompt_len` tokens, each answered by `gen_len`."""

    model: str
    baseline: str | None = None
    batch: int = 1
    prompt_len: int = 512
    gen_len: int = 128
    device: str = "auto"
    dtype: str = "auto"
    engine: str = EngineName.TRANSFORMERS


def throughput(settings: ThroughputSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Everything `apex4 eval --throughput --json` prints. Raises UsageError or Apex4Error."""
    started = time.perf_counter()
    progress = progress or Progress()
    for name, value, least in (
        ("batch", settings.batch, 1),
        ("prompt-len", settings.prompt_len, 1),
        ("gen-len", settings.gen_len, 2),
    ):
        if value < least:
            raise UsageError(f"--{name} is {value}: give at least {least}")
    require_there(settings.model, settings.baseline)
    engine = open_engine(settings.engine, settings.device)
    asked_activations()
    names = [settings.model] + ([settings.baseline] if settings.baseline else [])
    prepared = [_prepare(name, settings) for name in names]  # all that can be wrong, before anything is loaded
    load = Load(settings.batch, settings.prompt_len, settings.gen_len)
    results = []
    for name, (folder, format, dtype) in zip(names, prepared, strict=True):
        progress.line(
            f"{name}: {format}, {settings.batch} x ({settings.prompt_len} + {settings.gen_len}) tokens on {engine.device}"
        )
        measured = engine.speed(folder, dtype, load)
        results.append({"model": name, "format": format, "dtype": dtype} | measured)
    return {
        "batch": settings.batch,
        "prompt_len": settings.prompt_len,
        "gen_len": settings.gen_len,
        "device": engine.device,
        "engine": str(settings.engine),
        "engine_version": engine.version,
        "result": results[0],
        "baseline": results[1] if settings.baseline else None,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _prepare(name: str, settings: ThroughputSettings) -> tuple[Path, str, str]:
    folder = resolve_model(name)
    config = read_config(folder)
    quantized, config = quant_config_of(config), language_settings(folder, config)
    dtype = resolve_dtype(settings.dtype, config)
    context = config.get("max_position_embeddings")
    if context and settings.prompt_len + settings.gen_len > context:
        raise UsageError(
            f"{name} has a context of {context} tokens and {settings.prompt_len} + {settings.gen_len} are asked for: "
            "give a smaller --prompt-len or --gen-len"
        )
    return folder, dtype if quantized is None else f"{quantized.name} g{quantized.group_size}, {dtype}", dtype


def throughput_as_text(result: dict[str, Any]) -> str:
    """The table for people."""
    measured, baseline = result["result"], result["baseline"]
    kernels, bits = ", ".join(measured["kernels"]) or "none", " and ".join(map(str, measured["activation_bits"]))
    computed = f"kernels {kernels}" + (f", {bits}-bit activations" if bits else "")
    lines = [
        f"{measured['model']}: {measured['format']}, {computed}, {where(result)}",
        f"{result['batch']} requests of {result['prompt_len']} + {result['gen_len']} tokens, medians of {RUNS} runs, "
        f"decoding by {'CUDA graphs' if measured['cuda_graph'] else 'a plain loop'}",
    ]
    return "\n".join(lines + comparison(measured, baseline))


def comparison(measured: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    """The rows: a figure, the baseline's and the ratio of speeds."""
    rows = [
        ("prefill", measured["prefill"], baseline and baseline["prefill"]),
        ("decode", measured["decode"], baseline and baseline["decode"]),
        ("both", measured, baseline),
    ]
    head = f"  {'':12}  {'baseline':>14}  {'model':>14}  {'speed':>6}" if baseline else f"  {'':12}  {'model':>14}"
    lines = [head]
    for name, ours, theirs in rows:
        speed = ours["tokens_per_second"]
        line = f"  {name + ' tok/s':12}  "
        if theirs:
            line += f"{theirs['tokens_per_second']:14.1f}  {speed:14.1f}  {speed / theirs['tokens_per_second']:5.2f}x"
        else:
            line += f"{speed:14.1f}"
        lines.append(line)
    peak = measured["peak_memory_bytes"]
    if peak is not None:  # vLLM reserves what it is allowed to, whatever the model needs
        other = f"{format_bytes(baseline['peak_memory_bytes']):>14}  " if baseline else ""
        lines.append(f"  {'peak memory':12}  {other}{format_bytes(peak):>14}")
    return lines
