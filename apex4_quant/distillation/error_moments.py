"""What errors of a student's inputs do to its predictions, from which their error feedback is worked out anew.

Transforms and weights change in distillation, and so does what an error does. As for any input (quantization/gradients.py): with y
drawn from the model's own prediction and g the gradient of -log p(y) by the transformed input, errors e of a token cost E (g . e)^2. The
quantizers, with the feedback that there was, stay in the loop.
"""

from __future__ import annotations

import torch

from ..format.number_format import BLOCK
from .student import Student


def error_moments(student: Student, windows: torch.Tensor, batch: int, seed: int) -> dict[str, torch.Tensor]:
    """E[g^T g] by block, float64 [padded K / 128, 128, 128] each, over windows int64 [S, L], by the name of the linear that stores
    an input's transform."""
    generator = torch.Generator(windows.device).manual_seed(seed % 2**63)
    moments: dict[str, torch.Tensor] = {}
    for ids in windows.split(batch):
        logits, inputs = student.logits_and_inputs(ids)
        gradient = torch.empty_like(logits)
        # One window at a time: its vocabulary is in float32.
        for into, scores in zip(gradient, logits.detach(), strict=True):
            likely = torch.softmax(scores.float(), -1)
            drawn = torch.multinomial(likely, 1, generator=generator)
            into.copy_(likely.scatter_add_(1, drawn, likely.new_full(drawn.shape, -1.0)))
        found = torch.autograd.grad(logits, list(inputs.values()), gradient)
        student.forget()
        for name, by_input in zip(inputs, found, strict=True):
            rows = by_input.flatten(0, -2)
            blocks = rows.unflatten(1, (-1, BLOCK)).transpose(0, 1).double()
            own = moments.setdefault(name, blocks.new_zeros(len(blocks), BLOCK, BLOCK))
            own += blocks.transpose(1, 2) @ blocks
    return moments
