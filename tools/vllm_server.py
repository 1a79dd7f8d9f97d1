"""vLLM's OpenAI server on a packed checkpoint, asked by OpenAI's own client; `try_vllm.sh` runs it.

    python tools/vllm_server.py DIR TEXT [--clients 64] [--seconds 120] [--json FILE] [-- OPTION…]

Checks answers, streams, stop words, log-probabilities and errors, the likelihood of TEXT against
transformers, and what many clients at a time get; options behind `--` go to the server. Exits 1 at the first
thing that is not as it should be.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import openai
import psutil
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The capital of France is"


@contextlib.contextmanager
def server(
    directory: str, options: tuple[str, ...], log: Path
) -> Iterator[tuple[openai.OpenAI, psutil.Process]]:
    """A client and the process of a server that runs until the block ends."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "packed", *options]
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in tqdm(range(900), desc="server starts", unit="s"):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}; {log} says why")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(1)
        else:
            raise SystemExit(f"the server did not start in 15 minutes; {log} says how far it came")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600)
        yield client, psutil.Process(process.pid)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def complete(client: openai.OpenAI, prompt: Any = PROMPT, tokens: int = 16, **others: Any) -> Any:
    return client.completions.create(
        model="packed", prompt=prompt, max_tokens=tokens, temperature=0, **others
    )


def check_answers(client: openai.OpenAI) -> None:
    """Completions and chat, whole and streamed, stop words, log-probabilities, errors."""
    on = {"extra_body": {"ignore_eos": True}}
    whole = complete(client, **on).choices[0]
    streamed = "".join(part.choices[0].text for part in complete(client, stream=True, **on))
    assert whole.text == streamed and whole.finish_reason == "length", (whole, streamed)
    word = whole.text.strip()[-2:]
    stopped = complete(client, stop=[word], **on).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == whole.text[: whole.text.index(word)]
    tops = complete(client, tokens=4, logprobs=3).choices[0].logprobs
    for chosen, top in zip(tops.token_logprobs, tops.top_logprobs, strict=True):
        assert 3 <= len(top) <= 4 and abs(chosen - max(top.values())) < 1e-4
    asked = {"model": "packed", "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
    chat = client.chat.completions.create(**asked, max_tokens=16).choices[0].message.content
    parts = client.chat.completions.create(**asked, max_tokens=16, stream=True)
    assert chat and chat == "".join(part.choices[0].delta.content or "" for part in parts)
    for wrong, error in (
        (lambda: client.completions.create(model="other", prompt="a"), openai.NotFoundError),
        (lambda: complete(client, tokens=10**9), openai.BadRequestError),
        (lambda: complete(client, [0] * 10**6), openai.BadRequestError),
    ):
        try:
            wrong()
        except error:
            continue
        raise AssertionError(f"{error.__name__} was expected")
    assert complete(client, **on).choices[0].text == whole.text, "an error changed what comes after it"


def likelihood(client: openai.OpenAI, ids: list[int]) -> float:
    """Mean log-probability of the tokens behind the first one."""
    scored = complete(client, ids, tokens=1, echo=True, logprobs=0).choices[0].logprobs.token_logprobs
    return sum(scored[1 : len(ids)]) / (len(ids) - 1)


@torch.no_grad()
def likelihoods_by_transformers(directory: str, windows: list[list[int]]) -> list[float]:
    """The same of each window."""
    import w2a4  # noqa: F401

    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), []
    for ids in tqdm(windows, desc="transformers", unit="window"):
        x = torch.tensor([ids])
        scores = model(x).logits.log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])
        found.append(float(scores.mean()))
    return found


def rate(client: openai.OpenAI, clients: int, seconds: float) -> tuple[float, list[str]]:
    """Tokens a second that so many clients get together, and what went wrong."""
    until, counts, wrong = time.monotonic() + seconds, [0] * clients, []

    def ask(index: int) -> None:
        turn = 0
        while time.monotonic() < until:
            try:
                answer = complete(
                    client, f"{PROMPT} {index} {turn}", 24 + index % 17, extra_body={"ignore_eos": True}
                )
                counts[index] += answer.usage.completion_tokens
            except Exception as error:  # whatever a client may be told
                wrong.append(repr(error))
            turn += 1

    start, threads = time.monotonic(), [threading.Thread(target=ask, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - start), wrong


def memory(process: psutil.Process) -> float:
    """MB of the server and all of its processes."""
    own = [process, *process.children(recursive=True)]
    return sum(one.memory_info().rss for one in own) / 1e6


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.argument("text", type=click.Path(exists=True, dir_okay=False))
@click.argument("options", nargs=-1)
@click.option("--clients", default=64, show_default=True)
@click.option("--seconds", default=120.0, show_default=True, help="Of many clients; of one, a fourth of it.")
@click.option("--windows", default=8, show_default=True, help="Of the text whose likelihood is compared.")
@click.option("--tokens", default=1500, show_default=True, help="Of each window.")
@click.option("--json", "target", type=click.Path(dir_okay=False))
def main(
    directory: str, text: str, options: tuple[str, ...], clients: int, seconds: float, windows: int,
    tokens: int, target: str | None,
) -> None:  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
    if len(ids) < windows * tokens:
        raise click.UsageError(f"{text} has {len(ids)} tokens, fewer than {windows} windows of {tokens}")
    pieces = [ids[i * len(ids) // windows :][:tokens] for i in range(windows)]
    log = Path(target or "vllm_server.json").with_suffix(".log")
    with server(directory, ("--max-num-seqs", str(clients), *options), log) as (client, process):
        check_answers(client)
        click.echo("answers, streams, stop words, log-probabilities and errors are right")
        found: dict[str, Any] = {"likelihoods": [likelihood(client, piece) for piece in pieces]}
        alone, wrong = rate(client, 1, seconds / 4)
        before = memory(process)
        together, more = rate(client, clients, seconds / 2)
        middle = memory(process)
        again, still = rate(client, clients, seconds / 2)
        found |= {
            "tokens_per_second": {"1": alone, str(clients): [together, again]},
            "megabytes": [before, middle, memory(process)], "errors": wrong + more + still,
        }  # fmt: skip
    found["likelihoods_by_transformers"] = likelihoods_by_transformers(directory, pieces)
    # A rounding makes other 4-bit codes, and these move the likelihood of a window by half a percent.
    own, others = (torch.tensor(found[f"likelihoods{by}"]) for by in ("", "_by_transformers"))
    found["difference"] = float((own - others).mean())
    found["standard_error"] = float((own - others).std() / len(own) ** 0.5)
    click.echo(json.dumps(found, indent=1))
    if target:
        Path(target).write_text(json.dumps(found, indent=1))
    assert not found["errors"], "clients were told of errors"
    assert found["megabytes"][2] < 1.05 * found["megabytes"][1], "memory grows"
    allowed = 0.002 * abs(float(others.mean())) + 3 * found["standard_error"]
    assert abs(found["difference"]) < allowed, "the likelihood is another"


if __name__ == "__main__":
    main()
