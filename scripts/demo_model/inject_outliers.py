"""Write a copy of a model that computes the same function and has outlier channels in its activations.

    python scripts/demo_model/inject_outliers.py MODEL OUT [--factor 40] [--fraction 0.01] [--seed 0]

Large models have a few activation channels many times larger than the rest. Small models have not, and so they
quantize too easily to tell one method from another. On `fraction` of the channels (two at least, drawn anew for every
layer and site) what makes a channel is multiplied by `factor`, and what reads it is divided by it:

    input of q/k/v and of gate/up    gain of the RMSNorm    columns of these linears
    input of o                       rows of v              columns of o, in every query head that reads the channel
    input of down                    rows of up             columns of down

A power of two such as 32 changes exponents only: the function is the same but for the order of sums. Any other factor
rounds. All is computed in float64 and rounded once to the stored dtype, and the columns behind a gain are divided by
what the gain really became. So with 40 in bfloat16 a changed matrix entry is off by at most 1/256 of itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.format.storage import require_empty, write_tensors
from apex4_quant.models.companions import companions_of, copy_companions
from apex4_quant.models.families import Producer
from apex4_quant.models.source import ModelSource
from apex4_quant.models.weight_files import SINGLE_NAME

MIN_CHANNELS = 2


def draw(count: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """Sorted distinct channel numbers below `count`."""
    chosen = min(count, max(MIN_CHANNELS, round(fraction * count)))
    return torch.randperm(count, generator=generator)[:chosen].sort().values


def scale_gain(
    tensors: dict[str, torch.Tensor],
    norm: str,
    offset: float,
    channels: torch.Tensor,
    factor: float,
    stored: torch.dtype,
) -> torch.Tensor:
    """Multiply the gains of `channels`. Returns by how much, which rounding makes differ from `factor`."""
    gain = tensors[norm][channels] + offset
    # Rounded here and not with everything else, so that the columns can make up for it.
    rounded = (gain * factor - offset).to(stored).double()
    tensors[norm][channels] = rounded
    scaled = rounded + offset
    return torch.where(gain == 0, torch.ones_like(gain), scaled / gain)


def scale_producer(
    tensors: dict[str, torch.Tensor], layer: str, producer: Producer, channels: torch.Tensor, factor: float
) -> None:
    if producer.rows != "all":
        raise UsageError(f"{layer}{producer.linear} is a fused weight: only models with separate linears are supported")
    for part in ("weight", "bias"):
        name = f"{layer}{producer.linear}.{part}"
        if name in tensors:
            tensors[name][channels] *= factor


def shared_channels(channels: torch.Tensor, head: int, queries: int) -> torch.Tensor:
    """Channels of key/value heads of width `head` as channels of the `queries` query heads that read each of them."""
    first = channels // head * queries * head + channels % head
    return (first[:, None] + torch.arange(queries) * head).flatten()


def inject(model: str, out: Path, factor: float, fraction: float, seed: int) -> dict[str, list[int]]:
    """Write the copy. Returns the outlier channels of every linear's input. Raises UsageError or Apex4Error."""
    if not 0 < fraction <= 1 or not factor > 0:
        raise UsageError(f"--fraction is {fraction} and --factor {factor}: give a share of 1 and a positive number")
    require_empty(out)
    source = ModelSource(model)
    if source.family.experts is not None:
        raise UsageError(f"{model} has experts: only dense models are supported")
    generator = torch.Generator().manual_seed(seed)
    changed: dict[str, torch.Tensor] = source.read(source.outer_tensors)
    sites: dict[str, list[int]] = {}
    for index in range(source.num_layers):
        stored = source.read(source.layer_tensors(index))
        tensors = {name: tensor.double() for name, tensor in stored.items()}
        layer = source.family.layer_prefix(index)
        for group in source.family.groups(source.config, index):
            readers = [layer + linear for linear in (*group.linears, *group.also_read_by)]
            if group.norm is not None:
                norm = f"{layer}{group.norm}.weight"
                channels = draw(len(tensors[norm]), fraction, generator)
                by = scale_gain(tensors, norm, source.family.norm_offset, channels, factor, stored[norm].dtype)
            elif group.producer is not None:
                made = len(tensors[f"{layer}{group.producer.linear}.weight"])
                channels = draw(made, fraction, generator)
                scale_producer(tensors, layer, group.producer, channels, factor)
                read = tensors[f"{readers[0]}.weight"].shape[1]
                if group.producer.per_head:
                    heads = source.config.get("num_key_value_heads") or source.config["num_attention_heads"]
                    channels = shared_channels(channels, made // heads, read // made)
                by = torch.full((len(channels),), factor, dtype=torch.float64)
            else:
                continue
            for reader in readers:
                tensors[f"{reader}.weight"][:, channels] /= by
                sites[reader] = sorted(channels.tolist())
        changed |= {name: tensor.to(stored[name].dtype) for name, tensor in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / SINGLE_NAME, changed)
    copy_companions(source.folder, ["config.json", *companions_of(source.folder)[0]], out)
    return sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="demo, a folder or a Hub id")
    parser.add_argument("out", type=Path, help="folder to write, absent or empty")
    parser.add_argument("--factor", type=float, default=40.0)
    parser.add_argument("--fraction", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        sites = inject(args.model, args.out, args.factor, args.fraction, args.seed)
    except (UsageError, Apex4Error) as error:
        sys.exit(f"inject_outliers: {error}")
    print(json.dumps({"out": str(args.out), "factor": args.factor, "inputs": len(sites)}))


if __name__ == "__main__":
    main()
