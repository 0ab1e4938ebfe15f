"""`quantization_config`: round trip, golden JSON, refusals, per-module overrides; and the table of GPUs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from apex4_quant.errors import Apex4Error, UsageError
from apex4_quant.format.number_format import group_count, group_length, padded_in_features, parse_group_size
from apex4_quant.format.quant_config import QuantConfig
from apex4_quant.hardware.gpus import GPUS, Target, resolve_target

GOLDEN: dict[str, Any] = {
    "group_size": 128,
    "layout": "rowmajor",
    "transform": "hadamard128",
    "activation_clip": 1.0,
    "target": {"gpu": None, "arch": None},
    "modules": {},
    "modules_to_not_convert": [],
    "recipe": "",
    "quant_method": "apex4",
    "format_version": 1,
    "bits": 4,
    "activation_bits": 4,
}
FULL: dict[str, Any] = {
    **GOLDEN,
    "group_size": 256,
    "layout": "sm80",
    "transform": "none",
    "activation_clip": 0.9,
    "target": {"gpu": "RTX 3090", "arch": "sm_86"},
    "modules": {
        "a.down": {"group_size": 128, "activation_clip": 0.8, "shape": [70, 200]},
        "a.up": {"group_size": "channel"},
        "b.up": {"transform": "dense128"},
        "b.gate": {"transform": "dense128", "transform_from": "b.up"},
        "b.down": {"transform": "shared128"},
    },
    "modules_to_not_convert": ["lm_head"],
    "recipe": "rtn",
}  # fmt: skip


def assert_sentence(error: Apex4Error) -> None:
    text = str(error)
    assert len(text.split()) >= 5 and "\n" not in text and text[0] not in "{[(", text


def refusal(values: dict[str, Any]) -> str:
    """The message with which the config is refused on reading."""
    with pytest.raises(Apex4Error) as caught:
        QuantConfig.from_dict(values)
    assert_sentence(caught.value)
    return str(caught.value)


# --- quantization_config ----------------------------------------------------------------------------------------------


def test_default_config_is_the_golden_json() -> None:
    assert json.loads(json.dumps(QuantConfig().to_dict())) == GOLDEN
    assert QuantConfig.from_dict(GOLDEN) == QuantConfig()


EIGHT_BITS: dict[str, Any] = {
    **GOLDEN,
    "format_version": 2,
    "activation_bits": 8,
    "modules": {"a.down": {"activation_bits": 4, "activation_clip": 0.8}, "a.up": {"group_size": "channel"}},
}


def test_activation_bits_of_each_linear() -> None:
    config = QuantConfig.from_dict(EIGHT_BITS)
    formats = [config.linear_format(name, 64, 200) for name in ("a.down", "a.up", "a.gate")]
    assert [format.activation_bits for format in formats] == [4, 8, 8]
    assert [format.activation_clip for format in formats] == [0.8, 1.0, 1.0]
    assert QuantConfig.from_dict({**GOLDEN, "format_version": 2}).activation_bits_of("a.up") == 4
    with pytest.raises(
        Apex4Error, match=r"a\.gate has 131200 input features with 8-bit activations, and at most 131072"
    ):
        config.linear_format("a.gate", 64, 131_100)
    assert config.linear_format("a.down", 64, 131_100).padded_k == 131_200


FEEDBACK: dict[str, Any] = {
    **GOLDEN,
    "transform": "feedback128",
    "modules": {"a.gate": {"transform_from": "a.up"}, "a.down": {"transform": "dense128", "group_size": 256}},
}


def test_feedback_of_each_linear() -> None:
    config = QuantConfig.from_dict(FEEDBACK)
    up, gate, down = (config.linear_format(f"a.{name}", 64, 200) for name in ("up", "gate", "down"))
    assert [each.transform for each in (up, gate, down)] == ["feedback128", "feedback128", "dense128"]
    assert [each.transform_shape for each in (up, gate, down)] == [(2, 184, 128), None, (2, 128, 128)]
    assert up.stored_bytes - gate.stored_bytes == 2 * 2 * 184 * 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_bits": 8, "format_version": 2}, "a.up has the transform feedback128 .* 8-bit activations"),
        ({"group_size": 256}, "a.up has the transform feedback128 with groups of 256"),
        ({"group_size": "channel"}, "a.up has the transform feedback128 with groups of channel"),
        (
            {"format_version": 2, "modules": {"a.up": {"activation_bits": 8}}},
            "a.up .* that is for groups of 128 and 4 bits: config.json is damaged",
        ),
    ],
)
def test_feedback_where_it_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    config = QuantConfig.from_dict(FEEDBACK | change)
    with pytest.raises(Apex4Error, match=words) as caught:
        config.linear_format("a.up", 64, 128)
    assert_sentence(caught.value)


def test_sixteen_levels_have_clip_ratios_of_blocks() -> None:
    sixteen = FEEDBACK | {"transform": "feedback128x16"}
    config = QuantConfig.from_dict(sixteen)
    up, gate = (config.linear_format(f"a.{name}", 64, 200) for name in ("up", "gate"))
    assert up.transform_shape == (2, 185, 128) and gate.transform_shape is None
    assert up.stored_bytes - gate.stored_bytes == 2 * 2 * 185 * 128
    for change, words in (
        (
            {"modules": {"a.up": {"activation_clip": 0.9}}},
            "a.up has activation_clip 0.9 .* feedback128x16, whose blocks have",
        ),
        ({"group_size": 256}, "a.up has the transform feedback128x16 with groups of 256"),
        ({"activation_bits": 8, "format_version": 2}, "a.up has the transform feedback128x16 .* 8-bit activations"),
    ):
        with pytest.raises(Apex4Error, match=words) as caught:
            QuantConfig.from_dict(sixteen | change).linear_format("a.up", 64, 128)
        assert_sentence(caught.value)


@pytest.mark.parametrize("values", [GOLDEN, FULL, EIGHT_BITS, FEEDBACK, FEEDBACK | {"transform": "feedback128x16"}])
def test_round_trip_through_json(values: dict[str, Any]) -> None:
    config = QuantConfig.from_dict(json.loads(json.dumps(values)))
    assert json.loads(json.dumps(config.to_dict())) == values
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_defaults_are_not_shared_between_configs() -> None:
    changed = QuantConfig()
    changed.modules["x"], changed.target["gpu"] = {}, "A40"
    changed.modules_to_not_convert.append("lm_head")
    assert QuantConfig().to_dict() == GOLDEN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_point": True}, ["unknown", "zero_point"]),
        ({"format_version": 3}, ["version 3", "versions 1 and 2"]),
        ({"format_version": 0}, ["version 0"]),
        ({"format_version": "1"}, ["'1'"]),
        ({"format_version": None}, ["None"]),
        ({"bits": 8}, ["bits = 8", "4"]),
        ({"activation_bits": 16}, ["activation_bits is 16", "4 or 8"]),
        ({"activation_bits": 8}, ["activation_bits is 8", "version 1"]),
        ({"format_version": 2, "activation_bits": 8.0}, ["activation_bits is 8.0", "4 or 8"]),
        ({"format_version": 2, "activation_bits": True}, ["activation_bits is True", "4 or 8"]),
        ({"format_version": 2, "activation_bits": "8"}, ["activation_bits is '8'", "4 or 8"]),
        ({"format_version": 2, "activation_bits": None}, ["activation_bits is None", "4 or 8"]),
        ({"format_version": 2, "activation_bits": 8, "activation_clip": 0.9}, ["activation_clip 0.9", "8-bit"]),
        ({"modules": {"a.up": {"activation_bits": 8}}}, ["modules['a.up'].activation_bits is 8", "version 1"]),
        ({"format_version": 2, "modules": {"a.up": {"activation_bits": 5}}}, ["modules['a.up'].activation_bits is 5"]),
        (
            {"format_version": 2, "activation_clip": 0.9, "modules": {"a.up": {"activation_bits": 8}}},
            ["modules['a.up'] has activation_clip 0.9", "8-bit"],
        ),
        ({"quant_method": "gptq"}, ["'gptq'", "'apex4'"]),
        ({"transform": "wush"}, ["transform", "'wush'"]),
        ({"layout": "sm75"}, ["layout", "'sm75'", "rowmajor"]),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], words: list[str]) -> None:
    message = refusal({**GOLDEN, **change})
    assert all(word in message for word in words), message


def test_a_config_without_a_version_is_refused() -> None:
    assert "version None" in refusal({key: value for key, value in GOLDEN.items() if key != "format_version"})


@pytest.mark.parametrize("size", [0, -128, 64, 127, 129, 192, 128.5, math.inf, math.nan, True, None, "", "row", [128]])
def test_illegal_group_size_is_refused(size: Any) -> None:
    with pytest.raises(UsageError) as caught:
        parse_group_size(size)
    assert_sentence(caught.value)
    assert repr(size) in str(caught.value) and "128" in str(caught.value) and "channel" in str(caught.value)
    assert "group size" in refusal({**GOLDEN, "group_size": size})
    assert "group size" in refusal({**GOLDEN, "modules": {"a.up": {"group_size": size}}})


@pytest.mark.parametrize(("text", "size"), [("128", 128), (256, 256), ("4096", 4096), ("channel", "channel")])
def test_legal_group_sizes(text: int | str, size: int | str) -> None:
    assert parse_group_size(text) == size and type(parse_group_size(text)) is type(size)


@pytest.mark.parametrize(
    "override",
    [
        {"bits": 8},
        {"group_size": 128, "layout": "sm80"},
        {"transform": "wush"},
        {"transform": ["none"]},
        {"group_size": 100},
    ],
)
def test_bad_override_is_refused(override: dict[str, Any]) -> None:
    message = refusal({**GOLDEN, "modules": {"a.up": override}})
    assert "a.up" in message or "group size" in message


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, "wide", None])
def test_a_clip_that_is_not_a_positive_number_is_refused(clip: Any) -> None:
    assert "activation_clip" in refusal({**GOLDEN, "activation_clip": clip})
    assert "a.up" in refusal({**GOLDEN, "modules": {"a.up": {"activation_clip": clip}}})


@pytest.mark.parametrize("override", [None, 256, "channel", [], {"shape": 5}, {"shape": "12"}])
def test_an_override_of_the_wrong_type_is_refused(override: Any) -> None:
    with pytest.raises(Apex4Error, match=r"a\.up") as caught:  # at the latest by the linear that it is about
        QuantConfig.from_dict({**GOLDEN, "modules": {"a.up": override}}).linear_format("a.up", 70, 200)
    assert_sentence(caught.value)


def test_overrides_reach_the_format_of_their_linear_only() -> None:
    config = QuantConfig.from_dict(FULL)
    down = config.linear_format("a.down", 70, 200)
    assert (down.group_size, down.activation_clip, down.transform, down.layout.name) == (128, 0.8, "none", "sm80")
    assert (down.padded_k, down.group_length, down.groups) == (256, 128, 2)
    assert (down.packed_shape, down.scale_shape) == ((2, 2, 4096), (2, 2, 64))
    assert down.stored_bytes == 2 * 2 * 4096 + 2 * (2 * 2 * 64) and down.is_padded
    up = config.linear_format("a.up", 64, 400)
    assert (up.group_size, up.activation_clip, up.padded_k, up.group_length, up.groups) == ("channel", 0.9, 512, 512, 1)
    other = config.linear_format("a.gate", 64, 512)
    assert (other.group_size, other.activation_clip, other.groups, other.is_padded) == (256, 0.9, 2, False)
    assert other.stored_bytes == 64 * 512 // 2 + 2 * 64 * 2
    dense, borrowed, shared = (config.linear_format(f"b.{name}", 64, 512) for name in ("up", "gate", "down"))
    assert [each.transform for each in (dense, borrowed, shared)] == ["dense128", "dense128", "shared128"]
    assert [each.transform_shape for each in (dense, borrowed, shared)] == [(4, 128, 128), None, (1, 128, 128)]
    rowmajor = QuantConfig(modules={"b": {"activation_clip": 0.7}}).linear_format("b", 70, 200)
    assert (rowmajor.group_size, rowmajor.activation_clip, rowmajor.transform) == (128, 0.7, "hadamard128")
    assert (rowmajor.packed_shape, rowmajor.scale_shape) == ((70, 2, 64), (70, 2, 1))


@pytest.mark.parametrize("shape", [[70, 200, 1], [70], [200, 70], [71, 200], []])
def test_a_recorded_shape_that_differs_is_refused_by_name(shape: list[int]) -> None:
    config = QuantConfig(modules={"a.down": {"shape": shape}})
    with pytest.raises(Apex4Error, match=r"a\.down is 70 x 200") as caught:
        config.linear_format("a.down", 70, 200)
    assert_sentence(caught.value)


@pytest.mark.parametrize(
    ("k", "size", "padded", "length", "count"),
    [(128, 128, 128, 128, 1), (1, 128, 128, 128, 1), (129, 128, 256, 128, 2), (300, 256, 512, 256, 2),
     (300, "channel", 384, 384, 1), (14336, 512, 14336, 512, 28), (128, 512, 512, 512, 1)],
)  # fmt: skip
def test_groups_of_padded_k(k: int, size: int | str, padded: int, length: int, count: int) -> None:
    assert (padded_in_features(k, size), group_length(k, size), group_count(k, size)) == (padded, length, count)


# --- GPUs -------------------------------------------------------------------------------------------------------------

# sm and rho, from datasheet rates (apex4_quant/hardware/gpus.py has their sources).
TABLE = {
    "A100": (80, 64), "RTX 3090": (86, 16), "A40": (86, 16), "A10": (86, 16), "RTX 4090": (89, 16), "L40S": (89, 16),
    "L40": (89, 8), "H100": (90, 29.6), "H200": (90, 29.6),
}  # fmt: skip


def test_the_table_is_the_designs() -> None:
    assert set(GPUS) == set(TABLE)
    for name, (sm, rho) in TABLE.items():
        assert GPUS[name].name == name and GPUS[name].sm == sm
        assert GPUS[name].rho == pytest.approx(rho, rel=0.03)
        assert (GPUS[name].int4_tops is None) == (sm == 90)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("spelling", ["{}", "NVIDIA {}", "nvidia-{}", "NVIDIA_{}"])
@pytest.mark.parametrize("change", [str, str.lower, str.upper, lambda text: text.replace(" ", "")])
def test_every_name_resolves_however_it_is_spelled(name: str, spelling: str, change: Any) -> None:
    sm = TABLE[name][0]
    layout = "sm90" if sm == 90 else "sm80"
    assert resolve_target(change(spelling.format(name))) == Target(gpu=name, arch=f"sm_{sm}", layout=layout)


@pytest.mark.parametrize(
    ("text", "gpu"),
    [("rtx3090", "RTX 3090"), ("3090", "RTX 3090"), ("RTX-4090", "RTX 4090"), ("4090", "RTX 4090"), ("l40s", "L40S"),
     ("GeForce RTX 3090", "RTX 3090"), ("geforce-rtx-4090", "RTX 4090"), ("NVIDIA GeForce RTX 3090", "RTX 3090")],
)  # fmt: skip
def test_spellings_of_one_card(text: str, gpu: str) -> None:
    assert resolve_target(text).gpu == gpu


@pytest.mark.parametrize(
    ("text", "arch", "layout"),
    [("sm_86", "sm_86", "sm80"), ("sm86", "sm_86", "sm80"), ("SM_80", "sm_80", "sm80"), ("sm_89", "sm_89", "sm80"),
     ("sm_75", "sm_75", "rowmajor"), ("sm_90", "sm_90", "sm90"), ("sm_90a", "sm_90", "sm90"),
     ("sm_100", "sm_100", "rowmajor"), ("sm_120a", "sm_120", "rowmajor")],
)  # fmt: skip
def test_a_bare_architecture(text: str, arch: str, layout: str) -> None:
    assert resolve_target(text) == Target(gpu=None, arch=arch, layout=layout)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Target(gpu=None, arch=None, layout="rowmajor")
    assert resolve_target("none") == plain
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_target("auto") == plain


@pytest.mark.parametrize("text", ["RTX 3080", "A1000", "A4", "", "sm_", "sm_8", "gpu", "H20", "4090s"])
def test_unknown_target_lists_what_is_known(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_target(text)
    assert_sentence(caught.value)
    assert all(word in str(caught.value) for word in [repr(text), *TABLE, "sm_", "auto", "none"])


@pytest.mark.parametrize("text", ["sm_70", "sm61"])
def test_too_old_an_architecture_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="sm_75 or newer") as caught:
        resolve_target(text)
    assert_sentence(caught.value)


@pytest.mark.parametrize(
    ("device", "capability", "gpu", "layout"),
    [
        ("NVIDIA GeForce RTX 3090", (8, 6), "RTX 3090", "sm80"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090", "sm80"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100", "sm80"),
        ("NVIDIA A10", (8, 6), "A10", "sm80"),
        ("NVIDIA A40", (8, 6), "A40", "sm80"),
        ("NVIDIA L40S", (8, 9), "L40S", "sm80"),
        ("NVIDIA L40", (8, 9), "L40", "sm80"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100", "sm90"),
        ("NVIDIA H200", (9, 0), "H200", "sm90"),
        ("Tesla T4", (7, 5), None, "rowmajor"),
        ("NVIDIA B200", (10, 0), None, "rowmajor"),
        ("NVIDIA RTX A4000", (8, 6), None, "sm80"),  # not an A40
        ("NVIDIA RTX A1000", (8, 6), None, "sm80"),  # not an A10
        ("NVIDIA L4", (8, 9), None, "sm80"),
    ],
)
def test_auto_is_the_gpu_found(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], gpu: str | None, layout: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: device)
    assert resolve_target("auto") == Target(gpu, f"sm_{capability[0]}{capability[1]}", layout)
