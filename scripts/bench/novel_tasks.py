"""Three lm-eval tasks made of a novel: last word, cloze and continuation. scripts/bench/real_models --make writes them.

    novel_lastword   a passage without its last word, which stands in it before: is it the most probable continuation?
    novel_cloze      a sentence with a gap, in its passage: which of four words, all from the passage, stood there?
    novel_choice     a passage: which of four ends of sentences, from all over the book, is its own?

As in LAMBADA and HellaSwag, but nothing was filtered by a model: accuracies are for comparing one model with its quantized
form, not with those of other tasks. Rows are drawn evenly from the whole text, always the same. A row is a line of JSON;
lm-eval reads it with its `json` builder, which downloads nothing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = 300
PASSAGE = 40  # words before the sentence that is asked for, at least
LETTERS = re.compile(r"\b[a-z]{4,}\b")
NAMES = ("novel_lastword", "novel_cloze", "novel_choice")

_CHOICE = """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_LAST_WORD = """output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def write_tasks(text: str, out: Path) -> None:
    """NAME.yaml and NAME.jsonl of the three tasks."""
    out.mkdir(parents=True, exist_ok=True)
    made = {"novel_lastword": last_words(text), "novel_cloze": clozes(text), "novel_choice": continuations(text)}
    for name, rows in made.items():
        data = (out / f"{name}.jsonl").absolute()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\ntest_split: test\n"
        (out / f"{name}.yaml").write_text(
            head + (_LAST_WORD if name == "novel_lastword" else _CHOICE) + "metadata: {version: 1.0}\n", "utf-8"
        )


def passages(text: str) -> list[tuple[str, str]]:
    """(at least PASSAGE words of whole sentences, the sentence after them), one after the other."""
    sentences = [" ".join(each.split()) for each in re.split(r"(?<=[a-z][.!?])\s+(?=[A-Z])", text)]
    found, before = [], list[str]()
    for sentence in sentences:
        if sum(len(each.split()) for each in before) >= PASSAGE and len(sentence.split()) >= 8:
            found.append((" ".join(before), sentence))
            before = []
        else:
            before.append(sentence)
    return found


def evenly(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[index * len(rows) // ROWS] for index in range(ROWS)] if len(rows) > ROWS else rows


def last_words(text: str) -> list[dict[str, Any]]:
    rows = []
    for passage, sentence in passages(text):
        *words, last = sentence.split()
        word = last.rstrip(".!?")
        if LETTERS.fullmatch(word) and re.search(rf"\b{word}\b", f"{passage} {' '.join(words)}"):
            rows.append({"context": f"{passage} {' '.join(words)}", "word": word})
    return evenly(rows)


def clozes(text: str) -> list[dict[str, Any]]:
    """The gap is in the first half of the sentence, so that what follows it speaks for a word too."""
    draw, rows = random.Random(0), []
    for passage, sentence in passages(text):
        words = sentence.split()
        places = [place for place in range(2, len(words) // 2 + 1) if LETTERS.fullmatch(words[place])]
        others = sorted(set(LETTERS.findall(passage)) - set(words))
        if not places or len(others) < 3:
            continue
        place = draw.choice(places)
        rest = " ".join(words[place + 1 :])
        rows.append(
            _mixed(draw, f"{passage} {' '.join(words[:place])}", words[place], draw.sample(others, 3), f" {rest}")
        )
    return evenly(rows)


def continuations(text: str) -> list[dict[str, Any]]:
    draw, all_of_it = random.Random(1), list(_halves(text))
    ends = [end for _, end in all_of_it]
    rows = []
    for context, end in all_of_it:
        alike = [each for each in draw.sample(ends, min(len(ends), 40)) if each != end]
        alike.sort(key=lambda each: abs(len(each) - len(end)))  # lengths must not tell
        if len(alike) >= 3:
            rows.append(_mixed(draw, context, end, alike[:3]))
    return evenly(rows)


def _halves(text: str) -> Iterator[tuple[str, str]]:
    """(a passage and the first half of the next sentence, the second half)."""
    for passage, sentence in passages(text):
        words = sentence.split()
        if 12 <= len(words) <= 40:
            yield f"{passage} {' '.join(words[: len(words) // 2])}", " ".join(words[len(words) // 2 :])


def _mixed(draw: random.Random, context: str, right: str, wrong: list[str], after: str = "") -> dict[str, Any]:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": [choice + after for choice in choices], "answer": choices.index(right)}
