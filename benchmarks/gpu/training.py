"""The third command's process: a carried model to W2A4KV4 on carried tokens, judged on texts it never saw.

Perplexities of full precision, of the fit and of the trained model stand side by side on every held-out text.
What training changed is written down every few minutes, in files that may come back from a call.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

import w2a4
from benchmarks.files import append_line
from benchmarks.gpu import small
from w2a4.evaluate import data
from w2a4.evaluate.perplexity import generation_speed, perplexity
from w2a4.ops.devices import peak_memory_mb
from w2a4.train.data import Windows
from w2a4.train.generations import write_generations
from w2a4.train.prepare import convert, prepare
from w2a4.train.trainer import QATTrainer, training_arguments

#: Files of a carried folder.
TOKENS, HELD_OUT = "tokens.safetensors", "held_out.json"
#: Seconds kept for what comes after the last step, and between two small checkpoints.
AFTER, EVERY = 20, 90
PROMPT = "The three most important things to know about rivers are"


def tokenise(model_file: str, texts: list[Path], out: Path, most: int) -> int:
    """Write the tokens of texts, cut to at most so many, in turns from each; returns how many."""
    _, tokenizer = w2a4.load_model(model_file)
    streams = [data.token_stream(tokenizer, data.read_text(text))[0] for text in texts]
    share = most // len(streams)
    tokens = torch.cat([stream[:share] for stream in streams])
    if int(tokens.max()) >= 1 << 16:
        raise w2a4.W2A4Error(
            f"token {int(tokens.max())} takes more than 16 bits; train with a smaller vocabulary"
        )
    save_file({"tokens": tokens.to(torch.uint16)}, out / TOKENS)
    return len(tokens)


def spread(tokens: Tensor, samples: int, seqlen: int) -> Tensor:
    """Windows `[samples, seqlen]` from all over a stream, for calibration."""
    starts = torch.linspace(0, len(tokens) - seqlen, samples).long()
    return tokens[starts[:, None] + torch.arange(seqlen)]


class Keep(TrainerCallback):
    """Writes losses and small checkpoints while the model trains."""

    def __init__(self, model: Any, recipe: w2a4.Recipe, out: Path, emit: Any):
        self.model, self.recipe, self.out, self.emit = model, recipe, out, emit
        self.last = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and state.global_step % 10 == 0:
            self.emit(op="loss", step=state.global_step, loss=logs["loss"])

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = (
            False  # the large ones, of which only the last would matter, and it would not travel
        )
        if time.monotonic() - self.last > EVERY:
            bytes = small.write(self.model, self.recipe, state.global_step, self.out)
            self.emit(op="checkpoint", step=state.global_step, bytes=bytes)
            self.last = time.monotonic()


def train(
    carry: Path,
    out: Path,
    device: str,
    seconds: float,
    own_tokens: int,
    seqlen: int,
    settings: dict[str, Any],
) -> None:
    """All of it, within so many seconds.

    Args:
        own_tokens: train on so many tokens that the teacher writes itself; 0 is on the carried ones.
        seqlen: tokens of a window that perplexity is measured on.
        settings: fields of the recipe `w2a4kv4-rcp`.
    """
    end = time.monotonic() + seconds
    emit = partial(_emit, out / "results.jsonl")
    work = Path(tempfile.mkdtemp(prefix="w2a4-training-"))  # what lies in `out` comes back
    held_out = json.loads((carry / HELD_OUT).read_text(encoding="utf-8"))
    file = carry / "model.gguf"
    source = file if file.exists() else carry / "model"
    model, tokenizer = w2a4.load_model(str(source), dtype=torch.float32)  # latent weights, under autocast
    model.to(device)
    tokens = load_file(carry / TOKENS)["tokens"].long()
    judge = partial(_judge, tokenizer, held_out, emit, seqlen, 2 if device == "cpu" else 16)

    def writes(state: str) -> None:
        written = generation_speed(model, tokenizer, PROMPT, 48)
        speed = written["tokens_per_second"]
        emit(op="writes", state=state, prompt=PROMPT, text=written["text"], tokens_per_second=speed)

    judge(model, "full precision")
    writes("full precision")
    recipe = w2a4.Recipe.load("w2a4kv4-rcp").override(
        **{"training.micro_batch": -1, "training.gradient_checkpointing": False, "training.steps": 1_000_000}
        | settings
    )
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher = teacher.to(torch.bfloat16) if device == "cuda" else teacher
    if own_tokens:
        text = write_generations(teacher, tokenizer, tokens, own_tokens, work / "own.jsonl", progress=False)
        tokens, _ = data.token_stream(tokenizer, text)
        emit(op="own text", tokens=len(tokens))
    calibration = spread(tokens, recipe.calib_samples, recipe.calib_seqlen)
    prepare(model, tokenizer, recipe, calibration, progress=False)
    judge(model.eval(), "fitted")
    left = (end - time.monotonic() - AFTER) / 60
    if left <= 0:
        raise w2a4.W2A4Error(
            f"no time to train after the fit; give --budget {-left + seconds / 60 + 2:.0f} or more"
        )
    training = recipe.override(**{"training.minutes": left}).training
    windows = Windows(tokens, training.seqlen, training.steps * training.batch_size, recipe.rotation.seed)
    args = training_arguments(training, work, 1, 0, False, torch.device(device))
    args.save_strategy = "no"
    trainer = QATTrainer(model.train(), teacher, training, args, train_dataset=windows)
    trainer.add_callback(Keep(model, recipe, out, emit))
    begun = time.monotonic()
    trainer.train()
    step, spent = trainer.state.global_step, time.monotonic() - begun
    emit(op="trained", steps=step, tokens=step * training.batch_size * training.seqlen, seconds=spent,
         graph=trainer._graph is not None, peak_mb=peak_memory_mb(torch.device(device)))  # fmt: skip
    small.write(model, recipe, step, out)
    for path in sorted(out.glob(small.NAME.format("*"))):
        emit(op="file", name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    convert(model)
    judge(model, "trained")
    writes("trained")


def _judge(
    tokenizer: Any, held_out: dict[str, str], emit: Any, seqlen: int, windows: int, model: Any, state: str
) -> None:
    """Emit perplexities on every held-out text."""
    for name, text in held_out.items():
        found = perplexity(model, tokenizer, [text], seqlen, windows, progress=False)
        told = {key: found[key] for key in ("perplexity", "tokens", "seqlen")}
        emit(op="perplexity", state=state, text=name, **told)


def _emit(results: Path, **entry: Any) -> None:
    append_line(results, {"stage": "training", **entry})
