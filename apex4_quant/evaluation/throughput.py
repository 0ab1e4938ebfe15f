"""`apex4 eval --throughput`: tokens a second of prefill and of decoding, and peak memory, of a model and its original.

One run is what a batch of requests costs: a prefill of `batch` prompts into a static cache, then one token for each
request at a time, greedily. On a GPU a decoding step is one CUDA graph, replayed, so that what is measured is the GPU and
not Python; on a CPU it is a plain loop. Times are medians of several runs after warm-up. Tokens are random: no figure
here depends on what a model says.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.load import load_model, quant_config_of, release_memory
from ..errors import UsageError
from ..format.storage import format_bytes
from ..hardware.devices import DTYPES, resolve_device, resolve_dtype
from ..kernels.dispatch import asked_activations
from ..models.source import read_config, resolve_model
from ..nn.arithmetic import arithmetic_of
from ..progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNS, WARM_UP = 5, 2


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
    device = resolve_device(settings.device)
    asked_activations()
    names = [settings.model] + ([settings.baseline] if settings.baseline else [])
    prepared = [_prepare(name, settings) for name in names]  # all that can be wrong, before anything is loaded
    results = []
    for name, (folder, format, dtype) in zip(names, prepared, strict=True):
        progress.line(
            f"{name}: {format}, {settings.batch} x ({settings.prompt_len} + {settings.gen_len}) tokens on {device}"
        )
        model = load_model(folder, device, DTYPES[dtype], as_it_is=True)
        measured = measure(model, settings.batch, settings.prompt_len, settings.gen_len)
        results.append({"model": name, "format": format, "dtype": dtype} | measured)
        del model
        release_memory()
    return {
        "batch": settings.batch,
        "prompt_len": settings.prompt_len,
        "gen_len": settings.gen_len,
        "device": device,
        "result": results[0],
        "baseline": results[1] if settings.baseline else None,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _prepare(name: str, settings: ThroughputSettings) -> tuple[Path, str, str]:
    folder = resolve_model(name)
    config = read_config(folder)
    quantized = quant_config_of(config)
    dtype = resolve_dtype(settings.dtype, config)
    context = config.get("max_position_embeddings")
    if context and settings.prompt_len + settings.gen_len > context:
        raise UsageError(
            f"{name} has a context of {context} tokens and {settings.prompt_len} + {settings.gen_len} are asked for: "
            "give a smaller --prompt-len or --gen-len"
        )
    return folder, dtype if quantized is None else f"{quantized.name} g{quantized.group_size}, {dtype}", dtype


@torch.inference_mode()
def measure(model: PreTrainedModel, batch: int, prompt_len: int, gen_len: int) -> dict[str, Any]:
    """Figures of one loaded model. `prefill`, `decode` and the whole have the keys of `vllm bench throughput`.

    `peak_memory_bytes` has the weights in it; on a CPU it is that of the process.
    """
    device = model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt_len), generator=generator).to(device)
    _reset_peak(device)
    run = _Run(model, ids, gen_len)
    for _ in range(WARM_UP):
        run.prefill()
        run.decode()
    prefills, decodes = [], []
    for _ in range(RUNS):
        prefills.append(_seconds(run.prefill, device))
        decodes.append(_seconds(run.decode, device))
    prefill, decode = statistics.median(prefills), statistics.median(decodes)
    return {
        **_figures(batch, batch * (prompt_len + gen_len), prefill + decode),
        "prefill": _figures(batch, batch * prompt_len, prefill),
        "decode": _figures(batch, batch * (gen_len - 1), decode),  # the first token is the prefill's
        "peak_memory_bytes": _peak(device),
        "cuda_graph": run.uses_graph,
        **arithmetic_of(model),
    }


def _figures(requests: int, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "elapsed_time": seconds,
        "num_requests": requests,
        "total_num_tokens": tokens,
        "requests_per_second": requests / seconds,
        "tokens_per_second": tokens / seconds,
    }


class _Run:
    """One batch of requests: its prompts `ids`, a cache for all their tokens, and how a step is made."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, gen_len: int) -> None:
        from transformers import StaticCache

        self._model, self._ids, self._gen_len = model, ids, gen_len
        self._length = ids.shape[1] + gen_len
        self._cache = StaticCache(config=model.config, max_cache_len=self._length)
        self._next = torch.zeros(ids.shape[0], 1, dtype=torch.long, device=ids.device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
        self._places = torch.arange(self._length, device=ids.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        # A sliding window's place is counted on the host, which a graph would not do again.
        self.uses_graph = ids.device.type == "cuda" and not any(
            getattr(layer, "is_sliding", False) for layer in self._cache.layers
        )

    def prefill(self) -> None:
        self._cache.reset()
        output = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next.copy_(output.logits[:, -1:].argmax(-1))
        self._position.fill_(self._ids.shape[1])

    def decode(self) -> None:
        """All tokens after the first. Needs a prefill before it."""
        steps = self._gen_len - 1
        if self.uses_graph and self._graph is None:
            steps -= self._capture()
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _step(self) -> None:
        # The mask is ours, so that no step of the model's own looks at positions from the host.
        mask = (self._places <= self._position).expand(self._ids.shape[0], 1, 1, -1)
        output = self._model(
            input_ids=self._next,
            attention_mask=mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._next.copy_(output.logits[:, -1:].argmax(-1))
        self._position.add_(1)

    def _capture(self) -> int:
        """Make the graph of a step; returns how many steps were made on the way."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()  # recorded, not done
        self._graph = graph
        return 1


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: the process's peak starts anew
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def throughput_as_text(result: dict[str, Any]) -> str:
    """The table for people."""
    measured, baseline = result["result"], result["baseline"]
    kernels, bits = ", ".join(measured["kernels"]) or "none", " and ".join(map(str, measured["activation_bits"]))
    computed = f"kernels {kernels}" + (f", {bits}-bit activations" if bits else "")
    lines = [
        f"{measured['model']}: {measured['format']}, {computed}, {result['device']}",
        f"{result['batch']} requests of {result['prompt_len']} + {result['gen_len']} tokens, medians of {RUNS} runs, "
        f"decoding by {'a CUDA graph' if measured['cuda_graph'] else 'a plain loop'}",
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
    memory = f"  {'peak memory':12}  "
    if baseline:
        memory += f"{format_bytes(baseline['peak_memory_bytes']):>14}  "
    lines.append(memory + f"{format_bytes(measured['peak_memory_bytes']):>14}")
    return lines
