"""Files that tests write."""

from pathlib import Path


def fill(directory, contents):
    for name, text in contents.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
