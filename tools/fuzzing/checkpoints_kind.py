"""Kind `checkpoints`: a packed checkpoint, spoilt. It loads to the same logits or is refused."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import models
from .outcome import RandomDraw, Silent

_base = Path()

VALUES = (None, 0, -1, 1, 3, 2**40, 1.5, "", "x", True, [], {}, [1], "float16", 1e-9)


def prepare(folder: str) -> None:
    global _base
    _base = Path(folder)
    models.make(_base)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def case(seed: int) -> tuple[str, str]:
    import w2a4

    draw = RandomDraw(seed)
    name = draw.pick(sorted(models.RECIPES))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / name
        shutil.copytree(_base / name, copy)
        what = draw.pick((_bytes, _cut, _tensors, _tensors, _tensors, _keys, _keys, _files))(draw, copy)
        try:
            model, _ = w2a4.load_model(copy)
            with torch.no_grad():
                got = model(models.PROMPT).logits.flatten()
        except w2a4.W2A4Error as error:
            return "refused", f"{name}, {what}: {error}"
        except Exception as error:
            raise RuntimeError(f"{name}, {what}: {type(error).__name__}: {error}") from error
    want = models.logits_of(_base, name)
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-5, atol=1e-6):
        off = float((got - want).abs().max()) if got.shape == want.shape else got.shape
        raise Silent(f"{name}, {what}: loads, logits off by {off}")
    return "right", f"{name}, {what}"


def _bytes(draw: RandomDraw, folder: Path) -> str:
    path = folder / draw.pick(("model.safetensors",) * 3 + ("config.json", "tokenizer.json"))
    content = bytearray(path.read_bytes())
    places = [draw.number(0, len(content) - 1) for _ in range(draw.pick((1, 1, 4, 100)))]
    for place in places:
        content[place] ^= 1 << draw.number(0, 7)
    path.write_bytes(content)
    return f"{len(places)} bits of {path.name} flipped, the first in byte {places[0]}"


def _cut(draw: RandomDraw, folder: Path) -> str:
    path = folder / draw.pick(
        ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json")
    )
    content = path.read_bytes()
    keep = draw.pick((0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, draw.number(0, len(content))))
    path.write_bytes(content[:keep])
    return f"{path.name} cut after {keep} of {len(content)} bytes"


def _tensors(draw: RandomDraw, folder: Path) -> str:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        written = file.metadata()  # the digests of the original stay: they are what should tell
    tensors = load_file(path)
    name = draw.pick(sorted(tensors))
    alike = [n for n, t in tensors.items() if n != name and t.shape == tensors[name].shape
             and t.dtype == tensors[name].dtype and not torch.equal(t, tensors[name])]  # fmt: skip
    kind = draw.pick(("swap", "rename", "drop", "retype", "reshape", "extra", "value"))
    if kind == "swap" and alike:
        other = draw.pick(sorted(alike))
        tensors[name], tensors[other] = tensors[other], tensors[name]
        kind = f"swap with {other}"
    elif kind == "rename":
        tensors[name + "_"] = tensors.pop(name)
    elif kind == "retype":
        tensors[name] = tensors[name].to(draw.pick((torch.float32, torch.float16, torch.int8, torch.uint8)))
    elif kind == "reshape":
        tensors[name] = tensors[name].flatten()[:-1].clone()
    elif kind == "extra":
        tensors[f"{name}.extra"] = torch.ones(3)
    elif kind == "value" and tensors[name].is_floating_point():
        tensors[name].view(-1)[0] = draw.pick((float("nan"), float("inf"), -1.0, 0.0))
    else:
        kind = "drop"
        del tensors[name]
    save_file(tensors, path, metadata=written)
    return f"{name}: {kind}"


def _keys(draw: RandomDraw, folder: Path) -> str:
    path = folder / draw.pick(("config.json",) * 4 + ("generation_config.json", "tokenizer_config.json"))
    data = json.loads(path.read_text())
    parent, key = draw.pick(list(_places(data)))
    if draw.number(0, 2) == 0:
        del parent[key]
        what = f"{path.name}: {key} removed"
    else:
        parent[key] = draw.pick(VALUES)
        what = f"{path.name}: {key}={parent[key]!r}"
    path.write_text(json.dumps(data))
    return what


def _places(data: dict[str, Any]):
    for key, value in data.items():
        yield data, key
        if isinstance(value, dict):
            yield from _places(value)


def _files(draw: RandomDraw, folder: Path) -> str:
    path = folder / draw.pick(sorted(p.name for p in folder.iterdir()))
    kind = draw.pick(("removed", "a directory", "a dangling link"))
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    return f"{path.name} {kind}"
