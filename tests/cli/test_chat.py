"""`w2a4 chat`: its commands, the system prompt, and Ctrl-C at a terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import w2a4
from w2a4.cli.main import main
from w2a4.evaluate import perplexity


def talk(directory, said, *arguments):
    """What was said on stderr, and the messages."""
    out = directory.parent / "messages.json"
    command = ["chat", str(directory), "--max-new-tokens", "2", "--json", str(out), *arguments]
    done = CliRunner().invoke(main, command, input=said)
    assert done.exit_code == 0, done.output
    return done.stderr, json.loads(out.read_text())["messages"]


def roles(messages):
    return [message["role"] for message in messages]


def test_a_system_prompt_and_commands(quantized):
    said, messages = talk(quantized[0], "a\n/help\n/nonsense b\nc\n", "--system", "be brief")
    assert roles(messages) == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages[:2]] == ["be brief", "a"]
    assert "'/nonsense' is not a command" in said and said.count("/reset") == 2


def test_reset_and_another_system_prompt(quantized):
    _, messages = talk(quantized[0], "a\n/reset\nb\n", "--system", "s")
    assert [message["content"] for message in messages[:2]] == ["s", "b"] and len(messages) == 3
    _, messages = talk(quantized[0], "a\n/system t\nb\n", "--system", "s")
    assert [message["content"] for message in messages[:2]] == ["t", "b"] and len(messages) == 3
    _, messages = talk(quantized[0], "a\n/system\nb\n", "--system", "s")
    assert roles(messages) == ["user", "assistant"]


def test_a_template_without_system_prompts():
    class Tokenizer:
        chat_template = "{{ raise_exception('System role not supported') }}"

        def apply_chat_template(self, messages, **options):
            from jinja2 import TemplateError

            raise TemplateError("System role not supported")

    with pytest.raises(
        w2a4.W2A4Error, match=r"no conversation of system, user \(System role not supported\)"
    ):
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        perplexity.reply(None, Tokenizer(), messages, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_at_a_terminal_stops_the_reply_only(quantized, tmp_path):
    ours, theirs = pty.openpty()
    out = tmp_path / "messages.json"
    script = """
import sys, time
from w2a4.evaluate import perplexity
def reply(model, tokenizer, messages, new, written, chosen):
    written.on_finalized_text("half a")
    print("THERE", file=sys.stderr, flush=True)
    time.sleep(100)
perplexity.reply = reply
from w2a4.cli import run
sys.argv = ["w2a4", "chat", *sys.argv[1:]]
run()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, quantized[0], "--json", out],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"hello\n")
    said = ""
    while "THERE" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert "/help for commands" in said
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    os.write(ours, b"/exit\n")
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, errors
    messages = json.loads(out.read_text())["messages"]
    assert messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "half a"}]
