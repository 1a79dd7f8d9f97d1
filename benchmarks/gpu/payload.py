"""A file too large for one call, in pieces that travel in several. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import click

#: Bytes of a piece.
PIECE = 56 << 20
INDEX = "payload.json"


def split(folder: Path, parts: Path) -> list[Path]:
    """Pack a folder into `parts/part1`, `parts/part2`, …; each piece comes with an index of all."""
    whole = parts / "payload.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(folder, ".")
    count = -(-whole.stat().st_size // PIECE)
    digest = hashlib.sha256()
    made = []
    with whole.open("rb") as source:
        for number in range(1, count + 1):
            piece = source.read(PIECE)
            digest.update(piece)
            made.append(parts / f"part{number}")
            made[-1].mkdir()
            (made[-1] / f"payload.{number}").write_bytes(piece)
    whole.unlink()
    index = json.dumps({"pieces": count, "sha256": digest.hexdigest()})
    for part in made:
        (part / INDEX).write_text(index, encoding="utf-8")
    return made


def join(folder: Path, out: Path) -> None:
    """Unpack the pieces that have come together in one folder.

    Raises:
        click.ClickException: a piece is missing or damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        count, wanted = index["pieces"], index["sha256"]
    except (OSError, ValueError, KeyError):
        raise click.ClickException(
            f"--carry {folder}: there is no {INDEX} in it; copy the parts of `pack` there"
        ) from None
    pieces = [folder / f"payload.{number}" for number in range(1, count + 1)]
    missing = [piece.name for piece in pieces if not piece.is_file()]
    if missing:
        raise click.ClickException(
            f"--carry {folder}: {', '.join(missing)} of {count} pieces did not come; send their parts first"
        )
    out.mkdir(parents=True, exist_ok=True)
    whole, digest = out / "payload.tar", hashlib.sha256()
    with whole.open("wb") as target:
        for piece in pieces:
            content = piece.read_bytes()
            digest.update(content)
            target.write(content)
    if digest.hexdigest() != wanted:
        raise click.ClickException(
            f"--carry {folder}: the pieces are not those of one `pack`; send them all again"
        )
    with tarfile.open(whole) as archive:
        archive.extractall(out, filter="data")
    whole.unlink()
