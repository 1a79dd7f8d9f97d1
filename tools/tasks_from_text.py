"""Makes the two small tasks of the tests out of the part of the general text that nothing is fitted on.

    python tools/tasks_from_text.py [--out tests/data/tasks]

`choice`: which of four sentences goes on with a passage; the other three are from other documents.
`cloze`: the next word of a passage, which occurs in it before. The output depends on nothing but the text.
"""

from __future__ import annotations

import argparse
import bz2
import json
import random
import re
from pathlib import Path

from w2a4.evaluate.data import GENERAL

ITEMS = 60


def passages(record: dict) -> list[list[str]]:
    """Paragraphs of four or more sentences, as sentences."""
    found = []
    for paragraph in record["text"].split("\n\n"):
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z“])", " ".join(paragraph.split()))
        if len(sentences) >= 4 and all(30 <= len(s) <= 220 and re.search(r"[.!?]”?$", s) for s in sentences):
            found.append(sentences)
    return found


def choice(documents: list[list[list[str]]], rng: random.Random) -> list[dict]:
    items = []
    for number, document in enumerate(documents):
        for sentences in document[:3]:
            others = rng.sample([d for i, d in enumerate(documents) if i != number], 3)
            endings = [" " + rng.choice(rng.choice(other)) for other in others]
            answer = rng.randrange(4)
            endings.insert(answer, " " + sentences[3])
            items.append({"passage": " ".join(sentences[:3]), "endings": endings, "answer": answer})
    return items[:ITEMS]


def cloze(documents: list[list[list[str]]]) -> list[dict]:
    items = []
    for document in documents:
        for sentences in document[:3]:
            words = " ".join(sentences).split(" ")
            for end in range(len(words) - 1, 20, -1):
                before, word = words[:end], words[end].rstrip(".,;:!?”")
                if len(word) >= 5 and word.isalpha() and word.islower() and word in before[: end - 5]:
                    items.append({"passage": " ".join(before), "word": " " + word})
                    break
    return items[:ITEMS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/tasks"))
    out = parser.parse_args().out
    records = [json.loads(line) for line in bz2.decompress(GENERAL.read_bytes()).splitlines()]
    held = sorted((r for r in records if r["part"] == "evaluation"), key=lambda r: r["position"])
    documents = [found for found in map(passages, held) if found]
    made = {"choice": choice(documents, random.Random(0)), "cloze": cloze(documents)}
    for name, items in made.items():
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{name}: {len(items)} items")


if __name__ == "__main__":
    main()
