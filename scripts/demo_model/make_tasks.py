"""Make the two bundled lm-eval tasks from the held-out text: apex4_quant/evaluation/tasks/*.jsonl. Seeded, needs no model.

apex4_choice    which of four sentences continues a passage (the others continue other passages)
apex4_lastword  the last word of a passage, given the rest
"""

from __future__ import annotations

import json
import pathlib
import random
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNT, CONTEXT_WORDS, CONTINUATION_WORDS = 160, 48, 12


def passages() -> list[list[str]]:
    """Runs of English prose long enough for a context and its continuation."""
    text = (ROOT / "calib" / "bundled" / "heldout.txt").read_text("utf-8")
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    prose = [p for p in paragraphs if len(re.findall(r"[a-z]{3,}", p)) >= 0.5 * len(p.split()) and ">>>" not in p]
    words = [p.split(" ") for p in prose]
    return [w for w in words if len(w) >= 30]


def main() -> None:
    rng = random.Random(20260608)
    pool = passages()
    rng.shuffle(pool)
    long = [w for w in pool if len(w) >= CONTEXT_WORDS // 2 + CONTINUATION_WORDS][:COUNT]
    splits = []
    for words in long:
        cut = min(CONTEXT_WORDS, len(words) - CONTINUATION_WORDS)
        splits.append((" ".join(words[:cut]), " ".join(words[cut : cut + CONTINUATION_WORDS])))
    choice = []
    for i, (context, right) in enumerate(splits):
        others = rng.sample([s for j, (_, s) in enumerate(splits) if j != i], 3)
        answer = rng.randrange(4)
        others.insert(answer, right)
        choice.append({"context": context, "choices": others, "answer": answer})
    lastword = []
    for words in pool:
        end = next((i for i in range(min(len(words), 60) - 1, 20, -1) if re.fullmatch(r"[a-z]{4,}", words[i])), None)
        if end is not None and len(lastword) < COUNT:
            lastword.append({"context": " ".join(words[:end]), "word": words[end]})
    for name, rows in (("apex4_choice", choice), ("apex4_lastword", lastword)):
        path = ROOT / "apex4_quant" / "evaluation" / "tasks" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(path.name, len(rows))


if __name__ == "__main__":
    main()
