"""The command line `w2a4`, called in this process, and a model to call it with."""

from click.testing import CliRunner

from support.tiny_models import tiny_model, tiny_tokenizer
from w2a4.cli.main import main

#: The built-in text is half as long as the general one, the default.
SMALL = ("--set", "calib_samples=4", "--set", "calib_seqlen=32", "--calib", "builtin")
FEW_STEPS = (
    "--set", "training.steps=2", "--set", "training.seqlen=16", "--set", "training.batch_size=2",
    "--minutes", "0", "--data", "builtin",
)  # fmt: skip


def run(*arguments, input=None):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=input)


def succeed(*arguments, **kwargs):
    result = run(*arguments, **kwargs)
    assert result.exit_code == 0, result.output + result.stderr
    return result


def fail(*arguments) -> str:
    """Exit code 1 and one line on stderr, which is returned; nothing on stdout."""
    result = run(*arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 1, (result.exit_code, result.output, result.exception)
    assert len(errors) == 1 and "Traceback" not in result.stderr
    assert result.stdout == ""
    return errors[0]


def save_plain(directory):
    """A float LLaMA with its tokenizer, as transformers writes it."""
    tiny_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=True).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
