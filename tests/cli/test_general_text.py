"""The tool that made the packaged text, on a folder of small documents."""

import bz2
import gzip
import json
import random
import subprocess
import sys

from support.paths import ROOT


def sentence(draw):
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(3, 8))) for _ in range(14)) + "."


def make(folder, out, *arguments):
    out.mkdir()
    tool = [sys.executable, str(ROOT / "tools/general_text.py"), str(folder), "--out", str(out), *arguments]
    subprocess.run(tool, check=True, capture_output=True)
    content = (out / "general.jsonl.bz2").read_bytes()
    return content, [json.loads(line) for line in bz2.decompress(content).splitlines()]


def test_excerpts_are_whole_paragraphs_of_allowed_sources_and_in_one_part(tmp_path):
    draw, documents = random.Random(0), []
    names = [
        "python/peps",
        "18F/guides",
        "standardebooks/jack-london_the-call-of-the-wild",
        "someone/private",
    ]
    for index in range(160):
        paragraphs = [" ".join(sentence(draw) for _ in range(5)) for _ in range(12)]
        documents.append({"source": f"{names[index % 4]}:{index}.md", "text": "\n\n".join(paragraphs)})
    documents.append({"source": "18F/guides:again.md", "text": documents[1]["text"]})
    for name, part in (("a", documents[::2]), ("b", documents[1::2])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(document) + "\n" for document in part)
    content, records = make(tmp_path, tmp_path / "out")
    assert make(tmp_path, tmp_path / "again")[0] == content
    whole = {document["source"]: document["text"].split("\n\n") for document in documents}
    for record in records:
        paragraphs = record["text"].split("\n\n")
        start = whole[record["source"]].index(paragraphs[0])
        assert whole[record["source"]][start : start + len(paragraphs)] == paragraphs
        assert record["source"].split(":")[0] != "someone/private"
        assert record["part"] == "evaluation" or "jack-london" not in record["source"]
    in_part = lambda part: {r["source"] for r in records if r["part"] == part}  # noqa: E731
    assert not in_part("calibration") & in_part("evaluation") and len(in_part("evaluation")) > 15
    # Books are many, and only some of their excerpts fit; of two copies there is one.
    others = [record for record in records if "jack-london" not in record["source"]]
    assert len(others) == 80 and len(records) > 85

    known = others[0]["text"].split("\n\n")[0]
    (tmp_path / "known.txt").write_text(known)
    _, rest = make(tmp_path, tmp_path / "avoided", "--avoid", str(tmp_path / "known.txt"))
    assert len([r for r in rest if "jack-london" not in r["source"]]) == 79
    assert all(known not in record["text"] for record in rest)
