"""Tensors of experts under one set of names, whichever way a checkpoint stores them.

    published, Mixtral      model.layers.0.block_sparse_moe.experts.3.w1.weight    [I, H]
    published, Qwen3-MoE    model.layers.0.mlp.experts.3.gate_proj.weight          [I, H]
    fused                   model.layers.0.mlp.experts.gate_up_proj                [E, 2 I, H], gate rows first
    fused, GPT-OSS          model.layers.0.mlp.experts.gate_up_proj                [E, H, 2 I], gate and up in turns
                            model.layers.0.mlp.experts.gate_up_proj_bias           [E, 2 I]
    here                    model.layers.0.mlp.experts.3.gate_proj.weight          [I, H]

Only names and shapes are handled: a tensor of a fused checkpoint becomes a part of the stored one, read when needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import Apex4Error
from ..format.tensor_info import TensorInfo
from .families import Family


def in_model(infos: dict[str, TensorInfo], family: Family) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint under the names that the language model has inside a larger one; others as they are.

    Raises Apex4Error if a tensor is there twice.
    """
    result: dict[str, TensorInfo] = {}
    for stored, info in infos.items():
        name = family.name_in_model(stored)
        if name in result:
            raise Apex4Error(
                f"{name} is stored both as {result[name].stored or name} and as {stored}: keep one of them"
            )
        result[name] = info if name == stored else replace(info, stored=stored)
    return result


def unfused(infos: dict[str, TensorInfo], family: Family) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint under the names of the model with unfused experts.

    Raises Apex4Error for a fused tensor of an impossible shape, and if a tensor is there twice.
    """
    if family.experts is None:
        return infos
    result: dict[str, TensorInfo] = {}
    for stored, info in infos.items():
        for name, part in _parts(_renamed(stored, family), replace(info, stored=stored), family):
            if name in result:
                raise Apex4Error(f"{name} is stored both as {result[name].stored} and as {stored}: keep one of them")
            result[name] = part
    return result


def published_name(name: str, stored: Iterable[str], family: Family) -> str:
    """The name that `name` has in a checkpoint with these stored names: for messages about what is not there."""
    if family.prefixes and any(family.name_in_model(other) != other for other in stored):
        return family.published_name(name)
    if family.experts is None or all(_renamed(other, family) == other for other in stored):
        return name
    for there, here in family.experts.renames:
        name = name.replace(here, there)
    return name


def _renamed(name: str, family: Family) -> str:
    assert family.experts is not None
    for there, here in family.experts.renames:
        name = name.replace(there, here)
    return name


def _parts(name: str, info: TensorInfo, family: Family) -> Iterator[tuple[str, TensorInfo]]:
    assert family.experts is not None
    experts, _, tensor = name.rpartition(".")
    projection, is_bias = tensor.removesuffix("_bias"), tensor.endswith("_bias")
    if not experts.endswith(f".{family.experts.module}") or projection not in ("gate_up_proj", "down_proj"):
        yield name, info
        return
    turned = family.experts.interleaved and not is_bias
    outputs = -1 if turned or is_bias else 1  # the dimension of a fused tensor that counts output features
    biased = is_bias and not family.experts.interleaved
    if biased or len(info.shape) != 3 - is_bias or (projection == "gate_up_proj" and info.shape[outputs] % 2):
        raise Apex4Error(f"{info.stored} in {info.file} has shape {list(info.shape)}, which no fused experts have")
    kind = "bias" if is_bias else "weight"
    for expert in range(info.shape[0]):
        if projection == "down_proj":
            yield f"{experts}.{expert}.down_proj.{kind}", _part_of(info, (expert,), info.shape[1:], turned)
            continue
        half = info.shape[outputs] // 2
        shape = list(info.shape[1:])
        shape[-1 if outputs == -1 else 0] = half
        for number, part in enumerate(("gate_proj", "up_proj")):
            if family.experts.interleaved:
                whole = () if is_bias else (slice(None),)
                index: tuple[int | slice, ...] = (expert, *whole, slice(number, None, 2))
            else:
                index = (expert, slice(number * half, (number + 1) * half))
            yield f"{experts}.{expert}.{part}.{kind}", _part_of(info, index, tuple(shape), turned)


def _part_of(info: TensorInfo, part: tuple[int | slice, ...], shape: tuple[int, ...], turned: bool) -> TensorInfo:
    return replace(info, shape=shape[::-1] if turned else shape, part=part, transposed=turned)
