"""One option for every input group: the least loss within a time, the least time within a loss, or the paper's way.

A budget is a multiple of the predicted time of the fastest plan the mode has, a maximal loss a multiple of the least loss
it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import UsageError
from .cost_model import DEFAULT_BUDGET
from .options import GroupOptions, Mode, Option
from .selection import select

_SLACK = 1 + 1e-9  # bounds are met up to rounding
FRONT_POINTS = 16


def require_bounds(mode: str, budget: float | None, max_loss: float | None) -> Mode:
    """The mode of that name. Raises UsageError for what `choose` cannot do."""
    if mode not in list(Mode):
        raise UsageError(f"mode {mode!r} is not known: give one of {', '.join(Mode)}")
    for name, value in (("budget", budget), ("max-loss", max_loss)):
        if value is not None and not 1 <= value < math.inf:
            raise UsageError(f"--{name} is {value:g} and counts in multiples of the best there is: give 1 or more")
    if budget is not None and max_loss is not None:
        raise UsageError("--budget and --max-loss bound each other's goal: give one of them")
    return Mode(mode)


def choose(
    groups: Sequence[GroupOptions],
    mode: str = Mode.AUTO,
    budget: float | None = None,
    max_loss: float | None = None,
) -> list[Option]:
    """One option for every group. Without a bound, auto and g128 have the budget DEFAULT_BUDGET.

    Where options of one group have the same loss, the finest groups and the cheaper transform are taken as far as the
    budget goes. Raises UsageError for an unknown mode, for bounds below 1, or two bounds.
    """
    chosen_mode = require_bounds(mode, budget, max_loss)
    groups = [group.offered(chosen_mode) for group in groups]
    if budget is None and max_loss is None and chosen_mode is not Mode.MIXED:
        budget = DEFAULT_BUDGET
    fastest = sum(min(option.seconds for option in group.options) for group in groups)
    least = sum(group.least.loss for group in groups)
    time_bound = math.inf if budget is None else fastest * budget * _SLACK
    loss_bound = math.inf if max_loss is None else least * max_loss * _SLACK
    if chosen_mode is Mode.MIXED:
        return _mixed(groups, time_bound, loss_bound)
    if max_loss is None:
        return _least_loss(groups, time_bound)
    picks = select([[(option.seconds, option.loss) for option in group.options] for group in groups], loss_bound)
    return [group.options[pick] for group, pick in zip(groups, picks, strict=True)]


def front(groups: Sequence[GroupOptions], mode: str = Mode.AUTO) -> list[tuple[float, float]]:
    """(seconds, loss) of plans that no other plan from the mode's options is better than in both, fastest first: the least
    loss within up to FRONT_POINTS budgets, from the time of the fastest plan to that of the plan of least loss.
    """
    groups = [group.offered(Mode(mode)) for group in groups]
    fastest = sum(min(option.seconds for option in group.options) for group in groups)
    best = sum(group.least.seconds for group in groups)
    points: list[tuple[float, float]] = []
    for step in range(FRONT_POINTS):
        within = fastest * (best / fastest) ** (step / (FRONT_POINTS - 1)) * _SLACK
        chosen = _least_loss(groups, within)
        point = (sum(option.seconds for option in chosen), sum(option.loss for option in chosen))
        if not points or point[1] < points[-1][1]:
            points.append(point)
    return points


def _least_loss(groups: Sequence[GroupOptions], time_bound: float) -> list[Option]:
    chosen = [group.least for group in groups]
    if sum(option.seconds for option in chosen) <= time_bound:
        return chosen
    picks = select([[(option.loss, option.seconds) for option in group.options] for group in groups], time_bound)
    chosen = [group.options[pick] for group, pick in zip(groups, picks, strict=True)]
    # Of equal losses the fastest was taken. Options stand in the order of preference: finest groups, cheaper transform.
    spent = sum(option.seconds for option in chosen)
    for index, group in enumerate(groups):
        taken = chosen[index]
        for option in group.options:
            if option.loss <= taken.loss and spent - taken.seconds + option.seconds <= time_bound:
                chosen[index], spent = option, spent - taken.seconds + option.seconds
                break
    return chosen


def _mixed(groups: Sequence[GroupOptions], time_bound: float, loss_bound: float) -> list[Option]:
    """Mode.MIXED: see there. Without a bound, the sensitive inputs alone get groups of 128."""
    chosen = [group.options[-1] for group in groups]

    def gain(index: int) -> float:
        return groups[index].options[-1].loss - groups[index].options[0].loss

    def gain_per_second(index: int) -> float:
        spent = groups[index].options[0].seconds - groups[index].options[-1].seconds
        return gain(index) / spent if spent > 0 else math.inf

    sensitive = sorted((i for i, group in enumerate(groups) if group.writes), key=gain, reverse=True)
    others = sorted((i for i, group in enumerate(groups) if not group.writes), key=gain_per_second, reverse=True)
    bounded = (time_bound, loss_bound) != (math.inf, math.inf)
    for index in sensitive + (others if bounded else []):
        if loss_bound < math.inf and sum(option.loss for option in chosen) <= loss_bound:
            break
        before, chosen[index] = chosen[index], groups[index].options[0]
        if sum(option.seconds for option in chosen) > time_bound:
            chosen[index] = before
            break
    return chosen
