"""kernels/index.py: what it reads from index.cuh, what it refuses, and every index function at values computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apex4_quant.kernels import index

# name -> [(arguments, value)]
VALUES: dict[str, list[tuple[tuple[int, ...], int]]] = {
    "sm80_activation_byte": [((0, 3), 48), ((1, 3), 112), ((2, 0), 144), ((5, 1), 320 + 48), ((6, 3), 384), ((8, 2), 544)],
    "sm90_activation_byte": [((0, 7), 112), ((1, 0), 144), ((7, 7), 896), ((10, 3), 1280 + 16)],
    "sm80_ldmatrix_row": [((0,), 0), ((15,), 15), ((16,), 0), ((31,), 15)],
    "sm80_ldmatrix_chunk": [((15, 0), 0), ((16, 0), 1), ((3, 1), 2), ((31, 1), 3)],
    "sm80_weight_byte": [((0, 31), 496), ((3, 5), 1616)],
    "sm80_scale_position": [((0, 4), 0), ((0, 3), 48), ((7, 30), 46), ((5, 1), 26)],
    "accumulator_row": [((0, 0), 0), ((3, 0), 0), ((4, 1), 9), ((31, 1), 15)],
    "accumulator_column": [((0, 0), 0), ((3, 1), 7), ((6, 0), 4)],
    "sm90_weight_byte": [((1, 3, 31), 2048 + 1536 + 496), ((0, 2, 1), 1040)],
    "sm90_scale_position": [((0, 3), 0), ((3, 31), 62), ((1, 9), 20)],
    "rows_column": [((0,), 0), ((7,), 112), ((9,), 16)],
    "rows_slice_row": [((13, 0), 0), ((13, 2), 1), ((7, 3), 7)],
    "rows_slice_block": [((13, 0), 13), ((13, 2), 3), ((7, 3), 0)],
    "rows_transformed_column": [((0, 0), 0), ((7, 0), 56), ((9, 1), 72)],
    "sm80_octet_byte": [((0, 24), 12), ((1, 32), 64 + 16), ((2, 32), 128), ((6, 8), 384 + 48 + 4), ((8, 120), 512 + 60)],
    "sm90_octet_byte": [((0, 8), 8), ((1, 16), 128), ((7, 0), 896 + 112), ((10, 120), 1280 + 80 + 8)],
    "sm80_octet_nibble": [((0,), 0), ((7,), 7)],
    "sm90_octet_nibble": [((0,), 0), ((1,), 2), ((4,), 1), ((7,), 7)],
    "dense_piece_column": [((0, 3), 24), ((3, 5), 104)],
    "dense_piece_word": [((0, 1), 1), ((1, 0), 2), ((7, 1), 3)],
    "dense_input": [((0, 0), 0), ((0, 9), 3), ((1, 2), 12), ((7, 15), 127), ((2, 6), 56)],
    "dense_output": [((0, 7), 97), ((15, 0), 30), ((3, 5), 71)],
    "dense_fragment_byte": [((0, 0, 31), 496), ((2, 15, 1), 24080)],
    "feedback_fragment_byte": [((1, 0, 31), 496), ((3, 2, 1), 2560 + 16), ((7, 6, 0), 13824)],
    "dense_core_word": [((0, 0, 1, 31), 63), ((7, 15, 1, 3), 7168 + 960 + 35), ((1, 2, 0, 0), 1152)],
    "whole_slice": [((0,), 0), ((7,), 1), ((31,), 7)],
    "whole_column": [((1, 0), 16), ((7, 1), 112), ((4, 1), 64)],
    "whole_transformed_slice": [((0, 1), 1), ((7, 0), 6), ((30, 1), 5)],
    "whole_transformed_column": [((3,), 0), ((9,), 32), ((31,), 112)],
    "whole_product_input": [((1,), 1), ((2,), 16), ((7,), 49), ((8,), 64)],
    "whole_product_output": [((1,), 16), ((8,), 1), ((15,), 113)],
    "few_slice": [((0,), 0), ((9,), 1), ((31,), 3)],
    "few_column": [((3, 0), 48), ((4, 1), 72), ((31, 1), 120)],
    "few_transformed_slice": [((4,), 0), ((7,), 3), ((30,), 2)],
    "whole_copy_column": [((3, 0), 24), ((4, 3), 96), ((5, 1), 40)],
    "whole_copy_slot": [((5, 0), 5), ((5, 1), 4), ((6, 3), 7)],
    "whole_read_copy": [((1, 0), 0), ((2, 0), 1), ((31, 1), 3)],
    "whole_read_slot": [((0, 1), 1), ((1, 0), 2), ((2, 0), 1), ((7, 1), 6)],
    "s8_ldmatrix_row": [((7,), 7), ((9,), 1), ((31,), 7)],
    "s8_ldmatrix_chunk": [((0, 0), 0), ((31, 0), 3), ((8, 1), 5)],
    "s8_output_byte": [((64, 0, 3), 6), ((64, 2, 0), 288), ((128, 1, 5), 282)],
    "exact_token_byte": [((1,), 4), ((2,), 1), ((4,), 32), ((16,), 2), ((50,), 11), ((127,), 127)],
    "sm90_token_byte": [((1, 0, 9), 144), ((3, 2, 5), 272), ((4, 3, 0), 48)],
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    for arguments, value in VALUES[name]:
        assert index.index_function(name)(*arguments) == value, arguments
    columns = [np.array(column) for column in zip(*(arguments for arguments, _ in VALUES[name]), strict=True)]
    assert index.index_function(name)(*columns).tolist() == [value for _, value in VALUES[name]]


def test_no_index_function_is_without_values() -> None:
    assert set(index.index_functions()) == set(VALUES)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_tokens_stand_where_the_core_matrices_of_a_descriptor_are(rows: int) -> None:
    """wgmma reads row r of the core matrix of chunk c at 16 r + c * stride, the stride being that of the descriptor."""
    row, chunk = np.meshgrid(np.arange(rows), np.arange(64), indexing="ij")
    bytes_ = index.index_function("sm90_token_byte")(rows, row, chunk)
    assert (bytes_ == 16 * row + chunk * (16 * rows)).all()
    assert sorted(bytes_.flatten()) == list(range(0, 16 * rows * 64, 16)), "every 16 bytes have one owner"


def read(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    path = folder / "index.cuh"
    path.write_text("#pragma once\n" + text)
    monkeypatch.setattr(index, "SOURCE", path)
    return index.index_functions.__wrapped__()


def test_what_both_languages_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "APEX4_INDEX(f, (int a, int b), (a << 2 | b >> 1 & 3) ^ 16 * (a - 1))\nAPEX4_INDEX(g, (int c), c + 1)\n"
    functions = read(text, tmp_path, monkeypatch)
    assert set(functions) == {"f", "g"} and functions["g"](1) == 2
    assert functions["f"](3, 7) == (3 << 2 | 7 >> 1 & 3) ^ 32


@pytest.mark.parametrize(
    "expression", ["a / 4", "a % 4", "a < 4", "4 > a", "!a", "~a", "a == 1", "a ? 1 : 2", "a, 1", "a // 4", "a[0]"]
)  # fmt: skip
def test_an_operator_the_languages_may_differ_on(
    expression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"index\.cuh: bad uses an operator that Python and C\+\+ read differently"):
        read(f"APEX4_INDEX(bad, (int a), {expression})\n", tmp_path, monkeypatch)


def test_a_function_on_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not on one line"):
        read("APEX4_INDEX(f, (int a), a)\nAPEX4_INDEX(g, (int a),\n            a)\n", tmp_path, monkeypatch)


def test_names_of_python_are_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    function = read("APEX4_INDEX(f, (int a), len(a))\n", tmp_path, monkeypatch)["f"]
    with pytest.raises(NameError):
        function([1])
