"""The multiple-choice knapsack: one option out of every group, with the least sum of values within a bound on costs.

The planner solves it both ways: the least loss within a time, and the least time within a loss. It is a 0/1 program with
one binary per option, one-hot in every group, and one row for the bound. HiGHS solves it (scipy.optimize.milp).

    1. For any price L >= 0 of a unit of cost,

           bound(L) = sum over groups of min over options (value + L cost)  -  L limit

       is at most the optimum (Lagrangian relaxation). The highest of these bounds is that of the least L whose options of
       least value + L cost keep the limit: it is found by bisection.
    2. An option's reduced cost is value + L cost less the minimum of its group. A selection that holds an option of
       reduced cost r has a sum of at least bound(L) + r. Only options of reduced cost at most d, the core, go into
       the 0/1 program.
    3. If what it finds is at most d above bound(L), no option that was left out can better it: it is the optimum.
       Otherwise d becomes that difference, and the program is solved again. (D. Pisinger, A minimal algorithm for the
       multiple-choice knapsack problem, European Journal of Operational Research 83, 1995, uses the same cores.)

A core has some hundred options however many groups there are: 6,288 groups of 5 options (48 layers of 128 experts) take
about a second, all at once in one program 2 to 27 seconds. The program ends after NODES nodes of its search with the
best selection found, so that a hard instance ends too, and with the same result on every machine.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

CORE = 200  # options beside the best of their groups in the first core
NODES = 20_000
_ROUNDING = 1e-9  # of the largest value: reduced costs that differ by less are equal
_KEPT = 1e-12  # of the room between the least possible sum of costs and the bound: sums of floats differ by that

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def select(groups: Sequence[Sequence[tuple[float, float]]], bound: float) -> list[int]:
    """groups of options (value, cost) -> the index of the option to take from each group.

    The sum of values is the least there is with a sum of costs of at most `bound`. Of two options of one group that are
    equal in both, the earlier one is taken. Raises ValueError if no selection keeps the bound.
    """
    group, index, values, costs = _undominated(groups)
    least = np.full(len(groups), np.inf)
    np.minimum.at(least, group, costs)
    room = bound - float(least.sum())
    if room < 0:
        raise ValueError(f"the least sum of costs is {least.sum()} and the bound {bound}")
    # Costs beyond the least, in units of the room; values beyond the least, in units of the largest.
    costs = costs - least[group]
    fits = costs <= room
    group, index, values, costs = group[fits], index[fits], values[fits], costs[fits] / (room or 1.0)
    least = np.full(len(groups), np.inf)
    np.minimum.at(least, group, values)
    values = values - least[group]
    values = values / (values.max(initial=0.0) or 1.0)
    taken = _solve(group, values, costs, len(groups))
    picks = np.empty(len(groups), np.int64)
    picks[group[taken]] = index[taken]
    return [int(pick) for pick in picks]


def _undominated(groups: Sequence[Sequence[tuple[float, float]]]) -> tuple[Integers, Integers, Floats, Floats]:
    """Group, index in its group, value and cost of every option that no other of its group equals or beats in both."""
    kept: list[tuple[int, int, float, float]] = []
    for number, options in enumerate(groups):
        lowest = np.inf
        for index in sorted(range(len(options)), key=lambda i: (options[i][1], options[i][0], i)):
            value, cost = options[index]
            if value < lowest:
                lowest = value
                kept.append((number, index, value, cost))
    columns = list(zip(*kept, strict=True))
    return (
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.float64),
        np.array(columns[3], np.float64),
    )


def _solve(group: Integers, values: Floats, costs: Floats, count: int) -> NDArray[np.bool_]:
    """Which options are taken: one of each of `count` groups, costs of at most 1 in all. Every group has one of cost 0."""
    price = _price(group, values, costs, count)
    reduced = values + price * costs
    least = np.full(count, np.inf)
    np.minimum.at(least, group, reduced)
    lower_bound = float(least.sum()) - price
    reduced -= least[group]
    others = np.sort(reduced[reduced > _ROUNDING])
    width = float(others[min(CORE, len(others)) - 1]) if len(others) else 0.0
    while True:
        core = reduced <= width + _ROUNDING
        taken = _solve_core(core, group, values, costs, count)
        excess = np.inf if taken is None else float(values[taken].sum()) - lower_bound
        if taken is not None and (excess <= width + _ROUNDING or core.all()):
            return taken
        if core.all():
            raise RuntimeError("HiGHS finds no selection, and the cheapest option of every group is one")
        width = excess


def _price(group: Integers, values: Floats, costs: Floats, count: int) -> float:
    """Of a unit of cost: the least one, to one part in 2^50, at which the options of least value + price cost keep the
    limit. Options stand in the order of their groups."""
    starts = np.searchsorted(group, np.arange(count))

    def keeps_the_limit(price: float) -> bool:
        reduced = values + price * costs
        best = reduced == np.minimum.reduceat(reduced, starts)[group]
        return float(np.minimum.reduceat(np.where(best, costs, np.inf), starts).sum()) <= 1.0

    if keeps_the_limit(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not keeps_the_limit(high):
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps_the_limit(middle) else (middle, high)
    return high


def _one_hot(group: Integers, count: int) -> csr_array:
    return csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(count, len(group)))


def _solve_core(
    core: NDArray[np.bool_], group: Integers, values: Floats, costs: Floats, count: int
) -> NDArray[np.bool_] | None:
    """The best selection of the options in `core`, or None if there is none."""
    alone = np.bincount(group[core], minlength=count)[group] == 1
    taken: NDArray[np.bool_] = core & alone
    free = core & ~alone
    room = 1.0 - float(costs[taken].sum())
    if not free.any():
        return taken if room >= -_KEPT else None
    numbers, own = np.unique(group[free], return_inverse=True)
    unit, scale = float(costs[free].max()) or 1.0, float(values[free].max()) or 1.0
    rows = vstack([_one_hot(own, len(numbers)), csr_array(costs[free][None] / unit)]).tocsr()
    ones, less = np.ones(len(numbers)), 0.0
    while True:
        limits = np.append(ones, -np.inf), np.append(ones, (room - less) / unit)
        with _silent():
            found = milp(
                values[free] / scale,
                integrality=np.ones(len(own)),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(rows, *limits),
                options={"mip_rel_gap": 0.0, "node_limit": NODES},
            )
        if found.x is None:
            return None
        result: NDArray[np.bool_] = taken.copy()
        result[free] = np.asarray(found.x, np.float64) > 0.5
        beyond = float(costs[result].sum()) - 1.0
        if beyond <= _KEPT:
            return result
        less = max(2 * less, beyond)  # HiGHS keeps rows to 1e-6 only: this selection must not come again


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that C code writes to stdout gets there: HiGHS 1.12 leaves a line of its debugging in some solutions, and
    the command's stdout is one JSON object."""
    library = ctypes.CDLL(None)
    library.fflush(None)
    try:
        stdout = os.dup(1)
    except OSError:  # closed: nothing can get there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
