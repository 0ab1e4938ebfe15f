"""What an input group may get: group sizes, transforms, and what each mode offers of them."""

from __future__ import annotations

from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.planning.options import Choice, GroupOptions, Mode, Option, choices_of, ladder_of

DENSE, FEEDBACK, HADAMARD = TransformKind.DENSE, TransformKind.FEEDBACK, TransformKind.HADAMARD


def test_ladder() -> None:
    assert ladder_of(4096) == (128, 256, 512, "channel")
    assert ladder_of(768) == (128, 256, 512, "channel")
    assert ladder_of(300) == (128, 256, "channel")
    assert ladder_of(256) == (128, "channel")
    assert ladder_of(100) == (128,)


def test_choices() -> None:
    """Kernels have learned transforms with groups of 128 only."""
    assert choices_of(256, (HADAMARD, DENSE)) == [(128, HADAMARD, 4), ("channel", HADAMARD, 4), (128, DENSE, 4)]
    assert choices_of(4096, (DENSE,)) == [(128, DENSE, 4)]
    assert [choice.label for choice in choices_of(256, (HADAMARD, DENSE))] == ["128", "channel", DENSE]


def test_choices_with_activations_of_8_bits() -> None:
    """Nothing is done for a group then: coarser ones save no time."""
    choices = choices_of(256, (HADAMARD, DENSE), (4, 8))
    assert choices == [*choices_of(256, (HADAMARD, DENSE)), (128, HADAMARD, 8), (128, DENSE, 8)]
    assert [choice.label for choice in choices[3:]] == ["128 a8", "dense128 a8"]
    assert len({choice.label for choice in choices}) == len(choices)


def test_choices_with_error_feedback() -> None:
    """As those with dense128; of 8 bits it has none to make up for, and dense128 takes its place."""
    choices = choices_of(256, (HADAMARD, FEEDBACK), (4, 8))
    four = [(128, HADAMARD, 4), ("channel", HADAMARD, 4), (128, FEEDBACK, 4)]
    assert choices == [*four, (128, HADAMARD, 8), (128, DENSE, 8)]
    assert [choice.label for choice in choices[2:]] == [FEEDBACK, "128 a8", "dense128 a8"]
    assert choices_of(4096, (FEEDBACK,), (4, 8)) == [(128, FEEDBACK, 4), (128, DENSE, 8)]
    assert choices_of(128, (HADAMARD, DENSE, FEEDBACK), (8,)) == [(128, HADAMARD, 8), (128, DENSE, 8)]
    group = GroupOptions(tuple(Option(choice, 1.0, 0.5) for choice in choices))
    offered = {mode: [option.choice for option in group.offered(mode).options] for mode in Mode}
    assert offered == {Mode.AUTO: choices, Mode.W4A4: four, Mode.MIXED: four[:2], Mode.G128: four[::2]}


def test_modes_offer_what_they_may_choose_from() -> None:
    group = GroupOptions(
        (
            Option(Choice(128, HADAMARD), 3.0, 0.5),
            Option(Choice("channel", HADAMARD), 2.0, 0.5),
            Option(Choice(128, DENSE), 4.0, 0.5),
            Option(Choice(128, HADAMARD, 8), 5.0, 0.5),
            Option(Choice(128, DENSE, 8), 6.0, 0.5),
        ),
        writes=True,
    )
    offered = {mode: [option.choice for option in group.offered(mode).options] for mode in Mode}
    four = [(128, HADAMARD, 4), ("channel", HADAMARD, 4), (128, DENSE, 4)]
    assert offered == {
        Mode.AUTO: [*four, (128, HADAMARD, 8), (128, DENSE, 8)],
        Mode.W4A4: four,
        Mode.MIXED: four[:2],
        Mode.G128: four[::2],
    }
    assert all(group.offered(mode).writes for mode in Mode)
    assert group.least.choice == (
        128,
        HADAMARD,
        4,
    )  # of equal losses: fewer bits, the finest groups, the cheaper transform
