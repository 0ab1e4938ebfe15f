"""How much the outputs of a linear matter, where the linear behind it tells.

A model computes the same if row i of v_proj (or up_proj) is multiplied by a factor and column i of o_proj (or down_proj)
divided by it, so the size of such an output says nothing of what an error in it does. The norm of the column that reads
it does: an error of row i reaches the residual stream times that column.
"""

from __future__ import annotations

import torch

from ..models.families import Producer


def scale_by_readers(weight: torch.Tensor, producer: Producer, readers: list[torch.Tensor], kv_heads: int) -> None:
    """Scale the rows of `weight` float32 [N, K] that make an input by the norms of the columns that read it, in place.

    readers [N_i, C] read the input. A key/value channel (`producer.per_head`) is read by every query head of its group.
    The geometric mean of the factors is 1, so that these rows as a whole keep their weight against others.
    """
    energy = torch.stack([reader.float().square().sum(0) for reader in readers]).sum(0)
    if producer.rows == "value":
        first = (len(weight) + len(energy)) // 2  # q has as many rows as there are channels; k and v share the rest
    else:
        first = len(weight) // 2 if producer.rows == "up" else 0
    rows = weight[first:]
    if producer.per_head:
        energy = energy.view(kv_heads, -1, len(rows) // kv_heads).sum(1).flatten()
    factors = energy.clamp_min(1e-6 * energy.mean()).clamp_min(1e-30).log() / 2
    rows *= (factors - factors.mean()).exp()[:, None]
