"""One run of apex4's quantizer in a process of its own; what it took is JSON in the last line.

    apex4_worker.py RECIPE MODEL OUT [--device cuda] [--samples 128] [--seq-len 2048] [--calib bundled] [--seed 0]
                    [--activation-bits 4] [--memory SIZE]

scripts/bench/quantize and scripts/bench/real_models start it: `apex4 quantize` does not tell how long a layer takes. Under
torchrun it is one of several ranks, of which the first prints. Its times are then the first rank's, its peaks those of the rank
that needed most.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apex4_quant import QuantizeSettings, quantize
from apex4_quant.distributed.group import Group
from apex4_quant.distributed.starting import ranks
from apex4_quant.hardware.memory import MemoryBudget
from apex4_quant.progress import Progress


class Marks(Progress):
    """When the last linear of each layer was done, and when the first layer was begun. All layers are of one size."""

    def __init__(self, layers: int, on_gpu: bool) -> None:
        self.times: list[float] = []
        self.begun = 0.0
        self._layers, self._on_gpu = layers, on_gpu

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        done = 0
        if name == "quantizing":
            self.begun = time.perf_counter()

        def advance(more: int) -> None:
            nonlocal done
            done += more
            if name == "quantizing" and done * self._layers % total == 0:
                if self._on_gpu:
                    torch.cuda.synchronize()
                self.times.append(time.perf_counter())

        yield advance


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
    marks = Marks(layers, on_gpu)
    started = time.perf_counter()
    budget = None if args.memory is None else MemoryBudget.parse(args.memory)
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
