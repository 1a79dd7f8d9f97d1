"""The command group: errors that a user can act on become one line and an exit code."""

from __future__ import annotations

import errno
from typing import Any

import click
from safetensors import SafetensorError

from ..errors import W2A4Error
from . import options


class Group(click.Group):
    """Turns errors a user can act on into one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for arg in args:
            if not options.is_text(arg):
                raise click.UsageError(
                    f"{options.printable(arg)!r} is not UTF-8; type it again, or rename the file", ctx
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except (W2A4Error, OSError, SafetensorError, UnicodeError, RecursionError, MemoryError) as error:
            # A full disk raises OSError, or SafetensorError while tensors are written. The last three errors
            # come from files that are not text, are nested too deeply, or declare sizes beyond memory.
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of the output has closed it; click exits without a message
            click.echo(f"error: {options.printable(_one_line(error))}", err=True)
            ctx.exit(1)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, RecursionError):
        return "a file that was read is nested too deeply; give one of normal depth"
    return " ".join(str(error).split()) or type(error).__name__
