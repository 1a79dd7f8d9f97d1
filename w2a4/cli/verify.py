"""`w2a4 verify DIR`."""

from __future__ import annotations

from pathlib import Path

import click

from ..format.files import write_json
from . import options


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@options.json_file
def verify(directory: Path, json_file: Path | None) -> None:
    """Check a checkpoint: config against tensors, values, and every tensor against its digest."""
    from ..hub import verification

    result = verification.verify(directory)
    click.echo(verification.verdict(result))
    if json_file is not None:
        write_json(json_file, result)
