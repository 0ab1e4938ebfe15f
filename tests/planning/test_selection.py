"""The knapsack: against exhaustive search, on sizes of models, and what surrounds the solver."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from apex4_quant.planning import selection
from apex4_quant.planning.selection import select

Groups = list[list[tuple[float, float]]]


def totals(groups: Groups, picks: list[int]) -> tuple[float, float]:
    taken = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    return sum(value for value, _ in taken), sum(cost for _, cost in taken)


def small(seed: int) -> Groups:
    """Up to 6 groups of up to 5 options, of the sizes that losses and seconds have; some equal each other."""
    rng = random.Random(seed)

    def number() -> float:
        return rng.choice((rng.random(), round(rng.random(), 1)))

    return [[(1e-3 * number(), 1e-5 * number()) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 6))]


def of_a_model(seed: int, layers: int, per_layer: int, swapped: bool = False) -> Groups:
    """(loss, seconds) of four group sizes and a dense transform; groups of one place in the layer take equally long."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(1e-5, 6e-5, per_layer)
    groups: Groups = []
    for _, place in itertools.product(range(layers), range(per_layer)):
        seconds = base[place] * np.array([1.05, 1.025, 1.01, 1.0, 1.12])
        ladder = rng.lognormal(-7, 1.2) * np.cumprod([1, *rng.uniform(1, 1.35, 3)])
        losses = [*ladder, ladder[0] * rng.uniform(0.5, 1.02)]
        pairs = zip(seconds, losses, strict=True) if swapped else zip(losses, seconds, strict=True)
        groups.append([(float(value), float(cost)) for value, cost in pairs])
    return groups


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_optimum_of_exhaustive_search(seed: int) -> None:
    groups = small(seed)
    every = [totals(groups, list(picks)) for picks in itertools.product(*(range(len(each)) for each in groups))]
    cheapest = min(cost for _, cost in every)
    for factor in (1.0, 1.02, 1.1, 1.3, 2.0, 9.0):
        bound = cheapest * factor * (1 + 1e-9)
        value, cost = totals(groups, select(groups, bound))
        assert cost <= bound * (1 + 1e-12)
        assert value == pytest.approx(min(value for value, cost in every if cost <= bound), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("core", [1, 8])
def test_a_core_that_is_too_small_grows(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = of_a_model(3, 8, 4)
    bound = 1.02 * sum(min(cost for _, cost in options) for options in groups)
    best = totals(groups, select(groups, bound))[0]
    monkeypatch.setattr(selection, "CORE", core)
    assert totals(groups, select(groups, bound))[0] == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_large_model(swapped: bool) -> None:
    """80 layers: within the bound, the same every time, and nothing saved by one more step of any group."""
    groups = of_a_model(1, 80, 4, swapped)
    bound = 1.03 * sum(min(cost for _, cost in options) for options in groups)
    picks = select(groups, bound)
    _, cost = totals(groups, picks)
    assert 0.999 * bound < cost <= bound
    assert picks == select(groups, bound)
    for index, options in enumerate(groups):
        now = options[picks[index]]
        assert not any(v < now[0] and cost - now[1] + c <= bound for v, c in options)
    # Each percent of time saves less than the one before.
    values = [totals(groups, select(groups, bound * factor))[0] for factor in (0.98, 0.99, 1.0)]
    assert values[0] - values[1] > values[1] - values[2] > 0


def test_a_mixture_of_experts() -> None:
    """6,288 groups: what is taken is within a millionth of a bound that no selection can be below (Lagrange's)."""
    groups = of_a_model(0, 48, 131)
    values, costs = (np.array([[option[side] for option in options] for options in groups]) for side in (0, 1))
    bound = 1.05 * costs.min(1).sum()
    value, cost = totals(groups, select(groups, bound))
    assert bound * (1 - 1e-6) < cost <= bound

    def lower_bound(price: float) -> float:
        return float((values + price * costs).min(1).sum() - price * bound)

    lowest, highest = 0.0, values.max() / (costs.max(1) - costs.min(1)).min()
    for _ in range(100):  # concave in the price: the third that cannot hold its maximum is left away
        first, second = lowest + (highest - lowest) / 3, highest - (highest - lowest) / 3
        if lower_bound(first) < lower_bound(second):
            lowest = first
        else:
            highest = second
    assert lower_bound(lowest) <= value * (1 + 1e-12) and value <= lower_bound(lowest) * (1 + 1e-6)


def test_of_equal_options_the_earlier_one() -> None:
    assert select([[(1.0, 2.0), (1.0, 2.0), (3.0, 1.0)]], 2.0) == [0]
    assert select([[(1.0, 2.0), (1.0, 1.0)]], 2.0) == [1]  # equal in value: the cheaper one
    assert select([[(0.0, 0.0), (0.0, 0.0)]], 0.0) == [0]


def test_a_bound_that_nothing_keeps() -> None:
    with pytest.raises(ValueError, match="bound"):
        select([[(1.0, 2.0)], [(1.0, 3.0)]], 4.9)


@pytest.mark.parametrize("seed", [6, 8, 19, 22, 38])
def test_a_selection_just_beyond_the_bound_is_not_taken(seed: int) -> None:
    """The solver keeps a bound to one part in 10^6. These bounds are below the cost of a selection by 3 in 10^8."""
    rng = random.Random(seed)
    count = rng.randint(6, 14)
    groups = [[(round(rng.random(), 3), round(rng.random(), 3)) for _ in range(3)] for _ in range(count)]
    loose = sum(min(cost for _, cost in options) for options in groups) * rng.uniform(1.1, 2)
    bound = totals(groups, select(groups, loose))[1] * (1 - 3e-8)
    assert totals(groups, select(groups, bound))[1] <= bound


def test_nothing_of_the_solver_reaches_stdout() -> None:
    """HiGHS writes lines of its debugging past sys.stdout; `apex4 plan --json` prints one object."""
    code = (
        "import ctypes, apex4_quant.planning.selection as s\n"
        "real = s.milp\n"
        "def noisy(*a, **k):\n"
        "    ctypes.CDLL(None).puts(b'noise')\n"
        "    return real(*a, **k)\n"
        "s.milp = noisy\n"
        "print(s.select([[(1., 0.), (0., 1.)], [(1., 0.), (0., 1.)]], 1.0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout in ("[0, 1]\n", "[1, 0]\n")
