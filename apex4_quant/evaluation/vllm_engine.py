"""The engine of `--engine vllm`: the model as `vllm serve` runs it, asked through vLLM's own classes.

Perplexity is made of prompt logprobs, which vLLM computes for every token of a window. It also says which token it finds the
most probable, so that the agreement with a baseline costs nothing. It hands out no whole distributions but as one Python
object for every entry of the vocabulary, some hundred million a run: there is no divergence here.

Speed is counted as `vllm bench latency` counts it, for a batch of requests sent at once, prefix caching off: prefill is the
time of a batch with one generated token, and decoding what a batch with all of them takes longer.

vLLM is an optional library. It runs its engine in processes of its own unless VLLM_ENABLE_V1_MULTIPROCESSING=0.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.check import stored_formats
from ..checkpoint.inspect import Checkpoint
from ..checkpoint.load import quant_config_of, verify_checksums
from ..errors import Apex4Error, UsageError
from ..kernels import dispatch
from ..models.source import read_config
from ..nn.arithmetic import Arithmetic
from ..progress import Progress
from .engine import RUNS, WARM_UP, Load, Quality, Results, Subject, Tasks, figures_of
from .lm_eval_tasks import run_tasks
from .predictions import Advance, perplexity_of, predicted

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# vLLM writes its log to stdout, where the result belongs.
_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # A window as long as the model's context needs room for one token more, which vLLM generates and never computes with.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
_WINDOWS = 8  # given to vLLM at one time, between two reports of progress
# Of a step: the probabilities of so many tokens are in memory at once, beside what vLLM has reserved.
_STEP_TOKENS = 1024
_CPU_CACHE_BYTES = 2**30  # of the KV cache on a CPU, where vLLM would take half of the memory


class VllmEngine:
    def __init__(self, device: str) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UsageError(
                "--engine vllm needs vLLM in this environment, which has none that can be imported "
                f"({error}): pip install vllm, or leave --engine away"
            ) from error
        self.version: str = vllm.__version__
        self.device: str = "cpu" if current_platform.is_cpu() else "cuda"
        if device not in ("auto", self.device):
            raise UsageError(
                f"--device {device} is asked for and the vLLM of this environment computes on {self.device}: leave --device "
                "away; CUDA_VISIBLE_DEVICES chooses the GPU"
            )

    def quality(
        self, subject: Subject, baseline: Subject | None, ids: torch.Tensor, tasks: Tasks | None, progress: Progress
    ) -> Quality:
        measured = []
        for each in (subject,) if baseline is None else (baseline, subject):
            with progress.stage(f"perplexity of {each.name} in vLLM", ids.numel(), "tok") as advance:
                measured.append(self._measured(each, ids, tasks, advance))
        perplexity, tops, results = measured[-1]
        if baseline is None:
            return Quality(perplexity, results, self._arithmetic(subject.folder))
        original, its_tops, its_results = measured[0]
        agreement = float((tops == its_tops).double().mean())
        arithmetic = self._arithmetic(subject.folder)
        return Quality(perplexity, results, arithmetic, original, its_results, top1_agreement=agreement)

    def _measured(
        self, subject: Subject, ids: torch.Tensor, tasks: Tasks | None, advance: Advance
    ) -> tuple[float, torch.Tensor, Results]:
        """Perplexity on `ids`, the most probable tokens, and what the tasks give."""
        longest = ids.shape[1] + 1
        if tasks is not None:
            longest = max(longest, subject.context or longest)
        options = {"max_model_len": longest, "max_num_batched_tokens": _STEP_TOKENS, "enforce_eager": True}
        with self._running(
            subject.folder, subject.dtype, options, for_tasks=tasks is not None, bos=bool(subject.beginning)
        ) as (
            llm,
            wrapped,
        ):
            perplexity, tops = _predictions(llm, ids, advance)
            results = {} if tasks is None else run_tasks(lambda: wrapped, tasks)
        return perplexity, tops, results

    def speed(self, folder: Path, dtype: str, load: Load) -> dict[str, Any]:
        from vllm import SamplingParams

        options = {
            "max_model_len": load.prompt_len + load.gen_len,
            "max_num_seqs": load.batch,
            "enable_prefix_caching": False,
        }
        with self._running(folder, dtype, options) as (llm, _):
            vocabulary = llm.llm_engine.model_config.get_vocab_size()
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, vocabulary, (load.batch, load.prompt_len), generator=generator).tolist()
            prompts = [{"prompt_token_ids": each} for each in ids]

            def seconds(count: int) -> float:
                sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                started = time.perf_counter()
                llm.generate(prompts, sampling, use_tqdm=False)
                return time.perf_counter() - started

            prefill, whole = _medians(lambda: seconds(1), lambda: seconds(load.gen_len))
        return {
            # A whole that is not slower than its prefill is noise of the clock, with a handful of tokens.
            **figures_of(load, prefill, max(whole - prefill, 1e-9)),
            "peak_memory_bytes": None,
            "cuda_graph": self.device == "cuda",
            **self._arithmetic(folder),
        }

    def _arithmetic(self, folder: Path) -> Arithmetic:
        """What the plugin chooses for the linears of the checkpoint: integrations/vllm/backend.py."""
        if quant_config_of(read_config(folder)) is None:
            return {"activation_bits": [], "kernels": []}
        device = torch.device(self.device)
        widths = {
            dispatch.activation_bits(device, format.activation_bits)
            if format.may_have_eight_bits
            else format.activation_bits
            for _, format in stored_formats(Checkpoint(str(folder)))
        }
        kernels = {dispatch.kernel_format(device, bits) or dispatch.REFERENCE for bits in widths}
        return {"activation_bits": sorted(widths), "kernels": sorted(kernels)}

    @contextlib.contextmanager
    def _running(
        self, folder: Path, dtype: str, options: dict[str, Any], for_tasks: bool = False, bos: bool = False
    ) -> Iterator[tuple[Any, LM | None]]:
        """vLLM's `LLM` of the model, and the same wrapped for lm-eval. Raises Apex4Error for a model that it refuses."""
        if quant_config_of(read_config(folder)) is not None:
            verify_checksums(folder)
        options = options | {"dtype": dtype, "disable_log_stats": True}
        if self.device == "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            options["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
        with _stdout_to_stderr():
            llm = wrapped = None
            try:
                try:
                    if for_tasks:
                        from lm_eval.models.vllm_causallms import VLLM

                        wrapped = VLLM(pretrained=str(folder), batch_size="auto", add_bos_token=bos, **options)
                        llm = wrapped.model
                    else:
                        from vllm import LLM

                        llm = LLM(str(folder), **options)
                except (RuntimeError, ValueError, OSError, ImportError) as error:
                    if isinstance(error, Apex4Error):
                        raise
                    raise Apex4Error(
                        f"vLLM cannot run {folder} ({_first_line(error)}): its log above says why"
                    ) from error
                yield llm, wrapped
            finally:
                engine = None if llm is None else llm.llm_engine.engine_core
                if wrapped is not None:
                    wrapped.model = None
                del llm, wrapped
                if engine is not None:
                    engine.shutdown()
                del engine
                _release()


def _predictions(llm: Any, ids: torch.Tensor, advance: Advance) -> tuple[float, torch.Tensor]:
    """Perplexity on windows `ids`, int64 [windows, L], and the most probable tokens int64 [windows, L - 1]."""
    from vllm import SamplingParams

    # One token has to be generated; logprobs of a prompt keep vLLM from answering it from its prefix cache.
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    total, tops = 0.0, []
    for some in ids.split(_WINDOWS):
        prompts = [{"prompt_token_ids": window} for window in some.tolist()]
        for window, output in zip(some.tolist(), llm.generate(prompts, sampling, use_tqdm=False), strict=True):
            steps = list(zip(window[1:], output.prompt_logprobs[1:], strict=True))  # nothing predicts the first token
            total -= sum(step[token].logprob for token, step in steps)
            tops.append([next(one for one, entry in step.items() if entry.rank == 1) for _, step in steps])
        advance(some.numel())
    return perplexity_of(total, predicted(ids)), torch.tensor(tops)


def _medians(*measured: Callable[[], float]) -> list[float]:
    for _ in range(WARM_UP):
        for measure in measured:
            measure()
    runs = [[measure() for measure in measured] for _ in range(RUNS)]
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _release() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """For this process and those that it starts: what they print is no result."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
