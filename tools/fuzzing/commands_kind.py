"""Kind `commands`: command lines with a value or a file that is wrong or strange: a result, or one line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from . import models
from .outcome import Partial, RandomDraw

_base = Path()

NUMBERS = ("0", "-1", "1", "2", "1.5", "nan", "inf", "-inf", "1e-40", "1e400", str(2**31), str(2**64), "16",
           "9" * 30, "9" * 5000, "", " ", "x", "٣", "0x10", "1_0", "\udcff", "[1]", "1e-2")  # fmt: skip
TEXTS = (
    "hello",
    "",
    " ",
    "\n",
    "a\udcffb",
    "\x01\x7f",
    "\U0001f600",
    "é" * 50,
    "x" * 3000,
    "<s></s>",
    "--help",
)
FIELDS = ("rotation.seed", "rotation.r1", "rotation.r4", "rotation.learned", "smooth", "weight_bits",
          "rotation", "group_size", "weight_method", "act_bits", "act_clip", "act_group_size", "o_proj_act",
          "kv_bits", "kv_clip", "nothing", "sink_tokens", "gptq_damp", "gptq_block", "gptq_refine",
          "first_token", "name", "", "training.lr", "a.b.c", "calib_samples", "calib_seqlen")  # fmt: skip
VALUES = (*NUMBERS, "null", "none", "auto", "search", "true", "2001-99-99", "2001-01-01", "{a: 1}", "[[[[",
          "&a [*a]",
          "!!python/object:os.system x", "a: b: c", "\"\\ud800\"", "hadamard", "random",
          "learned", "16", "8")  # fmt: skip
FILES: dict[str, bytes] = {
    "empty.txt": b"", "spaces.txt": b" \n\n", "latin.txt": b"caf\xe9 " * 100, "nul.txt": b"\0" * 500,
    "short.txt": b"abc", "half.jsonl": b'{"text": "a\\ud800b"}\n',
    "good.txt": b" ".join(b"some words to read %d." % number for number in range(200)),
    "deep.jsonl": b"[" * 100000, "list.jsonl": b"[1]\n", "long.jsonl": b'{"text": ' + b"9" * 5000 + b"}",
    "none.jsonl": b'{"text": null}\n', "bad.parquet": b"PAR1", "x.csv": b"a,b\n",
    "r.yaml": b"weight_bits: 4\n",
    "keys.yaml": b"1: 2\nfoo: 3\n", "latin.yaml": b"name: caf\xe9\n", "date.yaml": b"name: 2001-99-99\n",
    "half.yaml": b'name: "\\ud800"\n', "deep.yaml": b"[" * 3000, "list.yaml": b"- 1\n", "empty.yaml": b"",
    "digits.yaml": b"rotation: {seed: " + b"9" * 5000 + b"}\n", "bytes.gguf": b"GGUF" + b"\xff" * 60,
    "config.json": b"[" * 100000,
}  # fmt: skip


def prepare(folder: str) -> None:
    global _base
    _base = Path(folder)
    models.make(_base)


def case(seed: int) -> tuple[str, str]:
    from click.testing import CliRunner

    from w2a4.cli.main import main

    draw = RandomDraw(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        arguments, written = _command(draw, folder)
        said = draw.pick((b"hi\n", b"", b"\xff\xfe\n", b"a\n" * 3, b"/exit\n"))
        done = CliRunner().invoke(main, arguments, input=said)
        shown = " ".join(arguments).replace(scratch, "$T")[:200].encode("ascii", "backslashreplace").decode()
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            fault = done.exception
            raise RuntimeError(f"w2a4 {shown}: {type(fault).__name__}: {fault}") from fault
        leftover = [p.name for p in folder.iterdir() if p.name.startswith(".")]
        if done.exit_code and (written.exists() or leftover):
            raise Partial(
                f"w2a4 {shown}: exit code {done.exit_code}, but {leftover or [written.name]} is there"
            )
    if done.exit_code == 0:
        return "right", shown
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.exit_code not in (1, 2) or not last.lower().startswith("error: "):
        raise RuntimeError(f"w2a4 {shown}: exit code {done.exit_code} and {last[:100]!r}")
    return "refused", f"{shown}: {last}"


def _command(draw: RandomDraw, folder: Path) -> tuple[list[str], Path]:
    """Arguments, of which mostly one is strange, and what they would write."""
    out = folder / "out"
    odd = draw.pick(("model", "number", "number", "text", "option"))
    packed = draw.pick((_base / "w2", _base / "w4", _base / "fp"))
    model = str(draw.pick(_strange(folder)) if odd == "model" else packed)
    files = [str(folder / name) for name in FILES]
    kind = draw.pick(("generate", "generate", "eval", "info", "chat", "quantize", "quantize", "recipe"))
    if kind == "info":
        return ["info", draw.pick(files) if odd == "text" else model], out
    if kind == "eval":
        text = draw.pick((*files, "nowhere.txt", "hub:", str(folder))) if odd == "text" else files[5]
        length = draw.pick(NUMBERS) if odd == "number" else "16"
        return ["eval", model, "--text", text, "--seqlen", length, "--windows", "1"], out
    if kind in ("generate", "chat"):
        few = ["--max-new-tokens", draw.pick(NUMBERS) if odd == "number" and draw.number(0, 1) else "2"]
        option = draw.pick(("--temperature", "--top-k", "--top-p", "--seed", "--dtype", "--device"))
        extra = [option, draw.pick(NUMBERS)] if odd in ("option", "number") else []
        if option in ("--top-k", "--top-p", "--seed"):
            extra += ["--temperature", "1"]
        text = draw.pick(TEXTS) if odd == "text" else "hello"
        return [kind, model, *few, *extra, *(["--prompt", text] if kind == "generate" else [])], out
    small = ["--set", "calib_samples=2", "--set", "calib_seqlen=16", "--set", "gptq_refine=0"]
    command = ["quantize", str(_base / "fp"), "--out", str(out), "--calib", str(folder / "good.txt"), *small]
    if kind == "recipe":
        return [*command, "--recipe", draw.pick((*files, "w2a4kv4", "nothing", ""))], out
    if draw.number(0, 3) == 0:
        command[command.index("--calib") + 1] = draw.pick((*files, "hub:", ""))
        return command, out
    return [*command, "--set", f"{draw.pick(FIELDS)}={draw.pick(VALUES)}"], out


def _strange(folder: Path) -> list[Path | str]:
    broken = folder / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return [folder, broken, folder / "nowhere", folder / "bytes.gguf", folder / "good.txt", "a\udcff"]
