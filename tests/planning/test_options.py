"""What an input group may get: group sizes, transforms, and what each mode offers of them."""

from __future__ import annotations

from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.planning.options import Choice, GroupOptions, Mode, Option, choices_of, ladder_of

DENSE, HADAMARD = TransformKind.DENSE, TransformKind.HADAMARD


def test_ladder() -> None:
    assert ladder_of(4096) == (128, 256, 512, "channel")
    assert ladder_of(768) == (128, 256, 512, "channel")
    assert ladder_of(300) == (128, 256, "channel")
    assert ladder_of(256) == (128, "channel")
    assert ladder_of(100) == (128,)


def test_choices() -> None:
    """Kernels have learned transforms with groups of 128 only."""
    assert choices_of(256, (HADAMARD, DENSE)) == [(128, HADAMARD), ("channel", HADAMARD), (128, DENSE)]
    assert choices_of(4096, (DENSE,)) == [(128, DENSE)]
    assert [choice.label for choice in choices_of(256, (HADAMARD, DENSE))] == ["128", "channel", DENSE]


def test_modes_offer_what_they_may_choose_from() -> None:
    group = GroupOptions(
        (
            Option(Choice(128, HADAMARD), 3.0, 0.5),
            Option(Choice("channel", HADAMARD), 2.0, 0.5),
            Option(Choice(128, DENSE), 4.0, 0.5),
        ),
        writes=True,
    )
    offered = {mode: [option.choice for option in group.offered(mode).options] for mode in Mode}
    assert offered == {
        Mode.AUTO: [(128, HADAMARD), ("channel", HADAMARD), (128, DENSE)],
        Mode.MIXED: [(128, HADAMARD), ("channel", HADAMARD)],
        Mode.G128: [(128, HADAMARD), (128, DENSE)],
    }
    assert all(group.offered(mode).writes for mode in Mode)
    assert group.least.choice == (128, HADAMARD)  # of three equal losses: the finest groups, the cheaper transform
