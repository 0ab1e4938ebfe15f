"""What the planner takes for every input group: against exhaustive search, by mode, by bound."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.planning.choosing import FRONT_POINTS, choose, front
from apex4_quant.planning.options import Choice, GroupOptions, Mode, Option

DENSE, HADAMARD = TransformKind.DENSE, TransformKind.HADAMARD


def option(size: int | str, seconds: float, loss: float, transform: str = HADAMARD) -> Option:
    return Option(Choice(size, transform), seconds, loss)


def random_groups(seed: int, count: int) -> list[GroupOptions]:
    """Finest first: slower and better, now and then also slower and worse. Some may have a dense transform, some 8 bits."""
    rng = random.Random(seed)
    groups = []
    for _ in range(count):
        seconds, loss, options = rng.uniform(3, 5), rng.uniform(0, 1), []
        dense = option(128, seconds * rng.uniform(1, 1.1), loss * rng.uniform(0.3, 1.1), DENSE)
        for size in (128, 256, 512, "channel")[: rng.randint(1, 4)]:
            options.append(option(size, seconds, loss))
            seconds -= rng.uniform(-0.1, 1)
            loss += rng.choice((0.0, rng.uniform(0, 1)))
        options += [dense] * rng.randint(0, 1)
        if rng.random() < 0.5:  # activations of 8 bits: better, and slower or faster
            options.append(Option(Choice(128, HADAMARD, 8), options[0].seconds * rng.uniform(0.8, 1.3), loss * 0.3))
        groups.append(GroupOptions(tuple(options), writes=rng.random() < 0.4))
    return groups


def totals(options: Any) -> tuple[float, float]:
    options = list(options)
    return sum(option.seconds for option in options), sum(option.loss for option in options)


@pytest.mark.parametrize("seed", range(30))
def test_auto_is_the_optimum_of_brute_force(seed: int) -> None:
    groups = random_groups(seed, 1 + seed % 6)
    every = [totals(selection) for selection in itertools.product(*(group.options for group in groups))]
    fastest, least = min(seconds for seconds, _ in every), min(loss for _, loss in every)
    for factor in (1.0, 1.02, 1.1, 1.25, 1.5, 3.0):
        seconds, loss = totals(choose(groups, budget=factor))
        assert seconds <= fastest * factor * (1 + 1e-6)
        assert loss == pytest.approx(min(loss for s, loss in every if s <= fastest * factor * (1 + 1e-9)))
        seconds, loss = totals(choose(groups, max_loss=factor))
        assert loss <= least * factor * (1 + 1e-6)
        assert seconds == pytest.approx(min(s for s, loss in every if loss <= least * factor * (1 + 1e-9)))


@pytest.mark.parametrize("seed", range(10))
def test_the_front_is_that_of_all_plans(seed: int) -> None:
    """No plan is better in both than a point, the ends are the fastest and the best plan, and each is what choose finds."""
    groups = random_groups(seed, 2 + seed % 4)
    every = [totals(selection) for selection in itertools.product(*(group.options for group in groups))]
    fastest, least = min(seconds for seconds, _ in every), min(loss for _, loss in every)
    points = front(groups)
    assert 1 <= len(points) <= FRONT_POINTS
    assert points[0][0] == pytest.approx(fastest) and points[-1][1] == pytest.approx(least)
    assert points == sorted(points) and all(loss > after for (_, loss), (_, after) in itertools.pairwise(points))
    for seconds, loss in points:
        assert not any(s < seconds * (1 - 1e-6) and other < loss * (1 - 1e-6) for s, other in every)
    pure = front(groups, Mode.W4A4)
    assert all(totals(choose(groups, Mode.W4A4, budget=9))[1] <= loss * (1 + 1e-9) for _, loss in pure)


def test_auto_gives_g128_where_it_costs_nothing() -> None:
    """Even if a coarser size, or a dense transform, happens to measure the same loss."""
    options = (
        option(128, 1.04, 0.5),
        option(256, 1.0, 0.5),
        option("channel", 1.0, 0.9),
        option(128, 1.045, 0.5, DENSE),
    )
    group = GroupOptions(options)
    assert [chosen.choice for chosen in choose([group] * 3)] == [(128, HADAMARD, 4)] * 3
    assert [chosen.choice for chosen in choose([group] * 3, budget=1.0)] == [(256, HADAMARD, 4)] * 3


def test_the_finest_of_equal_losses_is_taken_as_far_as_the_budget_goes() -> None:
    """Two inputs whose 256 measured no worse than their 128, and time for one of them to have 128."""
    group = GroupOptions((option(128, 11, 0.5), option(256, 10, 0.5), option("channel", 9, 0.9)))
    chosen = choose([group] * 2, budget=21 / 18)
    assert [each.choice.group_size for each in chosen] == [128, 256]
    assert [each.choice.group_size for each in choose([group] * 2, budget=20 / 18)] == [256, 256]
    # Where time is the goal, it is not spent on what the bound does not ask for.
    assert [each.choice.group_size for each in choose([group] * 2, max_loss=1)] == [256, 256]


def test_a_dense_transform_goes_where_its_time_saves_most() -> None:
    """Two inputs, one second too few for both: the one that saves more gets it; with enough time both, with none neither;
    never where it saves nothing."""

    def group(saved: float) -> GroupOptions:
        return GroupOptions((option(128, 10, 1.0), option("channel", 10, 1.5), option(128, 11, 1.0 - saved, DENSE)))

    groups = [group(0.2), group(0.5), group(-0.1)]

    def dense(mode: str, **bounds: float) -> list[int]:
        chosen = choose(groups, mode, **bounds)
        assert {each.choice.group_size for each in chosen} == {128}
        return [i for i, each in enumerate(chosen) if each.choice.transform == DENSE]

    for mode in (Mode.AUTO, Mode.G128):
        assert dense(mode) == [1]  # within 1.05 x 30
        assert dense(mode, budget=1) == []
        assert dense(mode, budget=1.07) == [0, 1]
        assert dense(mode, max_loss=1) == [0, 1]
        assert dense(mode, max_loss=1.1) == [1]
    assert [each.choice for each in choose(groups, Mode.MIXED)] == [("channel", HADAMARD, 4)] * 3


def test_g128_has_no_other_size() -> None:
    """Its budget is one of the fastest plan of 128 everywhere, however fast others are."""
    group = GroupOptions((option(128, 10, 1.0), option("channel", 1, 1.1), option(128, 10.2, 0.5, DENSE)))
    assert [chosen.choice for chosen in choose([group], Mode.G128)] == [(128, DENSE, 4)]
    assert [chosen.choice for chosen in choose([group], Mode.G128, budget=1)] == [(128, HADAMARD, 4)]
    assert [chosen.choice for chosen in choose([group])] == [("channel", HADAMARD, 4)]


def test_mixed() -> None:
    def group(writes: bool, gain: float, cost: float) -> GroupOptions:
        dense = option(128, 1, 0.1, DENSE)  # never taken: the paper has none
        return GroupOptions((option(128, 1 + cost, 1.0), option("channel", 1.0, 1 + gain), dense), writes)

    groups = [group(False, 9, 1), group(True, 1, 1), group(False, 8, 0.5), group(True, 2, 1)]

    def at_128(**bounds: float) -> list[int]:
        return [i for i, each in enumerate(choose(groups, Mode.MIXED, **bounds)) if each.choice.group_size == 128]

    assert at_128() == [1, 3]
    assert at_128(budget=1.25) == [3]  # down_proj first, the one that gains most
    assert at_128(budget=1.7) == [1, 2, 3]  # then the most loss saved per second
    assert at_128(budget=9) == [0, 1, 2, 3]
    assert at_128(max_loss=5.5) == [3]
    assert at_128(max_loss=1) == [0, 1, 2, 3]


def test_bounds_that_make_no_sense() -> None:
    groups = random_groups(0, 2)
    for arguments, noun in (
        ({"mode": "fast"}, "mode 'fast'"),
        ({"budget": 0.9}, "--budget is 0.9"),
        ({"max_loss": float("nan")}, "--max-loss is nan"),
        ({"budget": 2.0, "max_loss": 2.0}, "--budget and --max-loss"),
    ):
        with pytest.raises(UsageError, match=noun):
            choose(groups, **arguments)
