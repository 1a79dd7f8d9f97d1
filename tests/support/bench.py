"""A row of a benchmark's result, and what a benchmark's command answers."""

from click.testing import CliRunner


def row(**changes):
    fixed = dict(op="linear_w2a4", shape="4096x4096", tokens=1, dtype="float16", cache="cold", us=2.0,
                 peer="cublas.float16", peer_us=6.0, ratio=3.0, bytes=5_000_000, gbps=2500.0, bound=1.2,
                 correct=True)  # fmt: skip
    return fixed | changes


def answer(program, *arguments):
    """Exit code and output, in this process."""
    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
