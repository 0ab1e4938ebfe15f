"""Tensors of experts under one set of names, whichever way a checkpoint stores them.

    published, Mixtral      model.layers.0.block_sparse_moe.experts.3.w1.weight    [I, H]
    published, Qwen3-MoE    model.layers.0.mlp.experts.3.gate_proj.weight          [I, H]
    fused                   model.layers.0.mlp.experts.gate_up_proj                [E, 2 I, H], gate rows first
    here                    model.layers.0.mlp.experts.3.gate_proj.weight          [I, H]

Only names and shapes are handled: a tensor of a fused checkpoint becomes a part of the stored one, read when needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..errors import Apex4Error
from ..format.tensor_info import TensorInfo
from .families import Family


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
    if not experts.endswith(f".{family.experts.module}") or tensor not in ("gate_up_proj", "down_proj"):
        yield name, info
        return
    if len(info.shape) != 3 or (tensor == "gate_up_proj" and info.shape[1] % 2):
        raise Apex4Error(f"{info.stored} in {info.file} has shape {list(info.shape)}, which no fused experts have")
    count, rows, columns = info.shape
    for expert in range(count):
        if tensor == "down_proj":
            part = replace(info, shape=(rows, columns), part=(expert,))
            yield f"{experts}.{expert}.down_proj.weight", part
            continue
        half = rows // 2
        for projection, start in (("gate_proj", 0), ("up_proj", half)):
            part = replace(info, shape=(half, columns), part=(expert, slice(start, start + half)))
            yield f"{experts}.{expert}.{projection}.weight", part
