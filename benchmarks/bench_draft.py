"""A packed model as the draft of its own original: the original's tokens, and how much sooner they come.

    python -m benchmarks.bench_draft --packed DIR [--model MODEL] [--text FILE|general|builtin]…
        [--prompts 3] [--tokens 64] [--drafted 2,4,8] [--threads N] [--json FILE]

Transformers' assisted generation, greedy: DIR drafts so many tokens, the original in float32 looks at all of
them in one pass and keeps those that it would have chosen. Prompts are 64 tokens from places spread evenly
over each text. Every prompt is continued by the original alone and with each number of drafted tokens, by
turns in one process, and the tokens are compared: where they differ, the run ends with an error, unless the
two had logits closer than 1e-3 there, since a pass over several tokens sums in another order than one over a
single token. The end token counts for nothing.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import w2a4
from benchmarks.bench_decode import load
from benchmarks.files import write_json
from benchmarks.harness import metadata, warn_if_busy
from w2a4.cli import demo
from w2a4.evaluate import data
from w2a4.evaluate.report import source_name

PROMPT_TOKENS = 64

#: Two tokens whose logits are closer than this may change places where sums are in another order.
NEAR = 1e-3


class Calls:
    """Counts forward passes of a module."""

    def __init__(self, module: torch.nn.Module):
        self.count = 0
        module.register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


def prompts(tokenizer: Any, text: str, count: int) -> list[Tensor]:
    """`[1, PROMPT_TOKENS]` each, from places spread evenly over the text."""
    stream, _ = data.token_stream(tokenizer, text)
    if len(stream) < PROMPT_TOKENS:
        raise click.ClickException(f"a text of {len(stream)} tokens; give at least {PROMPT_TOKENS}")
    starts = torch.linspace(0, len(stream) - PROMPT_TOKENS, count + 2)[1:-1].long()
    return [stream[start : start + PROMPT_TOKENS][None] for start in starts]


class Pair:
    """The original and its draft, and what their passes were."""

    def __init__(self, full: Any, draft: Any):
        self.full, self.draft = full, draft
        self.looks, self.drafts = Calls(full.model), Calls(draft.model)

    def generate(self, ids: Tensor, tokens: int, drafted: int) -> tuple[Tensor, dict[str, float]]:
        """New tokens; and seconds, passes of the original, tokens that were drafted. 0 is without a draft."""
        options: dict[str, Any] = {}
        if drafted:
            settings = self.draft.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = drafted, "constant"
            settings.assistant_confidence_threshold = 0.0
            options["assistant_model"] = self.draft
        self.looks.count = self.drafts.count = 0
        start = time.perf_counter()
        out = self.full.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options
        )
        seconds = time.perf_counter() - start
        return out[0, ids.shape[1] :], {
            "seconds": seconds, "looks": self.looks.count, "drafted": self.drafts.count,
        }  # fmt: skip

    @torch.no_grad()
    def check(self, ids: Tensor, plain: Tensor, assisted: Tensor) -> bool:
        """Whether two continuations are the same; False where they part at two tokens that are nearly equal.

        Raises:
            click.ClickException: they part elsewhere.
        """
        if torch.equal(plain, assisted):
            return True
        if len(plain) != len(assisted):
            raise click.ClickException(f"{len(assisted)} tokens with a draft, and {len(plain)} without")
        at = int((plain != assisted).nonzero()[0])
        both = [int(plain[at]), int(assisted[at])]
        logits = self.full(torch.cat([ids[0], plain[:at]])[None]).logits[0, -1, both]
        if abs(float(logits[0] - logits[1])) > NEAR:
            raise click.ClickException(
                f"with a draft token {at + 1} is another: {both}, logits {logits.tolist()}"
            )
        return False


def measure(
    pair: Pair, texts: dict[str, list[Tensor]], tokens: int, drafted: list[int]
) -> list[dict[str, Any]]:
    """A row a text and number of drafted tokens."""
    rows = []
    bar = tqdm(total=sum(map(len, texts.values())), unit="prompt", disable=not sys.stderr.isatty())
    for name, starts in texts.items():
        runs: dict[int, list[dict[str, float]]] = {number: [] for number in (0, *drafted)}
        parted = 0
        for index, ids in enumerate(starts):
            turn = index % len(runs)
            order = [*runs][turn:] + [*runs][:turn]
            made = {}
            for number in order:
                made[number], run = pair.generate(ids, tokens, number)
                runs[number].append(run)
            parted += sum(not pair.check(ids, made[0], made[number]) for number in drafted)
            bar.update()
        for number in drafted:
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs[0], runs[number], strict=True)]
            looks = sum(run["looks"] for run in runs[number])
            rows.append({
                "text": name, "drafted": number, "runs": runs[number], "parted": parted,
                "tokens_a_look": len(starts) * tokens / looks,
                "accepted": (len(starts) * tokens - looks) / sum(run["drafted"] for run in runs[number]),
                "speedup": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
                "tokens_per_second": tokens / statistics.median(run["seconds"] for run in runs[number]),
                "alone": tokens / statistics.median(run["seconds"] for run in runs[0]),
            })  # fmt: skip
    bar.close()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        speed = row["speedup"]
        cells.append((
            row["text"], row["drafted"], f"{row['accepted']:.2f}", f"{row['tokens_a_look']:.2f}",
            f"{row['alone']:.1f}", f"{row['tokens_per_second']:.1f}",
            f"{speed['median']:.2f} ({speed['least']:.2f} to {speed['most']:.2f})",
        ))  # fmt: skip
    headers = (
        "text",
        "drafted",
        "accepted",
        "tokens a look",
        "alone, tokens/s",
        "with a draft",
        "times as fast",
    )
    return tabulate(cells, headers, disable_numparse=True, colalign=("left", *["right"] * 6))


@click.command(help="\b\n" + __doc__)
@click.option("--model", help="A float model's directory, hub id or .gguf; the demo's by default.")
@click.option(
    "--packed", required=True, type=click.Path(exists=True, file_okay=False), help="The same, packed."
)
@click.option("--text", "texts", multiple=True, default=("general", "builtin"), help="Repeatable.")
@click.option("--prompts", "count", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--drafted", default="2,4,8", show_default=True, help="Tokens that are drafted at a time.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of all.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Result file.")
def main(model, packed, texts, count, tokens, drafted, threads, json_file):
    if threads is not None:
        torch.set_num_threads(threads)
    warn_if_busy()
    numbers = [int(number) for number in drafted.split(",") if number.isdecimal() and int(number)]
    if len(numbers) != drafted.count(",") + 1:
        raise click.ClickException(f"--drafted {drafted}: give numbers from 1 on, with commas between them")
    meta = metadata("cpu") | {
        "command": shlex.join(["python", "-m", "benchmarks.bench_draft", *sys.argv[1:]])
    }
    try:
        source = model or str(demo._model())
        full, tokenizer = load(source)
        small, _ = load(packed)
        if not isinstance(getattr(small.config, "quantization_config", None), w2a4.W2A4Config):
            raise click.ClickException(f"{packed} is not packed by w2a4; give what `w2a4 quantize` wrote")
        starts = {name: prompts(tokenizer, data.load_text(name, "evaluation"), count) for name in texts}
    except w2a4.W2A4Error as error:
        raise click.ClickException(str(error)) from None
    pair = Pair(full, small)
    for number in (0, numbers[0]):
        pair.generate(next(iter(starts.values()))[0], 2, number)
    rows = measure(pair, starts, tokens, numbers)
    if json_file is not None:
        settings = {"model": source_name(source), "recipe": small.config.quantization_config.recipe}
        write_json(json_file, {"meta": meta, **settings, "prompt_tokens": PROMPT_TOKENS, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
