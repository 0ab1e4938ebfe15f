"""The HTML report: one file, everything recorded, pictures whose bytes depend on the numbers alone."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from apex4_quant.errors import UsageError
from apex4_quant.publishing.folder import CheckpointFolder
from apex4_quant.publishing.pictures import draw
from apex4_quant.publishing.records import record_evaluation
from apex4_quant.publishing.report import write_report

from ..hub_server.server import HubServer
from .test_card import QUALITY, SPEED, card_of

VOID = {"meta", "br", "img", "path", "use"}


@pytest.fixture(autouse=True)
def only_the_server(at_hub: HubServer) -> None:
    """The original's card is asked for at the Hub: at this one, which has none."""


class Balanced(HTMLParser):
    """Fails for an element that is closed and not open, or a reference to something outside of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attributes:
            outside = name in ("src", "href", "xlink:href") and not str(value).startswith("#")
            assert not outside, f"{tag} refers to {value}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag, tag


def measured(folder: Path) -> Path:
    record_evaluation(str(folder), QUALITY | {"divergence": 0.015625, "top1_agreement": 0.875}, ["eval", "x"])
    record_evaluation(str(folder), QUALITY | {"text": "heldout", "divergence": 0.03125}, ["eval", "x"])
    record_evaluation(str(folder), SPEED, ["eval", "x", "--throughput"])
    return folder


def with_plan(folder: Path) -> Path:
    report = json.loads((folder / "apex4_report.json").read_text())
    report["quantized"][0] |= {"group_size": 256, "fallback": "shared statistics", "calibration_tokens": 17}
    report["messages"] = ["layer 1: a <strange> weight"]
    (folder / "apex4_report.json").write_text(json.dumps(report))
    return folder


def test_one_page_with_everything(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_plan(measured(checkpoint("model<b>")))
    result = write_report(folder, tmp_path / "report.html")
    assert (result["linears"], result["records"]) == (6, 3)
    assert result["pictures"] == ["output_error", "size", "plan", "divergence"]
    page = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.count["svg"] == 4 and "<h1>model&lt;b&gt;</h1>" in page
    for shown in (
        "12.3457", "+1.0957 (+9.74 %)", "0.01562", "0.8750", "4321.5", "model.layers.1.self_attn.v_proj", "0.0600",
        "shared statistics", "17", "4.250", "<li>layer 1: a &lt;strange&gt; weight</li>",
    ):  # fmt: skip
        assert shown in page, shown


ORIGIN = {
    "target": "A100", "tokens": 2048, "mode": "auto", "front": [[10.5, 0.04], [11, 0.02], [12.25, 0.0175]],
    "predicted": {"microseconds": 11.125, "of_fastest": 1.0595, "speedup_over_fp16": 1.56, "loss": 0.01875},
}  # fmt: skip


def of_a_plan(folder: Path, origin: dict[str, Any] = ORIGIN, **settings: Any) -> Path:
    report = json.loads((folder / "apex4_report.json").read_text())
    report["settings"] |= {"plan": {}, "plan_origin": origin} | settings
    (folder / "apex4_report.json").write_text(json.dumps(report))
    return folder


def test_a_plan_with_what_was_predicted_and_measured(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = of_a_plan(measured(checkpoint()))
    said = (
        "Planned for A100, 2048 tokens at once (mode auto). Predicted for all quantized linears: 11.1 us, 1.06 times the "
        "fastest plan, 1.56 times as fast as FP16, and a KL divergence of 0.01875 nats a token."
    )
    assert said in card_of(folder, pictures=True) and "(apex4_pictures/plan_front.svg)" in card_of(folder)
    write_report(folder, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    Balanced().feed(page)
    assert said in page and "plan_origin" not in page
    for row in (("10.50", "0.04000", ""), ("11.12", "0.01875", "this plan"), ("12.25", "0.01750", "")):
        cells = f"<td>{row[0]}</td><td class='n'>{row[1]}</td><td class='n'>{row[2]}</td>"
        assert cells in page, row
    assert "<td>measured on apex4&#x27;s bundled held-out text</td><td>0.03125</td>" in page


def test_a_plan_that_was_edited_shows_no_prediction_of_it(checkpoint: Callable[..., Path]) -> None:
    """Neither of one of which linears were left out. The front of all plans stays, and what was measured."""
    edited = of_a_plan(measured(checkpoint("edited")), {key: ORIGIN[key] for key in ORIGIN if key != "predicted"})
    partial = of_a_plan(measured(checkpoint("partial")), ignore=["*.q_proj"])
    drawn = draw(CheckpointFolder(of_a_plan(measured(checkpoint("whole")))))["plan_front"]
    for folder in (edited, partial):
        assert "Nothing was predicted of it as it is" in card_of(folder) and "11.1 us" not in card_of(folder)
        assert draw(CheckpointFolder(folder))["plan_front"] != drawn
    unmeasured = draw(CheckpointFolder(of_a_plan(checkpoint("unmeasured"))))["plan_front"]
    assert unmeasured != drawn, "what was measured is in the picture"


def test_nothing_measured(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    write_report(checkpoint(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Nothing was measured" in page and "No linear was quantized in another way than planned" in page


def test_pictures_depend_on_the_numbers_alone(checkpoint: Callable[..., Path]) -> None:
    first, other = checkpoint("first"), checkpoint("other", bytes_before=4_000_000)
    drawn = draw(CheckpointFolder(first))
    assert draw(CheckpointFolder(first)) == drawn
    assert {name for name, svg in draw(CheckpointFolder(other)).items() if svg != drawn[name]} == {"size"}


def test_the_card_shows_pictures_that_are_there(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    assert "![" not in card_of(folder)
    shown = re.findall(r"!\[(.+)\]\((.+)\)", card_of(folder, pictures=True))
    assert shown == [("output error", "apex4_pictures/output_error.svg"), ("size", "apex4_pictures/size.svg")]
    assert all((folder / path).read_text().startswith("<svg") for _, path in shown)


def test_refusals(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint()
    for out, sentence in (
        (tmp_path, "is a folder: give the name of the HTML file"),
        (tmp_path / "absent" / "report.html", "is no folder: make it first"),
        (folder / "report.html", "would be published: give another place"),
    ):
        with pytest.raises(UsageError, match=sentence):
            write_report(folder, out)
    os.mkfifo(tmp_path / "pipe")  # as /dev/null and /dev/stdout: what is put in its place by name is gone
    with pytest.raises(UsageError, match="pipe is no file that can be written anew"):
        write_report(folder, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pictures need matplotlib: pip install 'apex4-quant.plot.'"):
        write_report(folder, tmp_path / "report.html")


def test_record_is_refused_before_anything_is_measured(
    invoke: Callable[..., Result],
    one_sentence: Callable[..., str],
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apex4_quant.evaluation.evaluate.evaluate", None)
    one_sentence(invoke("eval", "demo", "--record"), 2, "'demo' is no local folder: leave it away")
    one_sentence(invoke("eval", tiny_model(), "--record"), 2, "is not quantized by apex4")
