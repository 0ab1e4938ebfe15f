"""What quantizes weights on a GPU, held against PyTorch: GPTQ's rounding, descent on its codes, Hessians.

Kernels are held against what operations of PyTorch make of the same tensors. Sums are in another order there, so that a value
next to a tie may fall to the other side, and what follows in its row then differs: few codes may, and the loss must not.
tests/gpu/test_sweeps.py runs the checks on a GPU, tests/kernels/sweeps/test_column_sweeps.py the small ones on a CPU.
"""

from __future__ import annotations

from unittest.mock import patch

import torch

from apex4_quant.calib.hessian import HessianAccumulator
from apex4_quant.format.layouts import ROWMAJOR
from apex4_quant.format.number_format import CODE_MAX, GroupSize
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.kernels.sweeps import column_sweeps
from apex4_quant.rounding.coordinate_descent import refine_codes
from apex4_quant.rounding.folded_grid import FoldedGrid
from apex4_quant.rounding.gptq import DAMPING, inverse_factor, quantize_weight_gptq

# n, k, group size: rows that fill no CTA, one block, groups of several.
SHAPES: tuple[tuple[int, int, GroupSize], ...] = (
    (40, 128, 128), (37, 384, 128), (16, 512, 256), (5, 640, "channel"), (1000, 1024, 128), (4096, 2048, 128),
)  # fmt: skip
DIFFERENT_CODES, DIFFERENT_LOSS = 0.01, 1e-3
DEAD = (5, -1)  # columns whose input is always zero


class Problem:
    """A weight, one row of it zero, and the Hessian of correlated inputs."""

    def __init__(self, n: int, k: int, group: GroupSize, device: torch.device, seed: int, bits: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2 * k, k, generator=generator)
        x = x @ (torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k))
        x[:, DEAD] = 0
        weight = torch.randn(n, k, generator=generator) * 0.02
        weight[n // 2] = 0
        self.weight, x = weight.to(device), x.to(device)
        self.hessian = x.t() @ x / len(x)
        # Groups of very different sizes: of the small ones several codes are worth the same.
        self.weight *= torch.logspace(0, -2 if bits == 8 else 0, k, device=device)
        self.format = LinearFormat(n, k, group, ROWMAJOR, "none", 1.0, activation_bits=bits)
        self.factor = inverse_factor("w", self.hessian)

    def gptq(self) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize_weight_gptq("w", self.weight, self.format, self.factor)

    def descent(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return refine_codes(codes, scales, self.weight, self.hessian, DAMPING, 3, self._grid(scales))

    def _grid(self, scales: torch.Tensor) -> FoldedGrid | None:
        return FoldedGrid(scales) if self.format.activation_bits == 8 else None

    def loss(self, codes: torch.Tensor, scales: torch.Tensor) -> float:
        width = codes.shape[1] // scales.shape[1]
        if (grid := self._grid(scales)) is None:
            worth = codes * scales.double().repeat_interleave(width, dim=1)
        else:
            worth = torch.cat([grid.group(g).worth(part.t()).t() for g, part in enumerate(codes.split(width, 1))], 1)
        error = self.weight.double() - worth
        damped = self.hessian.double()
        damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()))
        return float(((error @ damped) * error).sum())


def _require_same(
    problem: Problem,
    codes: torch.Tensor,
    scales: torch.Tensor,
    expected: torch.Tensor,
    expected_scales: torch.Tensor,
) -> None:
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == CODE_MAX
    different = float((codes != expected).float().mean())
    assert different <= DIFFERENT_CODES, f"{different:.2%} of the codes differ"
    assert float((scales != expected_scales).float().mean()) <= DIFFERENT_CODES, "scales differ"
    loss, wanted = problem.loss(codes, scales), problem.loss(expected, expected_scales)
    assert abs(loss / wanted - 1) <= DIFFERENT_LOSS, f"the loss is {loss:.6g} and not {wanted:.6g}"


def check(n: int, k: int, group: GroupSize, device: torch.device, seed: int, bits: int = 4) -> None:
    problem = Problem(n, k, group, device, seed, bits)
    with patch.object(column_sweeps, "run_on", lambda device: False):
        expected = problem.gptq()
        expected_descent = problem.descent(*expected)
    codes, scales = problem.gptq()
    _require_same(problem, codes, scales, *expected)
    assert not codes[n // 2].any() and bool((scales > 0).all()), "the row of zeros"
    again, scales_again = problem.gptq()
    assert torch.equal(codes, again) and torch.equal(scales, scales_again), "a second run differs"
    refined = problem.descent(*expected)
    _require_same(problem, refined, expected[1], expected_descent, expected[1])
    assert not torch.equal(refined, expected[0]), "nothing was moved"
    assert torch.equal(refined[:, DEAD], expected[0][:, DEAD]), "a dead column was moved"


def check_hessian(dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """16-bit inputs are multiplied on tensor cores, and nothing is lost but what sums in float32 lose."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(4096, 640, generator=generator, device=device) * torch.linspace(2, 0.01, 640, device=device)
    x, y = x.to(dtype), (x + 0.1 * torch.randn(x.shape, generator=generator, device=device)).to(dtype)
    before = torch.get_float32_matmul_precision()
    for others in (None, y):
        moments = HessianAccumulator()
        for part in range(0, 4096, 1024):
            given = slice(part, part + 1024)
            moments.add(x[given], None if others is None else others[given])
        left = (x if others is None else others).double()
        expected = left.t() @ x.double() / len(x)
        scale = (left.square().mean(0).sqrt()[:, None] * x.double().square().mean(0).sqrt()).clamp_min(1e-30)
        error = float(((moments.take_matrix() - expected).abs() / scale).max())
        assert error <= 1e-4, f"an entry is off by {error:.1e} of what the inputs' sizes allow"
    assert torch.get_float32_matmul_precision() == before, "the precision of products stays changed"
