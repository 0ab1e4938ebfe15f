"""The multiple-choice knapsack: one option out of every group, least loss for a time, least time for a loss.

Groups are added one by one to a list of partial selections that no other beats in both time and loss. That is exact as
long as the list is not longer than `limit`; a longer one is thinned, the best of each slice of time is kept. To the
result come the breakpoints of the convex relaxation (always take the step that saves most loss per second), which are
optimal for their own time whatever the thinning did.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

_SAME = 1e-12  # of the largest loss: less is rounding, not a better selection


class Selection(NamedTuple):
    """`picks` holds the index of the option taken from each group."""

    seconds: float
    loss: float
    picks: tuple[int, ...]


def pareto_front(groups: Sequence[Sequence[tuple[float, float]]], limit: int = 1024) -> list[Selection]:
    """groups of options (seconds, loss) -> selections by rising time and falling loss, fastest first."""
    tolerance = _SAME * sum(max(loss for _, loss in options) for options in groups)
    states: list[tuple[float, float, Any]] = [(0.0, 0.0, None)]  # the last entry links back: (pick, entry before)
    for options in groups:
        grown = [
            (seconds + more, loss + worse, (pick, link))
            for pick, (more, worse) in enumerate(options)
            for seconds, loss, link in states
        ]
        states = _thinned(_unbeaten(grown, tolerance), limit)
    found = [Selection(seconds, loss, _picks(link)) for seconds, loss, link in states]
    return _unbeaten(found + _relaxation(groups), tolerance)


def _unbeaten(states: list[Any], tolerance: float) -> list[Any]:
    kept: list[Any] = []
    for state in sorted(states, key=lambda state: state[:2]):
        if not kept or state[1] < kept[-1][1] - tolerance:
            kept.append(state)
    return kept


def _thinned(states: list[Any], limit: int) -> list[Any]:
    """The least loss (the last state) of each of `limit` slices of time, and the fastest state."""
    if len(states) <= limit:
        return states
    first, width = states[0][0], (states[-1][0] - states[0][0]) / limit
    slices = {min(limit - 1, int((state[0] - first) / width)): state for state in states}
    slices[-1] = states[0]
    return sorted(slices.values(), key=lambda state: state[0])


def _picks(link: Any) -> tuple[int, ...]:
    picks = []
    while link is not None:
        pick, link = link
        picks.append(pick)
    return tuple(reversed(picks))


def _relaxation(groups: Sequence[Sequence[tuple[float, float]]]) -> list[Selection]:
    picks, steps = [], []
    for index, options in enumerate(groups):
        hull = _lower_hull(options)
        picks.append(hull[0])
        for before, after in pairwise(hull):
            gained, spent = options[before][1] - options[after][1], options[after][0] - options[before][0]
            steps.append((-gained / spent, index, after))
    selections = [_selection(groups, picks)]
    # Within a group the slopes of a convex hull fall, so its steps come in their order.
    for _, index, after in sorted(steps, key=lambda step: step[0]):
        picks[index] = after
        selections.append(_selection(groups, picks))
    return selections


def _selection(groups: Sequence[Sequence[tuple[float, float]]], picks: list[int]) -> Selection:
    taken = [options[pick] for options, pick in zip(groups, picks, strict=True)]
    return Selection(sum(seconds for seconds, _ in taken), sum(loss for _, loss in taken), tuple(picks))


def _lower_hull(options: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the lower convex hull of the points (seconds, loss), by rising time and falling loss."""
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: options[i]):
        seconds, loss = options[index]
        if hull and loss >= options[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (t0, l0), (t1, l1) = options[hull[-2]], options[hull[-1]]
            if (l0 - l1) * (seconds - t1) > (l1 - loss) * (t1 - t0):
                break
            hull.pop()
        hull.append(index)
    return hull
