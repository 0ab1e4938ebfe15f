"""How G is stored, number by number from docs/format.md §2: nothing here is computed by the code that packs it."""

from __future__ import annotations

import pytest
import torch

from apex4_quant.format.feedback import feedback_of, pack_feedback, step_order, transform_of
from apex4_quant.kernels.reference import quantize_activation

# Place in step order -> column of the block.
COLUMNS = {0: 0, 3: 3, 4: 32, 15: 99, 16: 4, 31: 103, 32: 8, 112: 28, 116: 60, 127: 127}
# (row, column) of G, a value, the bytes of its float16, and which of the stored numbers it is.
STORED = [
    (16, 0, 1.0, "003c", 0), (17, 0, -2.0, "00c0", 16), (31, 15, 0.5, "0038", 255), (32, 0, 3.0, "0042", 256),
    (33, 31, -(2.0**-14), "0084", 256 + 63), (112, 0, 255.0, "f85b", 5376), (112, 111, 0.75, "003a", 5487),
    (127, 111, 2.0**15, "0078", 7167),
]  # fmt: skip


def test_places_of_the_step_order() -> None:
    order = step_order()
    assert {place: int(order[place]) for place in COLUMNS} == COLUMNS
    assert order.tolist() == [4 * j + 32 * i + e for j in range(8) for i in range(4) for e in range(4)]


def test_bytes_of_a_stored_matrix() -> None:
    matrix = torch.zeros(2, 184, 128, dtype=torch.float16)
    matrix[:, :128] = torch.eye(128)
    feedback = torch.zeros(2, 128, 128, dtype=torch.float16)
    expected = bytearray(2 * 184 * 128 * 2)
    for block in range(2):
        start = 2 * 184 * 128 * block
        for k in range(128):
            expected[start + 2 * 129 * k : start + 2 * 129 * k + 2] = bytes.fromhex("003c")
    for row, column, value, text, number in STORED:
        feedback[1, row, column] = value
        start = 2 * (184 * 128 + 128 * 128 + number)
        expected[start : start + 2] = bytes.fromhex(text)
    matrix[:, 128:] = pack_feedback(feedback)
    assert matrix.numpy().tobytes() == bytes(expected)
    again = feedback_of(matrix)
    assert again is not None and torch.equal(again, feedback)
    assert torch.equal(transform_of(matrix), torch.eye(128).half().expand(2, -1, -1))
    assert transform_of(matrix).is_contiguous() and feedback_of(transform_of(matrix)) is None


def test_every_number_has_a_place_and_nothing_else_is_stored() -> None:
    steps = torch.arange(128) // 16
    below = steps[:, None] > steps[None, :]
    feedback = torch.randn(3, 128, 128)
    rows = pack_feedback(feedback)
    assert rows.shape == (3, 56, 128) and int(below.sum()) == 56 * 128
    packed = torch.cat((torch.zeros(3, 128, 128), rows), 1)
    assert torch.equal(feedback_of(packed), feedback * below)  # type: ignore[arg-type]
    assert torch.equal(rows.flatten(1)[:, 256:][:, :512], feedback[:, 32:48, :32].flatten(1))
    assert pack_feedback(feedback[:0]).shape == (0, 56, 128)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        # 28: 2, error -1/4. 4: 1, error -1/4. 32: 1.625 - 0.25 = 1.375. 0: 3.125 + 0.125 - 0.5 = 2.75.
        (1.0, {28: 2, 4: 1, 32: 1, 0: 3, 1: 7}),
        # 1 is clamped, to nobody's good. 28: 4.5 -> 4, error -1/2. 4: 2.5 -> 2, -1/2. 32: 3.25 - 0.5. 0: 6.25 + 0.25 - 1 = 5.5.
        (0.5, {28: 4, 4: 2, 32: 3, 0: 6, 1: 7}),
    ],
)
def test_codes_by_hand(clip: float, expected: dict[int, int]) -> None:
    """T is 1. The error of column 28 (place 112) goes to columns 0 and 32 (places 0 and 4), that of column 4 (place 16) to column 0."""
    matrix = torch.zeros(1, 184, 128)
    matrix[0, :128] = torch.eye(128)
    matrix[0, 128 + 42, 0], matrix[0, 128 + 42, 4], matrix[0, 128, 0] = -0.5, 1.0, 2.0  # G[112, 0], G[112, 4], G[16, 0]
    x = torch.zeros(1, 128)
    x[0, 1], x[0, 28], x[0, 32], x[0, 4], x[0, 0] = 7.0, 2.25, 1.625, 1.25, 3.125
    codes, scale = quantize_activation(x, 128, clip, False, matrix)
    assert float(scale) == clip
    assert {int(k): int(codes[0, k]) for k in codes[0].nonzero().flatten()} == expected
