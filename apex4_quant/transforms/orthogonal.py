"""Random orthogonal matrices of any width, Hadamard where one is known, applied without ever being formed.

A Hadamard matrix has entries +-1 and H H^T = n I: divided by sqrt(n) it spreads one channel evenly over all. Widths of
models are m 2^k with a small odd m. Sylvester's construction covers m = 1; Paley's (R. E. A. C. Paley, On orthogonal
matrices, J. Math. Phys. 12, 1933) give order q + 1 for a prime power q = 3 mod 4 and 2 (q + 1) for q = 1 mod 4; Kronecker
products of Hadamard matrices are Hadamard matrices.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import product

import torch

LARGEST_PALEY = 2048  # a dense factor: beyond, a product with it costs more than it gains
LARGEST_SYLVESTER = 128


class Orthogonal:
    """Q = D1 H D2, n x n: D1 and D2 are random signs, H the Kronecker product of `factors` (float64, orthonormal).

    Signs on both sides, because the block Hadamard transform of the kernels follows: with D1 alone it would cancel the
    part of H that mixes neighbours (Sylvester's H_n times I x H_128 is H_(n/128) x I).
    """

    def __init__(self, n: int, seed: int) -> None:
        """`seed` decides the signs, and the factor of a width with no known Hadamard matrix. Raises ValueError if n < 1."""
        generator = torch.Generator().manual_seed(seed)
        self.n = n
        signs = (torch.randint(0, 2, (2, n), generator=generator) * 2 - 1).double()
        self._before, self._after = signs[0], signs[1]
        self.factors = _factors(n, generator)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n], floating point -> x Q: same shape, dtype and device, computed in that dtype."""
        y = (x * self._before.to(x)).reshape(-1, *(len(factor) for factor in self.factors))
        for factor in self.factors:  # each takes the first axis and appends the result: in the end all are in order
            y = torch.tensordot(y, factor.to(x), dims=([1], [0]))
        return y.reshape(x.shape) * self._after.to(x)


def orthogonal_matrix(n: int, seed: int) -> torch.Tensor:
    """Orthogonal(n, seed) as a matrix, float64 [n, n]."""
    return Orthogonal(n, seed).apply(torch.eye(n, dtype=torch.float64))


def derived_seed(seed: int, *what: object) -> int:
    """A seed for `what`, unlike that of anything else."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def hadamard_order(n: int) -> int | None:
    """The least order m 2^j of a Paley matrix, m the odd part of n, that divides n; 1 for a power of two; else None."""
    order = n & -n
    odd = n // order
    if odd == 1:
        return 1
    candidates = (odd * 2**j for j in range(2, order.bit_length()))
    return next((c for c in candidates if c <= LARGEST_PALEY and _paley_field(c) is not None), None)


def _factors(n: int, generator: torch.Generator) -> list[torch.Tensor]:
    if n < 1:
        raise ValueError(f"there is no matrix of width {n}")
    order = hadamard_order(n)
    if order is None:
        order = n // (n & -n)
        factors = [_random_orthogonal(order, generator)]
    else:
        factors = [_paley(order) / order**0.5] if order > 1 else []
    rest = n // order
    while rest > 1:
        width = min(rest, LARGEST_SYLVESTER)
        factors.append(_sylvester(width) / width**0.5)
        rest //= width
    return factors


def _sylvester(n: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform over the orthogonal matrices: QR of a Gaussian matrix with R's diagonal made positive (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    signed: torch.Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed


def _paley_field(order: int) -> int | None:
    """The size of the field that gives a Hadamard matrix of this order, or None."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _prime_root(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if half % 4 == 1 and _prime_root(half) else None


def _prime_root(q: int) -> tuple[int, int] | None:
    """(p, r) if q = p^r for a prime p, else None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    r = 0
    while q % p == 0:
        q, r = q // p, r + 1
    return (p, r) if q == 1 else None


@lru_cache(maxsize=8)
def _paley(order: int) -> torch.Tensor:
    """A Hadamard matrix, float64 [order, order], entries +-1. `order` is one that `hadamard_order` returns."""
    q = _paley_field(order)
    assert q is not None
    first = q == order - 1
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if first else 1
    core[1:, 1:] = _quadratic_characters(q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    if first:  # the core is skew
        return core + eye
    # The core is symmetric: each of its entries becomes a 2 x 2 block.
    block, diagonal = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, torch.tensor(block).double()) + torch.kron(eye, torch.tensor(diagonal).double())


def _quadratic_characters(q: int) -> torch.Tensor:
    """[q, q]: chi(a - b) over all a and b of the field of q elements; chi is 1 for squares, -1 for others, 0 for 0.

    Elements are polynomials over the integers mod p, as their coefficients, modulo an irreducible one.
    """
    root = _prime_root(q)
    assert root is not None
    p, r = root
    modulus = _irreducible(p, r)
    elements = list(product(range(p), repeat=r))
    squares = {_remainder(_multiplied(a, a, p), modulus, p) for a in elements}
    zero = (0,) * r
    chi = torch.tensor([0 if a == zero else 1 if a in squares else -1 for a in elements]).double()
    digits = torch.tensor(elements)
    places = p ** torch.arange(r - 1, -1, -1)
    return torch.stack([chi[((a - digits) % p * places).sum(1)] for a in digits])


def _irreducible(p: int, r: int) -> tuple[int, ...]:
    """A monic polynomial of degree r over the integers mod p that is no product, coefficients from the lowest."""

    def monic(degree: int) -> list[tuple[int, ...]]:
        return [(*low, 1) for low in product(range(p), repeat=degree)]

    products = {_multiplied(a, b, p) for d in range(1, r // 2 + 1) for a in monic(d) for b in monic(r - d)}
    return next(polynomial for polynomial in monic(r) if polynomial not in products)


def _multiplied(a: tuple[int, ...], b: tuple[int, ...], p: int) -> tuple[int, ...]:
    result = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] = (result[i + j] + x * y) % p
    return tuple(result)


def _remainder(a: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    rest, degree = list(a), len(modulus) - 1
    while len(rest) > degree:
        lead = rest.pop()
        for i in range(degree):
            rest[len(rest) - degree + i] = (rest[len(rest) - degree + i] - lead * modulus[i]) % p
    return tuple(rest)
