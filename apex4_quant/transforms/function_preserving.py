"""Changes of a float model that leave its function as it is and make it easier to quantize.

    rotate_stream   R1: the residual stream x -> x Q. What writes it is rotated, what reads it turned back. An RMSNorm
                    commutes with Q only without its gain, so the gain goes into the readers first (QuaRot, arXiv
                    2404.00456; SpinQuant, arXiv 2405.16406).
    rotate_values   R2: the channels of every key/value head, between v_proj and o_proj.
    balance         x -> x diag(d), W -> W diag(d)^-1 at one input, d_k = (B_kk / A_kk)^alpha: at alpha = 1/4 the channels
                    of inputs (mean squares A) and weights (sums of squares B) are equally uneven.

They work in place on the float32 tensors of one decoder layer, under names relative to the layer. rewriter.py
says when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..models.families import InputGroup
from .orthogonal import Orthogonal

Tensors = dict[str, torch.Tensor]

# Channels whose input or weight is this much weaker than the mean count as this weak: d is at most 100 times larger
# for them at alpha = 1/4, which a channel that calibration hardly woke must survive when it wakes.
WEAKEST = 1e-8


def merged_by_norm(input_groups: Sequence[InputGroup]) -> list[InputGroup]:
    """The input groups with those that read the same norm made one: a gain is folded once, into everything that reads it."""
    merged: dict[object, InputGroup] = {}
    for position, input_group in enumerate(input_groups):
        key = input_group.norm or position
        first = merged.get(key)
        if first is None:
            merged[key] = input_group
            continue
        readers = dict.fromkeys(first.also_read_by + input_group.also_read_by)
        merged[key] = replace(first, linears=first.linears + input_group.linears, also_read_by=tuple(readers))
    return list(merged.values())


def rotate_rows(weight: torch.Tensor, rotation: Orthogonal) -> None:
    """Rotate what a linear writes: weight [N, K] -> Q^T weight, or its bias [N] -> bias Q."""
    weight.copy_(rotation.apply(weight.movedim(0, -1)).movedim(-1, 0))


def rotate_reader(weight: torch.Tensor, gain: torch.Tensor, rotation: Orthogonal) -> None:
    """Make a linear [N, K] read the rotated stream through a norm whose gain [K] is now one."""
    weight.copy_(rotation.apply(weight * gain))


def rotate_stream(
    tensors: Tensors,
    input_groups: Sequence[InputGroup],
    writers: Sequence[str],
    norm_offset: float,
    rotation: Orthogonal,
) -> None:
    """R1 in one layer. `input_groups` are merged by norm; `writers` add to the stream. Norm gains become 1 - norm_offset."""
    for input_group in input_groups:
        if input_group.norm is None:
            continue
        stored = tensors[f"{input_group.norm}.weight"]
        for reader in _readers(input_group):
            rotate_reader(tensors[f"{reader}.weight"], stored + norm_offset, rotation)
        stored.fill_(1 - norm_offset)
    for writer in writers:
        rotate_rows(tensors[f"{writer}.weight"], rotation)
        if f"{writer}.bias" in tensors:
            rotate_rows(tensors[f"{writer}.bias"], rotation)


def rotate_values(tensors: Tensors, input_group: InputGroup, kv_heads: int, rotations: Sequence[Orthogonal]) -> None:
    """R2: one rotation for each of the `kv_heads`, as wide as a head, where the group's producer is per head."""
    assert input_group.producer is not None and len(rotations) == kv_heads
    for part in _produced(tensors, input_group):
        for head, rotation in zip(part.unflatten(0, (kv_heads, -1)), rotations, strict=True):
            rotate_rows(head, rotation)
    for reader in _readers(input_group):
        weight = tensors[f"{reader}.weight"]
        by_head = weight.view(len(weight), kv_heads, -1, rotations[0].n)  # [N, kv heads, query heads of each, channels]
        for head, rotation in enumerate(rotations):
            by_head[:, head] = rotation.apply(by_head[:, head])


def balance(
    tensors: Tensors,
    input_group: InputGroup,
    mean_square: torch.Tensor,
    *,
    kv_heads: int,
    norm_offset: float,
    alpha: float,
) -> bool:
    """Scale the channels of one input. `mean_square` [K] is of the input before; `input_group` is merged by norm.

    Heads that share a key/value head share d: A and B are summed over them. False if it can be folded nowhere.
    """
    if input_group.norm is None and input_group.producer is None:
        return False
    weights = [tensors[f"{linear}.weight"] for linear in input_group.linears]
    a, b = mean_square.double(), torch.stack([weight.double().square().sum(0) for weight in weights]).sum(0)
    if input_group.producer is not None and input_group.producer.per_head:
        shape = (kv_heads, -1, len(_produced(tensors, input_group)[0]) // kv_heads)
    else:
        shape = (1, 1, len(b))
    a, b = a.to(b.device).view(shape).sum(1), b.view(shape).sum(1)
    factor = balancing_factor(a, b, alpha)  # [kv heads or 1, channels of each]
    if input_group.norm is not None:
        stored = tensors[f"{input_group.norm}.weight"]
        stored.copy_((stored + norm_offset) * factor.flatten() - norm_offset)
    else:
        for part in _produced(tensors, input_group):
            part.copy_((part.movedim(0, -1) * factor.flatten()).movedim(-1, 0))
    sharing = weights[0].shape[1] // factor.numel()  # query heads of a key/value head
    per_channel = factor[:, None].expand(-1, sharing, -1).flatten()
    for reader in _readers(input_group):
        tensors[f"{reader}.weight"].div_(per_channel)
    return True


def balancing_factor(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """(b / a)^alpha, float64, with geometric mean one; one where a or b is zero, so that dead channels stay as they are.

    a and b: any equal shape, not negative.
    """
    live = (a > 0) & (b > 0)
    if not bool(live.any()):
        return torch.ones_like(a)
    a, b = (x.clamp_min(WEAKEST * float(x[live].mean())) for x in (a, b))
    log = alpha * (b.log() - a.log())
    return torch.where(live, log - log[live].mean(), 0.0).exp()


def _readers(input_group: InputGroup) -> tuple[str, ...]:
    return (*input_group.linears, *input_group.also_read_by)


def _produced(tensors: Tensors, input_group: InputGroup) -> list[torch.Tensor]:
    """Views of the producer's weight rows, and bias if there is one, that make the group's input."""
    assert input_group.producer is not None
    producer = input_group.producer
    whole = len(tensors[f"{producer.linear}.weight"])
    if producer.rows == "all":
        first = 0
    elif producer.rows == "up":
        first = whole // 2
    else:  # of q, k and v, where o_proj reads as many channels as q has
        queries = tensors[f"{input_group.linears[0]}.weight"].shape[1]
        first = whole - (whole - queries) // 2
    names = (f"{producer.linear}.weight", f"{producer.linear}.bias")
    return [tensors[name][first:] for name in names if name in tensors]
