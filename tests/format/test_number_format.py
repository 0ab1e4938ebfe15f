"""The numbers of the format: which activation bits are legal. Group sizes are tested with the configuration that holds them."""

from __future__ import annotations

from typing import Any

import pytest

from apex4_quant.errors import UsageError
from apex4_quant.format.number_format import (
    CODE_MAX,
    LARGEST_K_OF_TOKENS,
    TOKEN_CODE_MAX,
    parse_activation_bits,
)
from apex4_quant.kernels.folding import FOLDED_MAX, RATIO_MAX


@pytest.mark.parametrize("value", [0, 5, 16, -8, 4.0, 8.0, True, "8", None, [8]])
def test_other_bits_are_refused_in_one_sentence(value: Any) -> None:
    with pytest.raises(UsageError) as raised:
        parse_activation_bits(value)
    assert str(raised.value) == f"activation bits {value!r} are not known: give one of 4, 8"


def test_legal_bits() -> None:
    assert [parse_activation_bits(bits) for bits in (4, 8)] == [4, 8]


def test_an_integer_of_32_bits_holds_the_longest_sum_and_of_twice_as_many_not() -> None:
    assert FOLDED_MAX == (CODE_MAX * RATIO_MAX + 128) >> 8
    longest = TOKEN_CODE_MAX * FOLDED_MAX * LARGEST_K_OF_TOKENS
    assert longest < 2**31 <= 2 * longest
