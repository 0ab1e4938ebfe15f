"""One run of apex4's quantizer in a process of its own; what it took is JSON in the last line.

    apex4_worker.py RECIPE MODEL OUT [--device cuda] [--samples 128] [--seq-len 2048]

scripts/bench_gpu_quantize starts it: `apex4 quantize` does not tell its peak of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import torch

from apex4_quant import QuantizeSettings, quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args()
    settings = QuantizeSettings(
        model=args.model, recipe=args.recipe, device=args.device, samples=args.samples, seq_len=args.seq_len
    )
    result = quantize(settings, args.out)
    on_gpu = args.device.startswith("cuda")
    print(
        json.dumps(
            {
                "seconds": result.seconds,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
                "gpu": torch.cuda.get_device_name() if on_gpu else None,
                "quantized_linears": len(result.plan.linears),
            }
        )
    )


if __name__ == "__main__":
    main()
