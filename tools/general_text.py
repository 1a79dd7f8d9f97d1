"""Makes the packaged general text from a folder of text collected elsewhere.

    python tools/general_text.py FOLDER [--avoid FILE] [--out w2a4/evaluate/text]

FOLDER holds `*.jsonl.gz`, one object `{"text": …, "source": "owner/repository:path"}` a line. Of the sources
in `KINDS`, all of them CC0 or in the public domain, short excerpts of many documents are cut at ends of
paragraphs and written as `general.jsonl.bz2`, each with its source, its part (`calibration` or `evaluation`)
and its position there. No document, and no book, is in both parts; nor are twelve words in a row, and none of
the FILE to avoid are in either. The output depends on nothing but the input.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = "w2a4 general text 1"

#: Characters of each part; both together compress to just under 400,000 bytes.
CHARACTERS = {"evaluation": 186_000, "calibration": 1_127_000}

#: Share of the documents that may be held out; of the books, those of `HELD_OUT_BOOKS`.
HELD_OUT = 0.16

#: Words in a row that no two parts may share.
SHINGLE = 12


@dataclass(frozen=True)
class Kind:
    """A kind of text: its share of all characters, its sources, and how long its excerpts are at least."""

    share: float
    sources: tuple[str, ...]
    length: int


BOOKS = "standardebooks/"
KINDS = {
    "encyclopaedia": Kind(0.15, ("factbook/factbook.json",), 2600),
    "prose": Kind(0.30, ("GSA/digitalgov.gov", "18F/18f.gsa.gov", "18F/guides"), 2600),
    "essays": Kind(
        0.11,
        (
            BOOKS + "henry-david-thoreau_walden",
            BOOKS + "charles-darwin_the-origin-of-species",
            BOOKS + "ralph-waldo-emerson_essays",
            BOOKS + "g-k-chesterton_heretics",
            BOOKS + "john-stuart-mill_on-liberty",
        ),
        2600,
    ),
    "fiction": Kind(
        0.19,
        (
            BOOKS + "l-m-montgomery_anne-of-green-gables",
            BOOKS + "virginia-woolf_mrs-dalloway",
            BOOKS + "herman-melville_moby-dick",
            BOOKS + "jack-london_the-call-of-the-wild",
            BOOKS + "oscar-wilde_the-picture-of-dorian-gray",
            BOOKS + "oscar-wilde_the-importance-of-being-earnest",
            BOOKS + "arthur-conan-doyle_the-adventures-of-sherlock-holmes",
            BOOKS + "f-scott-fitzgerald_the-great-gatsby",
            BOOKS + "edith-wharton_the-age-of-innocence",
            BOOKS + "jane-austen_pride-and-prejudice",
            BOOKS + "h-g-wells_the-war-of-the-worlds",
            BOOKS + "mary-shelley_frankenstein",
            BOOKS + "george-bernard-shaw_pygmalion",
        ),
        2600,
    ),
    "technical": Kind(0.14, ("python/peps", "ethereum/EIPs"), 2600),
    "recipes": Kind(0.06, ("LukeSmithxyz/based.cooking",), 1600),
    "code": Kind(0.05, ("30-seconds/30-seconds-of-code", "nothings/stb"), 1600),
}

#: Books that are held out whole.
HELD_OUT_BOOKS = {
    BOOKS + "john-stuart-mill_on-liberty",
    BOOKS + "jack-london_the-call-of-the-wild",
    BOOKS + "edith-wharton_the-age-of-innocence",
    BOOKS + "oscar-wilde_the-importance-of-being-earnest",
}

#: These two of Python's proposals do not say that they are in the public domain.
LEFT_OUT = {"python/peps:peps/pep-0437.rst", "python/peps:peps/pep-0600.rst"}


@dataclass(frozen=True)
class Excerpt:
    text: str
    source: str

    def shingles(self) -> set[str]:
        return shingles(self.text)


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE` words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def number(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256("\0".join(map(str, (SEED, *parts))).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def read(folder: Path) -> Iterator[dict[str, str]]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a text, a fenced block of code being one; links without target become words."""
    text = re.sub(r"!?\[([^\[\]]*)\]\(\s*\)", r"\1", text)
    found: list[str] = []
    for part in re.split(r"\n{2,}", text.strip()):
        if found and "\n".join(found[-1:]).count("```") % 2:
            found[-1] += "\n\n" + part
        else:
            found.append(part.rstrip())
    return found


def excerpt(document: dict[str, str], length: int) -> Excerpt | None:
    """`length` to `2 * length` characters in whole paragraphs; None where that is impossible."""
    parts = paragraphs(document["text"])
    rest = sum(map(len, parts))
    starts = []
    for index, part in enumerate(parts):
        if rest < length:
            break
        starts.append(index)
        rest -= len(part)
    if not starts:
        return None
    # Half of all excerpts begin where their document does.
    begins = number(document["source"], document["text"], "begins") < 0.5
    start = 0 if begins else starts[int(number(document["source"], document["text"], "start") * len(starts))]
    taken: list[str] = []
    for part in parts[start:]:
        taken.append(part)
        if sum(map(len, taken)) >= length:
            break
    text = "\n\n".join(taken)
    readable = sum(character.isalpha() or character.isspace() for character in text) / len(text)
    return Excerpt(text, document["source"]) if len(text) <= 2 * length and readable > 0.7 else None


def held_out(source: str) -> bool:
    repository = source.partition(":")[0]
    if repository.startswith(BOOKS):
        return repository in HELD_OUT_BOOKS
    return number(source, "part") < HELD_OUT


def choose(excerpts: Iterable[Excerpt], kind: Kind, characters: float, seen: set[str]) -> list[Excerpt]:
    """Excerpts of a kind, a source after the other in turn, until they have so many characters.

    `seen` holds what they must not repeat, and gets what they say.
    """
    by_source = defaultdict(list)
    for one in excerpts:
        by_source[one.source.partition(":")[0]].append(one)
    for found in by_source.values():
        found.sort(key=lambda one: number(one.source, one.text, "order"))
    chosen: list[Excerpt] = []
    while by_source and characters > 0:
        for source in sorted(by_source):
            if not by_source[source]:
                del by_source[source]
                continue
            one = by_source[source].pop()
            if characters > 0 and not one.shingles() & seen:
                chosen.append(one)
                seen |= one.shingles()
                characters -= len(one.text)
    return chosen


def mixed(kinds: dict[str, list[Excerpt]]) -> list[Excerpt]:
    """All excerpts in such an order that every kind is spread evenly: any prefix is a fair sample."""
    positions = [
        ((index + number(name, index)) / len(found), one)
        for name, found in kinds.items()
        for index, one in enumerate(found)
    ]
    return [one for _, one in sorted(positions, key=lambda pair: pair[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--avoid", type=Path, metavar="FILE", help="text to share no twelve words with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "w2a4/evaluate/text")
    arguments = parser.parse_args()
    documents = [one for one in read(arguments.folder) if one["source"] not in LEFT_OUT]
    avoided = set()
    if arguments.avoid:
        for line in arguments.avoid.read_text(encoding="utf-8").splitlines():
            avoided |= shingles(line)
    records = []
    seen = set(avoided)
    for part, characters in CHARACTERS.items():
        kinds = {}
        for name, kind in KINDS.items():
            cut = (
                excerpt(document, kind.length)
                for document in documents
                if document["source"].partition(":")[0] in kind.sources
                and held_out(document["source"]) == (part == "evaluation")
            )
            kinds[name] = choose((one for one in cut if one), kind, characters * kind.share, seen)
            print(
                f"{part} {name}: {len(kinds[name])}, {sum(len(one.text) for one in kinds[name])} characters"
            )
        records += [
            {"part": part, "position": position, **vars(one)} for position, one in enumerate(mixed(kinds))
        ]
    # What is alike compresses best side by side.
    records.sort(key=lambda record: (record["source"], record["part"], record["position"]))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = bz2.compress(lines.encode())
    (arguments.out / "general.jsonl.bz2").write_bytes(data)
    print(f"{len(records)} excerpts, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:12]}")


if __name__ == "__main__":
    main()
