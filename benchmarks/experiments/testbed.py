"""A testbed that needs no download: a byte-level LLaMA, trained on the Python reference in a few minutes.

    python -m benchmarks.experiments.testbed [--seed N] [--outliers] [--out DIR]

The first use trains it, every later one reads `~/.cache/w2a4/testbed` (or `$W2A4_CACHE/testbed`). Trained
so briefly its residual stream has few of the outliers of large ones; `plant_outliers` adds some, the output
unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from filelock import FileLock
from tabulate import tabulate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import w2a4
from benchmarks.experiments.outliers import four_bit_inputs, input_shape, plant_outliers
from benchmarks.files import write_json
from w2a4.evaluate.data import builtin_text
from w2a4.evaluate.perplexity import perplexity
from w2a4.format.directories import atomic_directory, check_out_dir

#: Begins a text. Never predicted, so its being the end as well ends nothing.
BOS = "<|endoftext|>"
BOS_ID = 256

MANIFEST = "testbed.json"

#: Raise it when training changes in a way that neither `Settings` nor the text tells: caches grow stale.
VERSION = 1

#: Held-out windows that the command line reads for each model; None is all of them.
WINDOWS: int | None = None


@dataclass(frozen=True)
class Settings:
    """What is trained, and how. Widths suit Hadamard transforms and groups of 32 or 64.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, head_dim: of the LLaMA; untied, no biases.
        context: bytes of a training window.
        batch, steps: windows a step, and steps.
        init: deviation of the initial weights; with the usual 0.02 it learns more slowly.
        lr: peak learning rate of AdamW; it rises for a twentieth of the steps and falls as a cosine.
    """

    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    context: int = 256
    batch: int = 4
    steps: int = 1500
    init: float = 0.06
    lr: float = 3e-3


def load(
    seed: int = 0, outliers: bool = False, progress: bool = True, settings: Settings | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model, from the cache if it is there; torch's global generator is left alone.

    Args:
        seed: of the initial weights and of the order of the text. One seed on one machine with one
            number of threads gives one model.
        outliers: with `plant_outliers` applied.
        progress: show a bar while training.
        settings: None is `Settings()`.

    Returns:
        the model in float32, in eval mode, and its tokenizer.

    Raises:
        OSError: the cache cannot be written; W2A4_CACHE names another place for it.
    """
    settings = settings or Settings()
    directory = cache_directory(seed, settings)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):  # whoever comes second waits and reads
        if not _is_whole(directory):
            model = train(build(settings, seed), settings, seed, progress)
            _store(model, directory)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # transformers maps the file, which may be damaged later
    # A checkpoint made of this one should not tell where somebody's cache lies.
    model.config._name_or_path = f"testbed-{directory.name}"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return (plant_outliers(model, seed=seed) if outliers else model), tokenizer


def cache_directory(seed: int, settings: Settings) -> Path:
    """Where the model lies: named by all it depends on, so what is there is never out of date."""
    content = {
        "version": VERSION,
        "seed": seed,
        "text": _sha256(builtin_text()[0].encode()),
        **dataclasses.asdict(settings),
    }
    digest = _sha256(json.dumps(content, sort_keys=True).encode())[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("W2A4_CACHE") or home / "w2a4") / "testbed" / digest


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i of the UTF-8 text, 256 the beginning; no string in a text stands for the latter."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's names of the bytes
    others = [byte for byte in range(256) if byte not in visible]
    vocabulary = {chr(byte): byte for byte in visible}
    vocabulary |= {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {BOS: BOS_ID}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build(settings: Settings, seed: int) -> LlamaForCausalLM:
    """An untrained model: matrices normal with deviation `settings.init`, norm weights 1; float32."""
    config = LlamaConfig(
        vocab_size=BOS_ID + 1, hidden_size=settings.hidden, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads, head_dim=settings.head_dim, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=BOS_ID, eos_token_id=BOS_ID, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, settings.init, generator=generator)
    return model


@torch.enable_grad()
def train(model: LlamaForCausalLM, settings: Settings, seed: int, progress: bool) -> LlamaForCausalLM:
    """Train in place, by AdamW on random windows of the training text; back in eval mode."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() > 1]
    others = [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]
    others += [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, settings.steps, pct_start=0.05, cycle_momentum=False
    )
    model.train()
    with tqdm(range(settings.steps), desc="train the testbed", unit="step", disable=not progress) as bar:
        for _, ids in zip(bar, training_windows(settings, seed), strict=False):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model.eval()


def training_windows(settings: Settings, seed: int) -> Iterator[Tensor]:
    """Without end: int64 `[batch, context + 1]` from random places; the first window begins with BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(list(builtin_text()[0].encode()))
    offsets = torch.arange(settings.context + 1)
    while True:
        starts = torch.randint(len(ids) - settings.context, (settings.batch, 1), generator=generator)
        windows = ids[starts + offsets]
        windows[0, 0] = BOS_ID
        yield windows


def _is_whole(directory: Path) -> bool:
    """Every file is what was written; warns if some are not."""
    if not directory.is_dir():
        return False
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if all(_sha256((directory / name).read_bytes()) == digest for name, digest in manifest.items()):
            return True
    except (OSError, ValueError, AttributeError):
        pass
    warnings.warn(f"the testbed in {str(directory)!r} is damaged; training it again", stacklevel=3)
    return False


def _store(model: LlamaForCausalLM, directory: Path) -> None:
    """The model and its tokenizer, in one step, with the hash of every file."""
    shutil.rmtree(directory, ignore_errors=True)
    with atomic_directory(directory) as part:
        model.save_pretrained(part)
        byte_tokenizer().save_pretrained(part)
        manifest = {file.name: _sha256(file.read_bytes()) for file in sorted(part.iterdir())}
        write_json(part / MANIFEST, manifest)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def outlier_table(seed: int) -> str:
    """The model as trained, with outliers, and with these rotated away: shapes of inputs, perplexities."""
    rows = []
    for name in ("as trained", "outliers planted", "planted, then rotated"):
        model, tokenizer = load(seed, name != "as trained")
        if name.endswith("rotated"):
            w2a4.rotate(model)
        score = functools.partial(perplexity, model, tokenizer, seqlen=256, windows=WINDOWS, progress=False)
        plain = score()["perplexity"]
        with four_bit_inputs(model):
            quantised = score()["perplexity"]
        shapes = [f"{kurtosis:.1f} / {peak:.1f}" for kurtosis, peak in input_shape(model).values()]
        rows.append((name, *shapes, f"{plain:.4f}", f"{quantised:.4f}"))
    return tabulate(rows, ("model", "norms", "o_proj", "down_proj", "ppl", "ppl A4"), disable_numparse=True)


@click.command(help="Train or load the testbed, and say what it is worth on held-out text.")
@click.option("--seed", default=0, show_default=True)
@click.option("--outliers", is_flag=True, help="Plant outliers, and show what they and a rotation do.")
@click.option("--out", type=click.Path(path_type=Path), help="Save it here, for `w2a4 quantize`.")
def main(seed: int, outliers: bool, out: Path | None) -> None:
    try:
        if out is not None:
            check_out_dir(out)
        describe(seed, outliers)
        if out is not None:
            w2a4.save(*load(seed, outliers), out)
    except (w2a4.W2A4Error, OSError) as error:
        raise click.ClickException(str(error)) from None


def describe(seed: int, outliers: bool) -> None:
    """Print size, time to load or train, held-out perplexity, and with outliers the table of these."""
    started = time.perf_counter()
    model, tokenizer = load(seed)
    seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, ready in {seconds:.1f} s, {cache_directory(seed, Settings())}")
    score = perplexity(model, tokenizer, seqlen=256, windows=WINDOWS)
    bits = math.log2(score["perplexity"])
    print(f"perplexity {score['perplexity']:.3f} a byte, {bits:.3f} bits a byte ({score['text']})")
    if outliers:
        print("inputs of the linears: kurtosis / max over rms, of a token; ppl A4: with these in 4 bits")
        print(outlier_table(seed))


if __name__ == "__main__":
    main()
