"""`w2a4 chat DIR`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import W2A4Error
from . import options

HELP = """\
/help           this list
/reset          forget the conversation, not the system prompt
/system TEXT    another system prompt; without TEXT none; forgets the conversation
/exit           end, as Ctrl-D does
Ctrl-C          stop the reply, which is kept as far as it came; at the prompt, end"""


@click.command()
@click.argument("model", metavar="DIR")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@options.new_tokens
@options.sampling
@options.dtype
@options.device
@options.json_file
def chat(
    model: str,
    system: str | None,
    max_new_tokens: int,
    sampling: dict[str, Any],
    dtype: str | None,
    device: str | None,
    json_file: Path | None,
) -> None:
    """Talk to a model; /help lists what else can be said, /exit or end of input ends the conversation."""
    from ..evaluate import perplexity as evaluate
    from ..runtime import engine

    chosen = engine.Sampling(**sampling) if sampling else None
    loaded, tokenizer = options.load_model(model, dtype, device)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if terminal:
        click.echo(f"{model}, up to {max_new_tokens} tokens a reply; /help for commands", err=True)
    messages = _beginning(system)
    for line in _lines(terminal):
        if line.startswith("/"):
            messages = _obey(line, messages)
            continue
        written = streamer(tokenizer)
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = evaluate.reply(loaded, tokenizer, asked, max_new_tokens, written, chosen)
        except KeyboardInterrupt:
            if not terminal:
                raise
            click.echo()
            answer = written.told.strip()
        except W2A4Error as error:
            if not terminal:
                raise
            click.echo(f"error: {error}", err=True)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    options.write_result(json_file, {"messages": messages})


def _beginning(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _obey(line: str, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """What is left of the conversation after a command."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        return [message for message in messages if message["role"] == "system"]
    if command == "/system":
        return _beginning(rest.strip())
    unknown = "" if command == "/help" else f"{options.printable(command)!r} is not a command:\n"
    click.echo(unknown + HELP, err=True)
    return messages


def streamer(tokenizer: Any) -> Any:
    """Prints a reply as it comes, and keeps it in `told`."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        told = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.told += text
            super().on_finalized_text(text, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _lines(terminal: bool) -> Iterator[str]:
    """The lines that the user types, until /exit or the end of input."""
    if sys.stdin is None:  # closed
        return
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            line = "\udc80"
        if not options.is_text(line):
            raise W2A4Error("the input is not UTF-8; convert it, e.g. with iconv")
        if line == "/exit":
            return
        if line:
            yield line
