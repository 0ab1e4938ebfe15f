"""The tensors of fused linears: loaded slice by slice, given back whole; what cannot run together is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apex4_quant.errors import Apex4Error
from apex4_quant.format.layouts import get_layout
from apex4_quant.format.quant_config import LinearFormat
from apex4_quant.format.transform_kind import TransformKind
from apex4_quant.integrations.vllm.slices import Piece, cut_features, cut_rows
from apex4_quant.integrations.vllm.stored import Member, StoredLinears

K = 384


def format_of(n: int, layout: str, transform: TransformKind, owner: str | None, k: int = K) -> LinearFormat:
    return LinearFormat(n, k, 128, get_layout(layout), transform, 1.0, owner)


def member(name: str, format: LinearFormat, rank: int, ranks: int, along_k: bool = False) -> Member:
    n, k = ((0, 1), (rank, ranks)) if along_k else ((rank, ranks), (0, 1))
    rows = cut_rows(name, format, [Piece(0, format.out_features)], *n)
    return Member(name, format, name, rows, cut_features(name, format, *k))


def fake(format: LinearFormat, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (format.out_features, format.padded_k), dtype=torch.int8, generator=generator)
    scales = torch.rand(format.out_features, format.groups, generator=generator).half() + 0.5
    return codes, scales


@pytest.mark.parametrize("layout", ["rowmajor", "sm80", "sm90"])
@pytest.mark.parametrize(("ranks", "along_k"), [(1, False), (2, False), (3, True)])
def test_codes_and_scales_come_back_from_slices(layout: str, ranks: int, along_k: bool) -> None:
    sizes = {"q": 256, "k": 128, "v": 128} if ranks == 2 else {"q": 200, "k": 72, "v": 130}
    if along_k:
        sizes = {"o": 200}
    formats = {name: format_of(n, layout, TransformKind.NONE, None) for name, n in sizes.items()}
    originals = {name: fake(format, seed) for seed, (name, format) in enumerate(formats.items())}
    for rank in range(ranks):
        stored = StoredLinears([member(name, format, rank, ranks, along_k) for name, format in formats.items()])
        tensors = {part: torch.zeros(shape, dtype=dtype) for part, (shape, dtype) in stored.shapes.items()}
        with pytest.raises(Apex4Error, match="no tensor"):
            stored.require_complete()
        for name, (codes, scales) in originals.items():
            pack = formats[name].layout
            stored.load("weight_packed", tensors["weight_packed"], pack.pack(codes), name)
            stored.load("weight_scale", tensors["weight_scale"], pack.pack_scales(scales), name)
        stored.require_complete()
        stored.require_legal(tensors["weight_packed"], tensors["weight_scale"], None)
        codes, scales = stored.codes_and_scales(tensors["weight_packed"], tensors["weight_scale"])
        parts = originals.values()
        if along_k:
            expected = [(c[:, 128 * rank :][:, :128], s[:, rank : rank + 1]) for c, s in parts]
        else:
            expected = [(c.chunk(ranks)[rank], s.chunk(ranks)[rank]) for c, s in parts]
        assert torch.equal(codes, torch.cat([c for c, _ in expected]))
        assert torch.equal(scales, torch.cat([s for _, s in expected]))


@pytest.mark.parametrize(
    ("kind", "rows"), [(TransformKind.DENSE, 128), (TransformKind.FEEDBACK, 184), (TransformKind.FEEDBACK_16, 185)]
)
def test_a_transform_is_cut_with_the_input_features_and_whole_for_all_rows(kind: TransformKind, rows: int) -> None:
    format = format_of(128, "sm90", kind, None)
    matrix = torch.randn(3, rows, 128, generator=torch.Generator().manual_seed(0)).half()
    for along_k, expected in ((True, matrix[2:]), (False, matrix)):
        rank, ranks = (2, 3) if along_k else (1, 2)
        stored = StoredLinears([member("o", format, rank, ranks, along_k)])
        shape, dtype = stored.shapes["input_transform"]
        target = torch.zeros(shape, dtype=dtype)
        stored.load("input_transform", target, matrix, "o")
        assert torch.equal(target, expected)
        with pytest.raises(Apex4Error, match=r"o\.input_transform is float16 .* does not belong to its config\.json"):
            stored.load("input_transform", target, matrix[:, :100], "o")
    shared = StoredLinears([member("o", replace(format, transform=TransformKind.SHARED), 2, 3, True)])
    assert shared.shapes["input_transform"][0] == (1, 128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 256}, "a and b read one input.* group size 128 and 256"),
        ({"activation_clip": 0.9}, "a and b .* activation_clip 1.0 and 0.9"),
        ({"transform": TransformKind.HADAMARD, "transform_from": None}, "transform dense128 and hadamard128"),
        ({"transform": TransformKind.FEEDBACK}, "transform dense128 and feedback128"),
        ({"transform_from": None}, "a and b .* have a transform each"),
        ({"transform_from": "c"}, "b takes its transform from c and a reads the same input"),
    ],
)
def test_members_that_quantize_their_input_differently_are_refused(change: dict[str, object], message: str) -> None:
    first = format_of(128, "sm90", TransformKind.DENSE, None)
    second = replace(format_of(128, "sm90", TransformKind.DENSE, "a"), **change)  # type: ignore[arg-type]
    with pytest.raises(Apex4Error, match=message):
        StoredLinears([member("a", first, 0, 1), member("b", second, 0, 1)])


def test_a_transform_of_another_layer_is_refused() -> None:
    with pytest.raises(Apex4Error, match="takes its transform from elsewhere, which vLLM runs in another layer"):
        StoredLinears([member("a", format_of(128, "sm90", TransformKind.DENSE, "elsewhere"), 0, 1)])
