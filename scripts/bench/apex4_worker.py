"""One run of apex4's quantizer in a process of its own; what it took is JSON in the last line.

    apex4_worker.py RECIPE MODEL OUT [--device cuda] [--samples 128] [--seq-len 2048] [--calib bundled] [--seed 0]
                    [--activation-bits 4] [--memory SIZE] [--steps]

scripts/bench/quantize and scripts/bench/real_models start it: `apex4 quantize` does not tell how long a layer takes. Under
torchrun it is one of several ranks, of which the first prints. Its times are then the first rank's, its peaks those of the rank
that needed most. --steps times the steps of a layer too, on every rank, with a GPU that is waited for between them, so that all
takes longer than without.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.distributed.group import Group
from apex4_quant.distributed.starting import ranks
from apex4_quant.hardware.memory import MemoryBudget
from apex4_quant.progress import Progress, StepTimes


class Marks(Progress):
    """When the last linear of each layer was done, and when the first layer was begun. All layers are of one size.

    `steps` are what their steps took until then, if that is measured."""

    def __init__(self, layers: int, on_gpu: bool, measured: StepTimes | None) -> None:
        self.times: list[float] = []
        self.steps: list[dict[str, float]] = []
        self.begun = 0.0
        self.stages: dict[str, float] = {}
        self._layers, self._on_gpu, self._measured = layers, on_gpu, measured

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        done, started = 0, time.perf_counter()
        if name == "quantizing":
            self.begun = started
            self.note_steps()

        def advance(more: int) -> None:
            nonlocal done
            done += more
            if name == "quantizing" and done * self._layers % total == 0:
                if self._on_gpu:
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())
                self.note_steps()

        yield advance
        self.stages[name] = time.perf_counter() - started

    def note_steps(self) -> None:
        if self._measured is not None:
            self.steps.append(dict(self._measured.seconds))

    def seconds_of_steps(self) -> dict[str, float] | None:
        """Of a layer behind the first, in the mean; of the only one."""
        if self._measured is None:
            return None
        first, count = (self.steps[1], len(self.steps) - 2) if len(self.steps) > 2 else (self.steps[0], 1)
        return {name: (seconds - first.get(name, 0.0)) / count for name, seconds in self.steps[-1].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--calib", default="bundled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activation-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--memory", help="as of apex4 quantize")
    parser.add_argument("--steps", action="store_true", help="time the steps of a layer")
    args = parser.parse_args()
    with ranks(args.device) as group:
        found = run(args, group)
    if group.is_first:
        print(json.dumps(found))


def run(args: argparse.Namespace, group: Group) -> dict[str, Any]:
    settings = QuantizeSettings(
        model=args.model, recipe=args.recipe, device=args.device, samples=args.samples, seq_len=args.seq_len,
        calib=args.calib, seed=args.seed, activation_bits=args.activation_bits,
    )  # fmt: skip
    on_gpu = args.device == "cuda"
    layers = json.loads((Path(args.model) / "config.json").read_text())["num_hidden_layers"]
    measured = StepTimes(torch.cuda.synchronize if on_gpu else lambda: None) if args.steps else None
    marks = Marks(layers, on_gpu, measured)
    started = time.perf_counter()
    budget = None if args.memory is None else MemoryBudget.parse(args.memory)
    with nullcontext() if measured is None else measured.measuring():
        result = quantize(settings, args.out, progress=marks, group=group, memory=budget)
    used = result.as_dict()
    peaks = {
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "reserved_gpu_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
    }
    of_ranks = group.gather(peaks)
    return {
        "ranks": group.size,
        "seconds": result.seconds,
        "stages": marks.stages,
        "steps_of_ranks": None if measured is None else group.gather(marks.seconds_of_steps()),
        "layers_begun": marks.begun - started,
        "layers_done": [each - started for each in marks.times],
        **{name: peak if peak is None else max(each[name] or 0 for each in of_ranks) for name, peak in peaks.items()},
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "quantized_linears": len(result.records),
        "memory": used["peak_memory"],
        "states_on_disk": used["states_on_disk"],
        "experts_at_once": used["experts_at_once"],
        "mean_relative_error": used["mean_relative_error"],
    }


if __name__ == "__main__":
    main()
